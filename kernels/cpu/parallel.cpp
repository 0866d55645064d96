// The helper threads behind parallel_items. They spin for a moment after a job, since the next operator follows in
// microseconds, and then sleep. They are never joined: a process may end, or fork, at any time.
#include "parallel.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace paretune {
namespace {

constexpr int MOST_HELPERS = 255;
constexpr auto SPIN = std::chrono::microseconds(200);

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Pool {
    // The job; written only while no helper is inside.
    void (*body)(void*, int64_t, int) = nullptr;
    void* context = nullptr;
    int64_t items = 0;
    int threads = 0;

    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<uint64_t> turn{0};  // odd while a job is open
    alignas(64) std::atomic<int> inside{0};     // helpers that may be reading the job
    std::atomic<int> sleeping{0};
    std::mutex callers, bed;
    std::condition_variable wake;
    int helpers = 0;
    const pid_t process = getpid();

    void take_items(int thread) {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item, thread);
    }

    uint64_t wait_for_turn(uint64_t seen) {
        const auto until = std::chrono::steady_clock::now() + SPIN;
        for (int i = 0;; ++i) {
            const uint64_t now = turn.load();
            if (now != seen && now % 2) return now;
            pause();
            if (i % 64 == 63 && std::chrono::steady_clock::now() > until) break;
        }
        std::unique_lock<std::mutex> lock(bed);
        sleeping.fetch_add(1);
        uint64_t now = 0;
        wake.wait(lock, [&] { return (now = turn.load()) != seen && now % 2; });
        sleeping.fetch_sub(1);
        return now;
    }

    void help(int thread) {
        for (uint64_t seen = 0;;) {
            seen = wait_for_turn(seen);
            // Enter, then look again: either the job is still open, or the caller sees that somebody is inside (both orders
            // are sequentially consistent), so no job changes under a helper that reads it.
            inside.fetch_add(1);
            if (turn.load() == seen && thread < threads) take_items(thread);
            inside.fetch_sub(1);
        }
    }

    void run(int64_t count, int wished, void (*work)(void*, int64_t, int), void* with) {
        while (helpers < wished - 1 && helpers < MOST_HELPERS) {
            ++helpers;
            std::thread(&Pool::help, this, helpers).detach();
        }
        body = work;
        context = with;
        items = count;
        threads = wished;
        next.store(0);
        turn.fetch_add(1);
        if (sleeping.load() > 0) {
            { std::lock_guard<std::mutex> lock(bed); }
            wake.notify_all();
        }
        take_items(0);
        turn.fetch_add(1);
        for (int i = 0; inside.load() > 0; ++i) {
            pause();
            if (i % 1024 == 1023) std::this_thread::yield();
        }
    }
};

}  // namespace

void run_items(int64_t items, int threads, void (*body)(void*, int64_t, int), void* context) {
    static std::atomic<Pool*> shared{nullptr};
    Pool* pool = shared.load();
    if (pool == nullptr || pool->process != getpid()) {  // the first call, or the first in a forked child, which has no helpers
        Pool* fresh = new Pool;
        if (shared.compare_exchange_strong(pool, fresh)) {
            pool = fresh;
        } else {
            delete fresh;
        }
    }
    std::unique_lock<std::mutex> lock(pool->callers, std::try_to_lock);
    if (lock.owns_lock()) {
        pool->run(items, threads, body, context);
    } else {  // another thread of this process has the helpers
        for (int64_t item = 0; item < items; ++item) body(context, item, 0);
    }
}

}  // namespace paretune
