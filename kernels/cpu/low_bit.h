// Dot products of weights below eight bits, stored unsigned, with signed int8 activations: [4 input channels] words of x, each
// multiplied with the four bytes of a channel. The shift of the weights (8, 1) times the sum of x comes off again:
// int4 begins each group's sums with it, ternary leaves it to linear.cpp.
#pragma once
#include "gemm_tile.h"

namespace paretune {

#if defined(PARETUNE_AVX512)
constexpr int INT4_ROWS = 8, TERNARY_ROWS = 8;  // of 6, 8 and 12 the fastest at 16 and 64 rows, within 10 % (Zen 4)
#else
constexpr int INT4_ROWS = 4, TERNARY_ROWS = 4;
#endif

// sums[row][half] += the products of a word of weights for each channel, [PANEL] at w, with x: [8 / BITS][ROWS] words of four int8.
// The weights are at most 15: without a dot instruction all products of a word, at most 4 * 2 * 15 * 127 a lane, are summed
// in int16 first, which does not saturate.
template <int ROWS, int BITS>
static inline void dot_word(Ints (*sums)[2], const char* w, const int32_t* x) {
    constexpr int QUADS = 8 / BITS;
    constexpr int32_t MASK = 0x01010101 * ((1 << BITS) - 1);
#if defined(PARETUNE_INT8_DOT)
    const Ints words[2] = {load_as<Ints>(w), load_as<Ints>(w + sizeof(Ints))};
#pragma GCC unroll 4
    for (int q = 0; q < QUADS; ++q) {
        const Ints first = (words[0] >> (BITS * q)) & MASK, second = (words[1] >> (BITS * q)) & MASK;
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
            const __m512i b = _mm512_set1_epi32(x[q * ROWS + r]);
            sums[r][0] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[r][0], (__m512i)first, b);
            sums[r][1] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[r][1], (__m512i)second, b);
        }
    }
#else
    for (int half = 0; half < 2; ++half) {
        const Ints word = load_as<Ints>(w + half * sizeof(Ints));
        Ints quads[QUADS];
        for (int q = 0; q < QUADS; ++q) quads[q] = (word >> (BITS * q)) & MASK;
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; ++r) {
#if defined(PARETUNE_AVX512)
            __m512i pairs = _mm512_setzero_si512();
#pragma GCC unroll 4
            for (int q = 0; q < QUADS; ++q)
                pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16((__m512i)quads[q], _mm512_set1_epi32(x[q * ROWS + r])));
            sums[r][half] += (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
            __m256i pairs = _mm256_maddubs_epi16((__m256i)quads[0], _mm256_set1_epi32(x[r]));
#pragma GCC unroll 4
            for (int q = 1; q < QUADS; ++q)
                pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)quads[q], _mm256_set1_epi32(x[q * ROWS + r])));
            sums[r][half] += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
            for (int q = 0; q < QUADS; ++q)
                for (int byte = 0; byte < 4; ++byte)
                    sums[r][half] += (quads[q] >> (8 * byte) & 0xff) * (int32_t)(int8_t)(x[q * ROWS + r] >> (8 * byte));
#endif
        }
    }
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
#pragma GCC unroll 4
            for (int i = 0; i < GROUP / 8; ++i, quads += 2 * ROWS, w += PANEL * 4) {
                __builtin_prefetch(w + ahead);
                if (PANEL * 4 > 64) __builtin_prefetch(w + ahead + 64);
                dot_word<ROWS, 4>(group, w, quads);
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
            dot_word<ROWS, 2>(sums, w, words);
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
