// Dot products of weights below eight bits, stored unsigned, with signed int8 activations: [4 input channels] words of x, each
// multiplied with the four bytes of a channel. The shift of the weights (8, 1) times the sum of x comes off again:
// int4 begins each group's sums with it, ternary leaves it to linear.cpp.
#pragma once
#include "gemm_tile.h"

namespace paretune {

#if defined(PARETUNE_AVX512)
constexpr int INT4_ROWS = 12, TERNARY_ROWS = 12;
#else
constexpr int INT4_ROWS = 4, TERNARY_ROWS = 4;
#endif

// sum + the dot products of four unsigned weights (at most 15) with four int8 of x, in each lane. Without a dot instruction two
// products are summed in int16, at most 2 * 15 * 127, which does not saturate.
static inline Ints dot4(Ints sum, Ints weights, int32_t x) {
#if defined(PARETUNE_INT8_DOT)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(x));
#elif defined(PARETUNE_AVX512)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)weights, _mm512_set1_epi32(x));
    return sum + (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)weights, _mm256_set1_epi32(x));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    for (int byte = 0; byte < 4; ++byte) sum += (weights >> (8 * byte) & 0xff) * (int32_t)(int8_t)(x >> (8 * byte));
    return sum;
#endif
}

// The same for `QUADS` words of weights and x, which lie `stride` apart. AVX2 adds up to eight int16 pairs before it widens them:
// 8 * 2 * 15 * 127 < 2**15.
template <int QUADS>
static inline Ints dot_quads(Ints sum, const Ints* weights, const int32_t* x, int64_t stride) {
#if defined(__AVX2__) && !defined(PARETUNE_AVX512)
    static_assert(QUADS <= 8, "int16 would overflow");
    __m256i pairs = _mm256_maddubs_epi16((__m256i)weights[0], _mm256_set1_epi32(x[0]));
#pragma GCC unroll 8
    for (int q = 1; q < QUADS; ++q)
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)weights[q], _mm256_set1_epi32(x[q * stride])));
    return sum + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
#pragma GCC unroll 8
    for (int q = 0; q < QUADS; ++q) sum = dot4(sum, weights[q], x[q * stride]);
    return sum;
#endif
}

// A step is a group of 64 input channels with one scale a channel: [PANEL] bf16 scales, then [8][PANEL][4] bytes, each with
// input channel 8 i + j in its low and 8 i + 4 + j in its high half, as value + 8. x: [1 + 16][ROWS] words, first -8 times
// the group's sum.
struct Int4Dot {
    typedef Floats Sum;
    typedef float Out;
    static constexpr int GROUP = 64, X_WORDS = 17;
    static constexpr int64_t STEP_BYTES = PANEL * (2 + GROUP / 2);

    template <int ROWS>
    static inline void tile(int64_t steps, const void* x, const void* weights, float* out, int64_t out_stride, bool add,
                            int ahead) {
        const int32_t* words = (const int32_t*)x;
        const char* w = (const char*)weights;
        Floats sums[ROWS][2] = {};
        for (int64_t s = 0; s < steps; ++s, words += X_WORDS * ROWS) {
            const char* scales = w;
            __builtin_prefetch(w + ahead);
            w += PANEL * 2;
            Ints group[ROWS][2];
            for (int r = 0; r < ROWS; ++r) group[r][0] = group[r][1] = spread_int(words[r]);
            const int32_t* quads = words + ROWS;
            for (int i = 0; i < GROUP / 8; i += 2, quads += 4 * ROWS, w += PANEL * 8) {
                __builtin_prefetch(w + ahead);
                __builtin_prefetch(w + ahead + 64);
                if (PANEL * 8 > 128) __builtin_prefetch(w + ahead + 128), __builtin_prefetch(w + ahead + 192);
                for (int half = 0; half < 2; ++half) {
                    const Ints first = load_as<Ints>(w + half * sizeof(Ints));
                    const Ints second = load_as<Ints>(w + PANEL * 4 + half * sizeof(Ints));
                    const Ints four[4] = {first & 0x0f0f0f0f, (first >> 4) & 0x0f0f0f0f, second & 0x0f0f0f0f,
                                          (second >> 4) & 0x0f0f0f0f};
#pragma GCC unroll 12
                    for (int r = 0; r < ROWS; ++r) group[r][half] = dot_quads<4>(group[r][half], four, quads + r, ROWS);
                }
            }
            for (int half = 0; half < 2; ++half) {
                const Floats scale = load((const uint16_t*)scales + half * LANES);
                for (int r = 0; r < ROWS; ++r) sums[r][half] += __builtin_convertvector(group[r][half], Floats) * scale;
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int half = 0; half < 2; ++half) {
                float* to = out + r * out_stride + half * LANES;
                store(to, add ? sums[r][half] + load(to) : sums[r][half]);
            }
        }
    }
};

// A step is 16 input channels: [PANEL][4] bytes, each with input channels j, 4 + j, 8 + j and 12 + j in bits 0-1, 2-3, 4-5, 6-7, as
// value + 1. x: [4][ROWS] words.
struct TernaryDot {
    typedef Ints Sum;
    typedef int32_t Out;
    static constexpr int GROUP = 16, X_WORDS = 4;
    static constexpr int64_t STEP_BYTES = PANEL * 4;

    template <int ROWS>
    static inline void tile(int64_t steps, const void* x, const void* weights, int32_t* out, int64_t out_stride, bool add,
                            int ahead) {
        const int32_t* words = (const int32_t*)x;
        const char* w = (const char*)weights;
        Ints sums[ROWS][2] = {};
        for (int64_t s = 0; s < steps; ++s, words += X_WORDS * ROWS, w += STEP_BYTES) {
            __builtin_prefetch(w + ahead);
            if (STEP_BYTES > 64) __builtin_prefetch(w + ahead + 64);
            for (int half = 0; half < 2; ++half) {
                const Ints packed = load_as<Ints>(w + half * sizeof(Ints));
                const Ints four[4] = {packed & 0x03030303, (packed >> 2) & 0x03030303, (packed >> 4) & 0x03030303,
                                      (packed >> 6) & 0x03030303};
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; ++r) sums[r][half] = dot_quads<4>(sums[r][half], four, words + r, ROWS);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int half = 0; half < 2; ++half) {
                int32_t* to = out + r * out_stride + half * LANES;
                store_as(to, add ? sums[r][half] + load_as<Ints>(to) : sums[r][half]);
            }
        }
    }
};

}  // namespace paretune
