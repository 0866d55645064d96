// Register tiles: ROWS x PANEL sums of x * w over `steps` steps, the inner loop of `linear` and of prefill attention.
// Weights come in panels of PANEL channels with 1 (fp32), 2 (bf16) or 4 (int8) input channels side by side:
// [steps][PANEL][group]. x comes through `Index`: element (row, step) of 4 bytes, packed as the dot instruction eats it.
#pragma once
#include "simd.h"

namespace paretune {

#if defined(PARETUNE_AVX512)
constexpr int MAX_ROWS = 12;  // 24 sums, 2 weights, 1 broadcast of 32 registers
#elif defined(__aarch64__)
constexpr int MAX_ROWS = 6;
#else
constexpr int MAX_ROWS = 6;  // 12 sums, 2 weights, 1 broadcast of 16 registers
#endif

// bf16 without a dot instruction multiplies in fp32: x then stays fp32, two elements a step.
#if defined(PARETUNE_BF16_DOT)
constexpr int BF16_X_WORDS = 1;
#else
constexpr int BF16_X_WORDS = 2;
#endif
// With 16 registers, bf16 halves and their mask leave room for 5 rows: with 6 GCC 12 spills sums (AVX2: 70 instead of 93
// GFLOP/s per thread of a Zen 4).
#if defined(__x86_64__) && !defined(PARETUNE_AVX512)
constexpr int BF16_ROWS = 5;
#else
constexpr int BF16_ROWS = MAX_ROWS;
#endif
// int8 without VNNI multiplies int16 pairs (k, k+2) and (k+1, k+3): sums of two products fit int32, where maddubs on bytes
// would saturate at 32767. With VNNI x is unsigned, shifted by 128, and linear.cpp takes 128 * sum(w) off again.
#if defined(PARETUNE_INT8_DOT)
constexpr int INT8_X_WORDS = 1;
#else
constexpr int INT8_X_WORDS = 2;
#endif

template <int ROWS>
struct PackedRows {  // [steps][ROWS]
    static inline int64_t at(int row, int64_t step) { return step * ROWS + row; }
};
template <int STRIDE>
struct StridedRows {  // [ROWS][STRIDE]
    static inline int64_t at(int row, int64_t step) { return row * STRIDE + step; }
};

struct Fp32Dot {
    typedef Floats Sum;
    typedef float Out;
    static constexpr int X_WORDS = 1, GROUP = 1, BYTES = 4;
    static constexpr int64_t STEP_BYTES = (int64_t)PANEL * GROUP * BYTES;
    template <int ROWS, class Index>
    static inline void step(Sum (*sums)[2], const void* x, const char* w, int64_t s) {
        Floats w0 = load_as<Floats>(w), w1 = load_as<Floats>(w + sizeof w0);
        for (int r = 0; r < ROWS; ++r) {
            Floats b = spread(((const float*)x)[Index::at(r, s)]);
            sums[r][0] += b * w0;
            sums[r][1] += b * w1;
        }
    }
};

struct Bf16Dot {
    typedef Floats Sum;
    typedef float Out;
    static constexpr int X_WORDS = BF16_X_WORDS, GROUP = 2, BYTES = 2;
    static constexpr int64_t STEP_BYTES = (int64_t)PANEL * GROUP * BYTES;
    template <int ROWS, class Index>
    static inline void step(Sum (*sums)[2], const void* x, const char* w, int64_t s) {
#if defined(PARETUNE_BF16_DOT)
        __m512bh w0 = (__m512bh)load_as<__m512i>(w), w1 = (__m512bh)load_as<__m512i>(w + 64);
        for (int r = 0; r < ROWS; ++r) {
            __m512bh b = (__m512bh)_mm512_set1_epi32(((const int32_t*)x)[Index::at(r, s)]);
            sums[r][0] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][0], w0, b);
            sums[r][1] = (Floats)_mm512_dpbf16_ps((__m512)sums[r][1], w1, b);
        }
#else
        Words w0 = load_as<Words>(w), w1 = load_as<Words>(w + sizeof w0);
        Floats even0 = (Floats)(w0 << 16), even1 = (Floats)(w1 << 16);
        for (int r = 0; r < ROWS; ++r) {
            Floats b = spread(((const float*)x)[Index::at(r, 2 * s)]);
            sums[r][0] += b * even0;
            sums[r][1] += b * even1;
        }
        Floats odd0 = (Floats)(w0 & 0xffff0000u), odd1 = (Floats)(w1 & 0xffff0000u);
        for (int r = 0; r < ROWS; ++r) {
            Floats b = spread(((const float*)x)[Index::at(r, 2 * s + 1)]);
            sums[r][0] += b * odd0;
            sums[r][1] += b * odd1;
        }
#endif
    }
};

struct Int8Dot {
    typedef Ints Sum;
    typedef int32_t Out;
    static constexpr int X_WORDS = INT8_X_WORDS, GROUP = 4, BYTES = 1;
    static constexpr int64_t STEP_BYTES = (int64_t)PANEL * GROUP * BYTES;
    template <int ROWS, class Index>
    static inline void step(Sum (*sums)[2], const void* x, const char* w, int64_t s) {
        const int32_t* words = (const int32_t*)x;
#if defined(PARETUNE_INT8_DOT)
        __m512i w0 = load_as<__m512i>(w), w1 = load_as<__m512i>(w + 64);
        for (int r = 0; r < ROWS; ++r) {
            __m512i b = _mm512_set1_epi32(words[Index::at(r, s)]);
            sums[r][0] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[r][0], b, w0);
            sums[r][1] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[r][1], b, w1);
        }
#elif defined(PARETUNE_AVX512)
        __m512i w0 = load_as<__m512i>(w), w1 = load_as<__m512i>(w + 64);
        __m512i even0 = _mm512_srai_epi16(_mm512_slli_epi16(w0, 8), 8), odd0 = _mm512_srai_epi16(w0, 8);
        __m512i even1 = _mm512_srai_epi16(_mm512_slli_epi16(w1, 8), 8), odd1 = _mm512_srai_epi16(w1, 8);
        for (int r = 0; r < ROWS; ++r) {
            __m512i e = _mm512_set1_epi32(words[Index::at(r, 2 * s)]);
            __m512i o = _mm512_set1_epi32(words[Index::at(r, 2 * s + 1)]);
            sums[r][0] += (Ints)_mm512_madd_epi16(even0, e) + (Ints)_mm512_madd_epi16(odd0, o);
            sums[r][1] += (Ints)_mm512_madd_epi16(even1, e) + (Ints)_mm512_madd_epi16(odd1, o);
        }
#elif defined(__AVX2__)
        __m256i w0 = load_as<__m256i>(w), w1 = load_as<__m256i>(w + 32);
        __m256i even0 = _mm256_srai_epi16(_mm256_slli_epi16(w0, 8), 8);
        __m256i even1 = _mm256_srai_epi16(_mm256_slli_epi16(w1, 8), 8);
        for (int r = 0; r < ROWS; ++r) {
            __m256i e = _mm256_set1_epi32(words[Index::at(r, 2 * s)]);
            sums[r][0] += (Ints)_mm256_madd_epi16(even0, e);
            sums[r][1] += (Ints)_mm256_madd_epi16(even1, e);
        }
        __m256i odd0 = _mm256_srai_epi16(w0, 8), odd1 = _mm256_srai_epi16(w1, 8);
        for (int r = 0; r < ROWS; ++r) {
            __m256i o = _mm256_set1_epi32(words[Index::at(r, 2 * s + 1)]);
            sums[r][0] += (Ints)_mm256_madd_epi16(odd0, o);
            sums[r][1] += (Ints)_mm256_madd_epi16(odd1, o);
        }
#else
        for (int half = 0; half < 2; ++half) {
            Ints v = load_as<Ints>(w + half * sizeof(Ints));
            Ints w0 = (Ints)((Words)v << 24) >> 24, w1 = (Ints)((Words)v << 16) >> 24;
            Ints w2 = (Ints)((Words)v << 8) >> 24, w3 = v >> 24;
            for (int r = 0; r < ROWS; ++r) {
                int32_t e = words[Index::at(r, 2 * s)], o = words[Index::at(r, 2 * s + 1)];
                sums[r][half] += w0 * (int32_t)(int16_t)e + w2 * (e >> 16) + w1 * (int32_t)(int16_t)o + w3 * (o >> 16);
            }
        }
#endif
    }
};

// out[row][0 .. PANEL) (+)= sums; rows of out are out_stride apart. `ahead` bytes of weights are prefetched.
// Few rows are few independent sums: these are doubled, or each step would wait for the one before (6 cycles on Zen 4).
template <class Dot, int ROWS, class Index>
static inline void tile_body(int64_t steps, const void* x, const void* weights, typename Dot::Out* out, int64_t out_stride,
                             bool add, int ahead) {
    constexpr int COPIES = ROWS == 1 ? 4 : ROWS <= 3 ? 2 : 1;
    typedef typename Dot::Sum Sum;
    Sum sums[COPIES][ROWS][2] = {};
    const char* w = (const char*)weights;
    constexpr int64_t STEP_BYTES = Dot::STEP_BYTES;
    int64_t s = 0;
    for (; s + COPIES <= steps; s += COPIES) {
#pragma GCC unroll 4
        for (int c = 0; c < COPIES; ++c, w += STEP_BYTES) {
            __builtin_prefetch(w + ahead);
            if (STEP_BYTES > 64) __builtin_prefetch(w + ahead + 64);
            Dot::template step<ROWS, Index>(sums[c], x, w, s + c);
        }
    }
    for (; s < steps; ++s, w += STEP_BYTES) Dot::template step<ROWS, Index>(sums[0], x, w, s);
    for (int r = 0; r < ROWS; ++r) {
        typename Dot::Out* row = out + r * out_stride;
        for (int half = 0; half < 2; ++half) {
            Sum total = sums[0][r][half];
            for (int c = 1; c < COPIES; ++c) total += sums[c][r][half];
            if (add) total += load_as<Sum>(row + half * LANES);
            store_as(row + half * LANES, total);
        }
    }
}

template <class Dot>
using TileFunction = void (*)(int64_t, const void*, const void*, typename Dot::Out*, int64_t, bool, int);

template <class Dot, int ROWS>
static void packed_tile(int64_t steps, const void* x, const void* w, typename Dot::Out* out, int64_t out_stride, bool add,
                        int ahead) {
    tile_body<Dot, ROWS, PackedRows<ROWS>>(steps, x, w, out, out_stride, add, ahead);
}
template <class Dot, int ROWS, int STRIDE>
static void strided_tile(int64_t steps, const void* x, const void* w, typename Dot::Out* out, int64_t out_stride, bool add,
                         int ahead) {
    tile_body<Dot, ROWS, StridedRows<STRIDE>>(steps, x, w, out, out_stride, add, ahead);
}

#if defined(PARETUNE_AVX512)
#define PARETUNE_EACH_ROW_COUNT(F) {F(1), F(2), F(3), F(4), F(5), F(6), F(7), F(8), F(9), F(10), F(11), F(12)}
#else
#define PARETUNE_EACH_ROW_COUNT(F) {F(1), F(2), F(3), F(4), F(5), F(6)}
#endif

// Where `count` rows are cut into tiles of at most `most`: as even as can be, so that no tile is nearly empty.
static inline int64_t tiles_of(int64_t count, int64_t most) { return (count + most - 1) / most; }
static inline int64_t tile_begin(int64_t tile, int64_t tiles, int64_t count) { return tile * count / tiles; }

}  // namespace paretune
