// Work in items that threads take as they come free. Nobody waits for a thread that has not begun: where a neighbor holds a
// core, the caller does the items alone. (An OpenMP region waits for its whole team: on a busy two-core machine that made a
// 0.3 ms operator 7 ms.)
#pragma once
#include <cstdint>

namespace paretune {

// body(context, item, thread) for every item in [0, items), on the caller and up to threads - 1 helpers; thread < threads.
void run_items(int64_t items, int threads, void (*body)(void* context, int64_t item, int thread), void* context);

template <class Body>
static void parallel_items(int64_t items, int threads, const Body& body) {
    if (threads > items) threads = (int)items;
    if (threads <= 1) {
        for (int64_t item = 0; item < items; ++item) body(item, 0);
        return;
    }
    run_items(items, threads, [](void* context, int64_t item, int thread) { (*(const Body*)context)(item, thread); },
              (void*)&body);
}

}  // namespace paretune
