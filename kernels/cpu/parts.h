// How a buffer is divided.
#pragma once
#include <cstdint>

namespace paretune {

// Parts of a buffer, one after the other; of none at all it only says how many bytes they take.
struct Parts {
    void* memory;
    int64_t taken = 0;
    template <class Element>
    Element* take(int64_t count) {
        Element* part = (Element*)((uintptr_t)memory + taken);
        taken += (count * (int64_t)sizeof(Element) + 63) / 64 * 64;
        return part;
    }
};

}  // namespace paretune
