// Passes over the rows of a matrix: shared out among the threads, and the ragged end of each row.
#pragma once
#include "parallel.h"
#include "simd.h"

namespace paretune {

constexpr int64_t SERIAL_BELOW = 32768;  // elements; an estimate of what waking a helper costs, not measured

// Rows are handed out in a few items per thread.
template <class Body>
static void rows_in_parallel(int64_t rows, int64_t width, int threads, const Body& body) {
    if (rows * width < SERIAL_BELOW) threads = 1;
    const int64_t items = threads == 1 ? 1 : rows < 8 * threads ? rows : 8 * threads;
    parallel_items(items, threads, [&](int64_t item, int) {
        for (int64_t row = item * rows / items; row < (item + 1) * rows / items; ++row) body(row);
    });
}

template <class Element>
static inline Floats load_upto(const Element* p, int64_t left) {
    return left >= LANES ? load(p) : load_some(p, left);
}
template <class Element>
static inline void store_upto(Element* p, Floats x, int64_t left) {
    if (left >= LANES) {
        store(p, x);
    } else {
        store_some(p, x, left);
    }
}

}  // namespace paretune
