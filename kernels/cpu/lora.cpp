// y[row] += scale * (x[row] @ A.T) @ B.T with A and B of the row's own adapter: same name, shapes and reference as
// kernels/lora.py. Plain C interface; the caller owns every buffer, the function allocates, throws and keeps nothing.
// Rows come sorted by adapter; a tile of rows of one adapter reads its A and B once. Each sum of a row is added up in one
// order whatever rows stand beside it, so an answer does not hang on the batch it was computed in.
#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace paretune {
namespace {

#if defined(PARETUNE_AVX512)
constexpr int ROWS = 4;  // 16 sums, 4 of A, 1 of x of 32 registers
#else
constexpr int ROWS = 2;  // 8 sums, 4 of A, 1 of x of 16 registers
#endif
constexpr int RANKS = 4;
constexpr int MAX_RANK = 512;
constexpr int64_t AHEAD_BYTES = 1024;         // as linear.cpp's default order of magnitude; not measured apart
constexpr int64_t SERIAL_BELOW_MACS = 65536;  // an estimate of what waking a helper costs, not measured

struct Part {  // kernels/lora.py: _PART
    const char* a;  // [rank / RANKS][steps][RANKS (the last: what is left)][LANES], zeros past in_features
    const char* b;  // [channels / PANEL][rank][PANEL], zeros past the last channel
    int64_t first, channels, rank;  // columns of y; rank 0: the adapter leaves them alone
    float scale;
    int32_t unused;
};

struct Call {
    const float* x;
    int64_t x_stride, in_features;
    float* y;
    int64_t y_stride;
};

// h[row][0 .. WIDTH) = A's WIDTH ranks times x of `height` rows.
template <class Element, int WIDTH, int HEIGHT>
void shrink_tile(const Call& call, const int32_t* rows, const Element* a, float* h) {
    Floats sums[HEIGHT][WIDTH] = {};
    const float* x[HEIGHT];
    for (int r = 0; r < HEIGHT; ++r) x[r] = call.x + rows[r] * call.x_stride;
    const int64_t whole = call.in_features / LANES * LANES;
    auto step = [&](auto take, int64_t i) {
        Floats w[WIDTH];
        for (int c = 0; c < WIDTH; ++c) w[c] = load(a + c * LANES);
        __builtin_prefetch((const char*)a + AHEAD_BYTES);
        __builtin_prefetch((const char*)a + AHEAD_BYTES + 64);
        for (int r = 0; r < HEIGHT; ++r) {
            const Floats v = take(x[r] + i);
            for (int c = 0; c < WIDTH; ++c) sums[r][c] += v * w[c];
        }
        a += WIDTH * LANES;
    };
    for (int64_t i = 0; i < whole; i += LANES) step([](const float* p) { return load(p); }, i);
    if (whole < call.in_features) {
        const int64_t left = call.in_features - whole;
        step([left](const float* p) { return load_some(p, left); }, whole);
    }
    for (int r = 0; r < HEIGHT; ++r) {
        for (int c = 0; c < WIDTH; ++c) {
            float lane[LANES];
            store(lane, sums[r][c]);
            for (int half = LANES / 2; half > 0; half /= 2) {
                for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
            }
            h[r * MAX_RANK + c] = lane[0];
        }
    }
}

template <class Element, int HEIGHT>
void shrink(const Call& call, const Part& part, const int32_t* rows, float* h) {
    const int64_t steps = (call.in_features + LANES - 1) / LANES;
    const Element* a = (const Element*)part.a;
    int64_t rank = 0;
    for (; rank + RANKS <= part.rank; rank += RANKS, a += RANKS * steps * LANES) {
        shrink_tile<Element, RANKS, HEIGHT>(call, rows, a, h + rank);
    }
    if (part.rank - rank == 3) shrink_tile<Element, 3, HEIGHT>(call, rows, a, h + rank);
    if (part.rank - rank == 2) shrink_tile<Element, 2, HEIGHT>(call, rows, a, h + rank);
    if (part.rank - rank == 1) shrink_tile<Element, 1, HEIGHT>(call, rows, a, h + rank);
    for (int r = 0; r < HEIGHT; ++r) {
        for (int64_t i = 0; i < part.rank; ++i) h[r * MAX_RANK + i] *= part.scale;
    }
}

template <class Element, int HEIGHT>
void expand(const Call& call, const Part& part, const int32_t* rows, const float* h) {
    const Element* b = (const Element*)part.b;
    for (int64_t channel = 0; channel < part.channels; channel += PANEL) {
        Floats sums[HEIGHT][2] = {};
        for (int64_t i = 0; i < part.rank; ++i, b += PANEL) {
            const Floats w0 = load(b), w1 = load(b + LANES);
            __builtin_prefetch((const char*)b + AHEAD_BYTES);
            for (int r = 0; r < HEIGHT; ++r) {
                const Floats v = spread(h[r * MAX_RANK + i]);
                sums[r][0] += v * w0;
                sums[r][1] += v * w1;
            }
        }
        for (int r = 0; r < HEIGHT; ++r) {
            float* y = call.y + rows[r] * call.y_stride + part.first + channel;
            for (int half = 0; half < 2; ++half, y += LANES) {
                const int64_t left = part.channels - channel - half * LANES;
                if (left >= LANES) {
                    store(y, load(y) + sums[r][half]);
                } else if (left > 0) {
                    store_some(y, load_some(y, left) + sums[r][half], left);
                }
            }
        }
    }
}

template <class Element, int HEIGHT>
void add_tile(const Call& call, const Part& part, const int32_t* rows, int64_t count) {
    if constexpr (HEIGHT > 1) {
        if (count < HEIGHT) return add_tile<Element, HEIGHT - 1>(call, part, rows, count);
    }
    float h[HEIGHT * MAX_RANK];
    shrink<Element, HEIGHT>(call, part, rows, h);
    expand<Element, HEIGHT>(call, part, rows, h);
}

// Places [first, last) of the sorted rows, one part: from group to group, in tiles of rows.
template <class Element>
void add_rows(const Call& call, const Part* table, int64_t parts, int64_t part, const int32_t* rows,
              const int32_t* group_start, const int32_t* group_slot, int64_t groups, int64_t first, int64_t last) {
    int64_t group = std::upper_bound(group_start, group_start + groups + 1, (int32_t)first) - group_start - 1;
    for (int64_t at = first; at < last; ++group) {
        const int64_t end = std::min<int64_t>(last, group_start[group + 1]);
        const Part& its = table[group_slot[group] * parts + part];
        if (its.rank == 0) at = end;
        for (; at < end; at += ROWS) add_tile<Element, ROWS>(call, its, rows + at, std::min<int64_t>(ROWS, end - at));
        at = end;
    }
}

}  // namespace
}  // namespace paretune

using namespace paretune;

extern "C" int paretune_lora_ranks() { return RANKS; }

// table: Part[slots][parts]. rows (group_start[groups],) int32: rows of x and y, those of a group side by side; group g are
// places group_start[g] to group_start[g + 1], and its adapter lies in slot group_slot[g].
extern "C" void paretune_lora(const void* table, int64_t parts, int is_bf16, const void* x, int64_t x_stride,
                              int64_t in_features, void* y, int64_t y_stride, const void* rows, const void* group_start,
                              const void* group_slot, int64_t groups, int threads) {
    const Call call = {(const float*)x, x_stride, in_features, (float*)y, y_stride};
    const Part* all = (const Part*)table;
    const int32_t *start = (const int32_t*)group_start, *slot = (const int32_t*)group_slot;
    const int64_t count = start[groups];
    int64_t macs = 0;
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t p = 0; p < parts; ++p) {
            const Part& part = all[slot[g] * parts + p];
            macs += (start[g + 1] - start[g]) * part.rank * (in_features + part.channels);
        }
    }
    if (macs < SERIAL_BELOW_MACS) threads = 1;
    // Enough items for all threads, each of whole tiles where one adapter has them.
    const int64_t most = 4 * ROWS;
    const int64_t height = std::max<int64_t>(ROWS, std::min<int64_t>(most, count / (4 * threads) / ROWS * ROWS));
    const int64_t chunks = (count + height - 1) / height;
    parallel_items(chunks * parts, threads, [&](int64_t item, int) {
        const int64_t first = item / parts * height, last = std::min(count, first + height);
        if (is_bf16) {
            add_rows<uint16_t>(call, all, parts, item % parts, (const int32_t*)rows, start, slot, groups, first, last);
        } else {
            add_rows<float>(call, all, parts, item % parts, (const int32_t*)rows, start, slot, groups, first, last);
        }
    });
}
