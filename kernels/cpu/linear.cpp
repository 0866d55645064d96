// y = x @ weight.T + bias for packed weights: same name, shapes and reference as kernels/linear.py. Plain C interface; the caller
// owns every buffer, the functions allocate, throw and keep nothing. Rows are worked in blocks that stay in the L2 cache:
// x is packed once per block, then every weight panel is streamed past it.
#include <unistd.h>

#include <algorithm>
#include <type_traits>

#include "gemm_tile.h"
#include "parallel.h"

namespace paretune {
namespace {

struct Weight {  // kernels/linear.py: _Weight
    const char* panels;
    const float* scale;       // (n,) int8 only
    const int32_t* zero_sum;  // (n,) 128 * sum of a channel's weights, int8 only
    const float* bias;        // (n,) or null
    int64_t n, k, precision;  // precision: 0 fp32, 1 bf16, 2 int8
};

struct Activations {
    const void* data;
    bool is_bf16;
    int64_t row_stride;  // elements
};

struct Step {  // one call, resolved
    const Weight* weight;
    Activations x;
    int64_t rows, row_tile, row_block, k_steps, k_block_steps;
    int ahead, threads;
    void* out;
    char* packed;
    float* row_scale;
    char* sums;  // one block of sums per thread, where k is blocked
    int64_t sums_bytes;
};

const float* row_as_floats(const Activations& x, int64_t row, int64_t k, int64_t first, int64_t count, float* copy) {
    if (!x.is_bf16) {
        const float* source = (const float*)x.data + row * x.row_stride + first;
        if (first + count <= k) return source;
        std::copy(source, source + (k - first), copy);
    } else {
        const uint16_t* source = (const uint16_t*)x.data + row * x.row_stride + first;
        int64_t i = 0, end = std::min(count, k - first);
        for (; i + LANES <= end; i += LANES) store(copy + i, load(source + i));
        for (; i < end; ++i) copy[i] = to_float(source[i]);
    }
    for (int64_t i = k - first; i < count; ++i) copy[i] = 0;
    return copy;
}

constexpr int64_t STRETCH = 256;  // channels of x packed at a time: 1 KB of fp32, well inside the L1 cache

// Rows [first, first + rows) of x into dst: [steps][rows] words.
struct PackFp32 {
    static void pack(const Step& s, int64_t first, int rows, uint32_t* dst, int64_t k_padded) {
        float copy[STRETCH];
        for (int64_t k = 0; k < k_padded; k += STRETCH) {
            int64_t count = std::min(STRETCH, k_padded - k);
            for (int r = 0; r < rows; ++r) {
                const float* source = row_as_floats(s.x, first + r, s.weight->k, k, count, copy);
                float* to = (float*)dst + k * rows + r;
                if (rows == 1) {
                    memcpy(to, source, (size_t)count * 4);
                } else {
                    for (int64_t i = 0; i < count; ++i) to[i * rows] = source[i];
                }
            }
        }
    }
};

struct PackBf16 {
    static void pack(const Step& s, int64_t first, int rows, uint32_t* dst, int64_t k_padded) {
#if defined(PARETUNE_BF16_DOT)
        float copy[STRETCH];
        uint16_t halves[STRETCH];
        for (int64_t k = 0; k < k_padded; k += STRETCH) {
            int64_t count = std::min(STRETCH, k_padded - k);
            for (int r = 0; r < rows; ++r) {
                const uint16_t* pairs = halves;
                if (s.x.is_bf16 && k + count <= s.weight->k) {
                    pairs = (const uint16_t*)s.x.data + (first + r) * s.x.row_stride + k;
                } else {
                    const float* source = row_as_floats(s.x, first + r, s.weight->k, k, count, copy);
                    int64_t i = 0;
                    for (; i + LANES <= count; i += LANES) store(halves + i, load(source + i));
                    for (; i < count; ++i) halves[i] = to_bf16(source[i]);
                }
                uint32_t* to = dst + k / 2 * rows + r;
                if (rows == 1) {
                    memcpy(to, pairs, (size_t)count * 2);
                } else {
                    for (int64_t i = 0; i < count / 2; ++i) memcpy(to + i * rows, pairs + 2 * i, 4);
                }
            }
        }
#else
        PackFp32::pack(s, first, rows, dst, k_padded);
#endif
    }
};

struct PackInt8 {
    static void pack(const Step& s, int64_t first, int rows, uint32_t* dst, int64_t k_padded) {
        float copy[STRETCH];
        const int64_t depth = s.weight->k;
        for (int r = 0; r < rows; ++r) {
            Floats most = spread(0.0f);
            float most_tail = 0;
            for (int64_t k = 0; k < depth; k += STRETCH) {
                int64_t count = std::min(STRETCH, depth - k), i = 0;
                const float* source = row_as_floats(s.x, first + r, depth, k, count, copy);
                for (; i + LANES <= count; i += LANES) most = larger(magnitude(load(source + i)), most);
                for (; i < count; ++i) most_tail = std::max(most_tail, __builtin_fabsf(source[i]));
            }
            for (int i = 0; i < LANES; ++i) most_tail = std::max(most_tail, (float)most[i]);
            const float scale = most_tail / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
            s.row_scale[first + r] = scale;
            const float round_bits = 12582912.0f;  // 1.5 * 2**23: rounds to nearest even
            for (int64_t k = 0; k < k_padded; k += STRETCH) {
                int64_t count = std::min(STRETCH, k_padded - k);
                const float* source = row_as_floats(s.x, first + r, depth, k, count, copy);
                int32_t whole[STRETCH];
                int64_t i = 0;
                for (; i + LANES <= count; i += LANES) {
                    Floats shifted = load(source + i) * inverse + round_bits;
                    store_as(whole + i, (Ints)shifted - (Ints)spread(round_bits));
                }
                for (; i < count; ++i) whole[i] = (int32_t)__builtin_rintf(source[i] * inverse);
#if defined(PARETUNE_INT8_DOT)
                uint32_t* to = dst + k / 4 * rows + r;
                uint8_t bytes[STRETCH];
                for (i = 0; i < count; ++i) bytes[i] = (uint8_t)(whole[i] + 128);
                for (i = 0; i < count / 4; ++i) memcpy(to + i * rows, bytes + 4 * i, 4);
#else
                uint32_t* to = dst + k / 2 * rows + r;
                for (i = 0; i < count; i += 4, to += 2 * rows) {
                    to[0] = (uint32_t)(whole[i] & 0xffff) | (uint32_t)whole[i + 2] << 16;
                    to[rows] = (uint32_t)(whole[i + 1] & 0xffff) | (uint32_t)whole[i + 3] << 16;
                }
#endif
            }
        }
    }
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
template <class Out, class Sum>
void finish(const Step& s, const Sum* sums, int64_t first_row, int rows, int64_t channel) {
    const Weight& w = *s.weight;
    for (int half = 0; half < 2; ++half) {
        const int64_t at = channel + half * LANES, left = w.n - at;
        if (left <= 0) return;
        const Floats bias = w.bias ? channels<Floats>(w.bias, at, left) : spread(0.0f);
        Floats scale = {};
        Ints zero = {};
        if (std::is_same<Sum, int32_t>::value) {
            scale = channels<Floats>(w.scale, at, left);
#if defined(PARETUNE_INT8_DOT)
            zero = channels<Ints>(w.zero_sum, at, left);
#endif
        }
        Out* out = (Out*)s.out + first_row * w.n + at;
        for (int r = 0; r < rows; ++r, out += w.n) {
            const Sum* from = sums + r * PANEL + half * LANES;
            Floats y;
            if constexpr (std::is_same<Sum, int32_t>::value) {
                y = __builtin_convertvector(load_as<Ints>(from) - zero, Floats) * (scale * s.row_scale[first_row + r]) + bias;
            } else {
                y = load_as<Floats>(from) + bias;
            }
            if (left >= LANES) {
                store(out, y);
            } else {
                store_some(out, y, left);
            }
        }
    }
}

#define PARETUNE_PACKED(R) packed_tile<Dot, R>

template <class Dot, class Pack>
void run(const Step& s) {
    static const TileFunction<Dot> tile_of_rows[] = PARETUNE_EACH_ROW_COUNT(PARETUNE_PACKED);
    typedef typename Dot::Out Sum;
    const int64_t panels = tiles_of(s.weight->n, PANEL), k_padded = s.k_steps * Dot::GROUP;
    const int64_t step_bytes = (int64_t)PANEL * Dot::GROUP * Dot::BYTES, row_words = s.k_steps * Dot::X_WORDS;
    for (int64_t block = 0; block < s.rows; block += s.row_block) {
        const int64_t rows = std::min(s.row_block, s.rows - block), tiles = tiles_of(rows, s.row_tile);
        uint32_t* packed = (uint32_t*)s.packed;
        const int pack_threads = rows * k_padded < 65536 ? 1 : s.threads;
        parallel_items(tiles, pack_threads, [&](int64_t tile, int) {
            int64_t begin = tile_begin(tile, tiles, rows), end = tile_begin(tile + 1, tiles, rows);
            Pack::pack(s, block + begin, (int)(end - begin), packed + begin * row_words, k_padded);
        });
        // Few panels and many rows: the rows are shared out too, or some threads would have nothing to do.
        const int64_t row_parts = std::min(tiles, std::max<int64_t>(1, 4 * s.threads / panels));
        const int64_t together = s.threads == 1 ? panels : std::max<int64_t>(1, panels / (16 * s.threads));
        const int64_t groups = tiles_of(panels, together);
        parallel_items(groups * row_parts, s.threads, [&](int64_t item, int thread) {
            const int64_t part = item % row_parts, group = item / row_parts;
            const int64_t first_tile = part * tiles / row_parts, last_tile = (part + 1) * tiles / row_parts;
            Sum own[MAX_ROWS * PANEL];
            const bool blocked = s.k_block_steps < s.k_steps;
            Sum* sums = blocked ? (Sum*)(s.sums + thread * s.sums_bytes) : own;
            for (int64_t panel = group * together; panel < std::min(panels, (group + 1) * together); ++panel) {
                const char* weights = s.weight->panels + panel * s.k_steps * step_bytes;
                for (int64_t k = 0; k < s.k_steps; k += s.k_block_steps) {
                    const int64_t steps = std::min(s.k_block_steps, s.k_steps - k);
                    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
                        const int64_t begin = tile_begin(tile, tiles, rows);
                        const int height = (int)(tile_begin(tile + 1, tiles, rows) - begin);
                        Sum* to = blocked ? sums + begin * PANEL : sums;
                        tile_of_rows[height - 1](steps, packed + begin * row_words + k * Dot::X_WORDS * height,
                                                 weights + k * step_bytes, to, PANEL, k > 0, s.ahead);
                        if (k + steps < s.k_steps) continue;
                        if (s.x.is_bf16) {
                            finish<uint16_t>(s, to, block + begin, height, panel * PANEL);
                        } else {
                            finish<float>(s, to, block + begin, height, panel * PANEL);
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
    const int group = w.precision == 0 ? 1 : w.precision == 1 ? 2 : 4;
    const int words = w.precision == 0 ? 1 : w.precision == 1 ? BF16_X_WORDS : INT8_X_WORDS;
    Step s;
    s.weight = &w;
    s.x = {x, x_is_bf16 != 0, x_row_stride};
    s.out = out;
    s.rows = rows;
    s.row_tile = row_tile > 0 ? row_tile : w.precision == 1 ? BF16_ROWS : MAX_ROWS;
    s.k_steps = (w.k + group - 1) / group;
    s.k_block_steps = k_block > 0 ? std::min<int64_t>(s.k_steps, (k_block + group - 1) / group) : s.k_steps;
    const int64_t row_bytes = s.k_steps * words * 4;
    int64_t block = row_block > 0 ? row_block : std::max<int64_t>(8 * s.row_tile, l2_bytes() / 2 / row_bytes);
    s.row_block = std::min(rows, std::max(s.row_tile, block / s.row_tile * s.row_tile));
    s.ahead = prefetch_bytes;
    s.threads = rows * w.n * w.k < (int64_t)serial_below_kmacs * 1000 ? 1 : std::max(1, threads);
    s.sums_bytes = s.k_block_steps < s.k_steps ? s.row_block * PANEL * 4 : 0;
    const int64_t packed_bytes = round_up(s.row_block * row_bytes, 64), scale_bytes = round_up(rows * 4, 64);
    const int64_t needed = packed_bytes + scale_bytes + s.threads * s.sums_bytes;
    if (workspace_bytes < needed) return needed;
    s.packed = (char*)workspace;
    s.row_scale = (float*)(s.packed + packed_bytes);
    s.sums = (char*)s.row_scale + scale_bytes;
    if (w.precision == 0) {
        run<Fp32Dot, PackFp32>(s);
    } else if (w.precision == 1) {
        run<Bf16Dot, PackBf16>(s);
    } else {
        run<Int8Dot, PackInt8>(s);
    }
    return 0;
}
