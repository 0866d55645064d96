// y = x @ weight.T + bias for packed weights: same name, shapes and reference as kernels/linear.py. Plain C interface; the caller
// owns every buffer, the functions allocate, throw and keep nothing. Rows are worked in blocks that stay in the L2 cache:
// x is packed once per block, then every weight panel is streamed past it.
#include <unistd.h>

#include <algorithm>
#include <type_traits>

#include "activations.h"
#include "expand.h"
#include "gemm_tile.h"
#include "linear.h"
#include "low_bit.h"
#include "parallel.h"

namespace paretune {
namespace {

// How a precision is computed: GROUP input channels of a panel are stored in STEP_BYTES, and multiplied by Dot with x as Pack
// lays it out.
template <class TheDot, class ThePack>
struct Direct {
    typedef TheDot Dot;
    typedef ThePack Pack;
    static constexpr bool EXPANDED = false;
    static constexpr int GROUP = Dot::GROUP, X_WORDS = Dot::X_WORDS;
    static constexpr int64_t STEP_BYTES = Dot::STEP_BYTES;
};
template <class Panel, class ThePack>
struct Expanded : Panel {
    typedef typename Panel::Dot Dot;
    typedef ThePack Pack;
    static constexpr bool EXPANDED = true;
    static constexpr int DOT_STEPS = Panel::GROUP / Dot::GROUP, X_WORDS = DOT_STEPS * Dot::X_WORDS;
};
constexpr int64_t EXPANDED_K = 512;  // input channels of a panel expanded at a time: 32 KB of bf16, which stay in the L2 cache

struct Step {  // one call, resolved
    const Weight* weight;
    Activations x;
    int64_t rows, row_tile, row_block, k_steps, k_block_steps;
    int ahead, threads;
    void* out;
    char* packed;
    char* own;  // of each thread: a block of sums, where k is blocked, and an expanded part of a panel
    int64_t own_bytes, sums_bytes;
};

// Up to LANES elements of a row of the weight's channels; the rest are zero.
template <class Vector>
Vector channels(const void* row, int64_t at, int64_t left) {
    const char* from = (const char*)row + at * 4;
    if (left >= LANES) return load_as<Vector>(from);
    Vector some = {};
    memcpy(&some, from, (size_t)left * 4);
    return some;
}

// Sums of one tile and panel become `count` channels of `rows` rows of the result.
template <class Dot, class Out>
void finish(const Step& s, const typename Dot::Out* sums, int64_t first_row, int rows, int64_t channel) {
    constexpr bool TERNARY = std::is_same<Dot, TernaryDot>::value, INT8 = std::is_same<Dot, Int8Dot>::value;
    constexpr bool ROUNDED_ROWS = TERNARY || INT8 || std::is_same<Dot, Int4Dot>::value;
    const Weight& w = *s.weight;
    for (int half = 0; half < 2; ++half) {
        const int64_t at = channel + half * LANES, left = w.n - at;
        if (left <= 0) return;
        const Floats bias = w.bias ? channels<Floats>(w.bias, at, left) : spread(0.0f);
        const Floats scale = w.scale ? channels<Floats>(w.scale, at, left) : spread(1.0f);
        Ints zero = {};
#if defined(PARETUNE_INT8_DOT)
        if (INT8) zero = channels<Ints>(w.zero_sum, at, left);
#endif
        Out* out = (Out*)s.out + first_row * w.n + at;
        for (int r = 0; r < rows; ++r, out += w.n) {
            const typename Dot::Out* from = sums + r * PANEL + half * LANES;
            Floats y;
            if constexpr (TERNARY || INT8) {
                if (TERNARY) zero = spread_int(s.x.row_sum[first_row + r]);
                y = __builtin_convertvector(load_as<Ints>(from) - zero, Floats);
            } else {
                y = load_as<Floats>(from);
            }
            y = y * (ROUNDED_ROWS ? scale * s.x.row_scale[first_row + r] : scale) + bias;
            if (left >= LANES) {
                store(out, y);
            } else {
                store_some(out, y, left);
            }
        }
    }
}

template <class Dot, int ROWS>
void tile(int64_t steps, const void* x, const void* w, typename Dot::Out* out, int64_t out_stride, bool add, int ahead) {
    if constexpr (std::is_same<Dot, Int4Dot>::value || std::is_same<Dot, TernaryDot>::value) {
        Dot::template tile<ROWS>(steps, x, w, out, out_stride, add, ahead);
    } else {
        packed_tile<Dot, ROWS>(steps, x, w, out, out_stride, add, ahead);
    }
}
#define PARETUNE_TILE(R) tile<Dot, R>

// Where a tile's sums will go, while it is computed. Each of its rows lies in a line of its own, far from the last: waiting
// for these lines took a tenth of the time of 100 rows and more (Zen 3).
inline void prefetch_result(const Step& s, int64_t first_row, int rows, int64_t channel) {
    const int64_t size = s.x.is_bf16 ? 2 : 4;
    const char* row = (const char*)s.out + (first_row * s.weight->n + channel) * size;
    for (int r = 0; r < rows; ++r, row += s.weight->n * size)
        for (int64_t at = 0; at < PANEL * size; at += 64) __builtin_prefetch(row + at, 1);
}

template <class Format>
void run(const Step& s) {
    typedef typename Format::Dot Dot;
    typedef typename Dot::Out Sum;
    static const TileFunction<Dot> tile_of_rows[] = PARETUNE_EACH_ROW_COUNT(PARETUNE_TILE);
    const int64_t panels = tiles_of(s.weight->n, PANEL), k_padded = s.k_steps * Format::GROUP;
    const int64_t row_words = s.k_steps * Format::X_WORDS;
    const bool blocked = s.k_block_steps < s.k_steps;
    for (int64_t block = 0; block < s.rows; block += s.row_block) {
        const int64_t rows = std::min(s.row_block, s.rows - block), tiles = tiles_of(rows, s.row_tile);
        uint32_t* packed = (uint32_t*)s.packed;
        const int pack_threads = rows * k_padded < 65536 ? 1 : s.threads;
        parallel_items(tiles, pack_threads, [&](int64_t tile, int) {
            int64_t begin = tile_begin(tile, tiles, rows), end = tile_begin(tile + 1, tiles, rows);
            Format::Pack::pack(s.x, block + begin, (int)(end - begin), packed + begin * row_words, k_padded);
        });
        // Few panels and many rows: the rows are shared out too, or some threads would have nothing to do.
        const int64_t row_parts = std::min(tiles, std::max<int64_t>(1, 4 * s.threads / panels));
        const int64_t together = s.threads == 1 ? panels : std::max<int64_t>(1, panels / (16 * s.threads));
        const int64_t groups = tiles_of(panels, together);
        parallel_items(groups * row_parts, s.threads, [&](int64_t item, int thread) {
            const int64_t part = item % row_parts, group = item / row_parts;
            const int64_t first_tile = part * tiles / row_parts, last_tile = (part + 1) * tiles / row_parts;
            Sum own[MAX_ROWS * PANEL];
            char* own_memory = s.own + thread * s.own_bytes;
            Sum* sums = blocked ? (Sum*)own_memory : own;
            for (int64_t panel = group * together; panel < std::min(panels, (group + 1) * together); ++panel) {
                const char* stored = s.weight->panels + panel * s.k_steps * Format::STEP_BYTES;
                for (int64_t k = 0; k < s.k_steps; k += s.k_block_steps) {
                    int64_t steps = std::min(s.k_block_steps, s.k_steps - k);
                    const bool last = k + steps == s.k_steps;
                    const char* weights = stored + k * Format::STEP_BYTES;
                    if constexpr (Format::EXPANDED) {
                        Format::expand(weights, steps, own_memory + s.sums_bytes);
                        weights = own_memory + s.sums_bytes;
                        steps *= Format::DOT_STEPS;
                    }
                    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
                        const int64_t begin = tile_begin(tile, tiles, rows);
                        const int height = (int)(tile_begin(tile + 1, tiles, rows) - begin);
                        Sum* to = blocked ? sums + begin * PANEL : sums;
                        if (last) prefetch_result(s, block + begin, height, panel * PANEL);
                        tile_of_rows[height - 1](steps, packed + begin * row_words + k * Format::X_WORDS * height, weights,
                                                 to, PANEL, k > 0, s.ahead);
                        if (!last) continue;
                        if (s.x.is_bf16) {
                            finish<Dot, uint16_t>(s, to, block + begin, height, panel * PANEL);
                        } else {
                            finish<Dot, float>(s, to, block + begin, height, panel * PANEL);
                        }
                    }
                }
            }
        });
    }
}

int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return found;
#endif
    return 1 << 20;
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Sizes and cuts a call, then computes it; what paretune_linear says.
struct Call {
    const Weight& weight;
    const void* x;
    int x_is_bf16;
    int64_t x_row_stride, rows;
    void* out;
    int row_tile, row_block, k_block, prefetch_bytes, serial_below_kmacs;
    char* workspace;
    int64_t workspace_bytes;
    int threads;

    template <class Format>
    int64_t linear(int best_row_tile) const {
        typedef typename Format::Dot Dot;
        Step s;
        s.weight = &weight;
        s.out = out;
        s.rows = rows;
        s.row_tile = row_tile > 0 ? row_tile : best_row_tile;
        s.k_steps = tiles_of(weight.k, Format::GROUP);
        int64_t k_block_steps = k_block > 0 ? tiles_of(k_block, Format::GROUP) : s.k_steps;
        if (Format::EXPANDED) k_block_steps = std::min(k_block_steps, EXPANDED_K / Format::GROUP);
        s.k_block_steps = std::min(s.k_steps, k_block_steps);
        const int64_t row_bytes = s.k_steps * Format::X_WORDS * 4;
        int64_t block = row_block > 0 ? row_block : std::max<int64_t>(8 * s.row_tile, l2_bytes() / 2 / row_bytes);
        s.row_block = std::min(rows, std::max(s.row_tile, block / s.row_tile * s.row_tile));
        s.ahead = prefetch_bytes;
        s.threads = rows * weight.n * weight.k < (int64_t)serial_below_kmacs * 1000 ? 1 : std::max(1, threads);
        s.sums_bytes = s.k_block_steps < s.k_steps ? s.row_block * PANEL * 4 : 0;
        s.own_bytes = s.sums_bytes + (Format::EXPANDED ? s.k_block_steps * (Format::GROUP / Dot::GROUP) * Dot::STEP_BYTES : 0);
        const int64_t packed_bytes = round_up(s.row_block * row_bytes, 64), row_number_bytes = round_up(rows * 4, 64);
        const int64_t needed = packed_bytes + 2 * row_number_bytes + s.threads * s.own_bytes;
        if (workspace_bytes < needed) return needed;
        s.packed = workspace;
        char* row_numbers = workspace + packed_bytes;
        s.x = {x, x_is_bf16 != 0, x_row_stride, weight.k, (float*)row_numbers, (int32_t*)(row_numbers + row_number_bytes)};
        s.own = row_numbers + 2 * row_number_bytes;
        run<Format>(s);
        return 0;
    }
};

}  // namespace
}  // namespace paretune

using namespace paretune;

extern "C" int paretune_lanes() { return LANES; }
extern "C" int paretune_max_row_tile() { return MAX_ROWS; }
extern "C" const char* paretune_instructions() {
    return
#if defined(PARETUNE_AVX512)
        "avx512"
#elif defined(__AVX2__)
        "avx2"
#else
        "generic"
#endif
#if defined(PARETUNE_BF16_DOT)
        " bf16"
#endif
#if defined(PARETUNE_INT8_DOT)
        " vnni"
#endif
        ;
}

// Returns 0; the bytes of workspace it needs, where `workspace_bytes` are too few (nothing is computed then); or -1 where
// row_tile is larger than paretune_max_row_tile().
extern "C" int64_t paretune_linear(const void* weight, const void* x, int x_is_bf16, int64_t x_row_stride, int64_t rows,
                                   void* out, int row_tile, int row_block, int k_block, int prefetch_bytes,
                                   int serial_below_kmacs, void* workspace, int64_t workspace_bytes, int threads) {
    const Weight& w = *(const Weight*)weight;
    if (row_tile > MAX_ROWS) return -1;
    if (rows == 0) return 0;
    const Call call = {w,       x,       x_is_bf16,      x_row_stride,       rows,
                       out,     row_tile, row_block,     k_block,            prefetch_bytes,
                       serial_below_kmacs, (char*)workspace, workspace_bytes, threads};
    switch (w.precision) {
        case 0: return call.linear<Direct<Fp32Dot, PackFp32>>(MAX_ROWS);
        case 1: return call.linear<Direct<Bf16Dot, PackBf16>>(BF16_ROWS);
        case 2: return call.linear<Direct<Int8Dot, PackInt8>>(MAX_ROWS);
        case 3: return call.linear<Direct<Int4Dot, PackInt4>>(INT4_ROWS);
        case 4: return call.linear<Direct<TernaryDot, PackTernary>>(TERNARY_ROWS);
        case 5: return call.linear<Expanded<Fp16Panel, PackFp32>>(MAX_ROWS);
        case 6: return call.linear<Expanded<Fp8Panel, PackBf16>>(BF16_ROWS);
        case 7: return call.linear<Expanded<Fp4Panel<16, false>, PackBf16>>(BF16_ROWS);
        default: return call.linear<Expanded<Fp4Panel<32, true>, PackBf16>>(BF16_ROWS);
    }
}
