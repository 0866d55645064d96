// One vector register of floats, as GCC and Clang vector extensions: the same source becomes AVX-512, AVX2 or NEON code.
// Only dot products that have an instruction of their own (bf16, int8) are written per instruction set, in gemm_tile.h.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define PARETUNE_AVX512 1
#endif
#if defined(PARETUNE_AVX512) && defined(__AVX512BF16__)
#define PARETUNE_BF16_DOT 1
#endif
#if defined(PARETUNE_AVX512) && defined(__AVX512VNNI__)
#define PARETUNE_INT8_DOT 1
#endif

namespace paretune {

#if defined(PARETUNE_AVX512)
constexpr int LANES = 16;
#define PARETUNE_SPREAD(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#else
constexpr int LANES = 8;
#define PARETUNE_SPREAD(x) {x, x, x, x, x, x, x, x}
#endif
constexpr int PANEL = 2 * LANES;  // output channels of one weight panel

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

static inline Floats spread(float x) { return Floats PARETUNE_SPREAD(x); }
static inline Ints spread_int(int32_t x) { return Ints PARETUNE_SPREAD(x); }
static inline Words spread_word(uint32_t x) { return Words PARETUNE_SPREAD(x); }

template <class Vector>
static inline Vector load_as(const void* p) {
    Vector v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class Vector>
static inline void store_as(void* p, Vector v) {
    memcpy(p, &v, sizeof v);
}

static inline float to_float(uint16_t half) {
    uint32_t word = (uint32_t)half << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
}
// bfloat16 by rounding to nearest even; a NaN stays one.
static inline uint16_t to_bf16(float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    if (x != x) return (uint16_t)((word >> 16) | 0x40);
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
static inline Words bf16_words(Floats x) {
    Words word = (Words)x;
    Words rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return x != x ? (word >> 16) | 0x40 : rounded;
}

static inline Floats load(const float* p) { return load_as<Floats>(p); }
static inline Floats load(const uint16_t* p) {
#if defined(PARETUNE_AVX512)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(p)), 16);
#else
    return (Floats)(__builtin_convertvector(load_as<Halves>(p), Words) << 16);
#endif
}
static inline void store(float* p, Floats x) { store_as(p, x); }
static inline void store(uint16_t* p, Floats x) {
#if defined(PARETUNE_BF16_DOT)
    store_as(p, _mm512_cvtneps_pbh((__m512)x));
#elif defined(PARETUNE_AVX512)
    store_as(p, _mm512_cvtepi32_epi16((__m512i)bf16_words(x)));
#else
    store_as(p, __builtin_convertvector(bf16_words(x), Halves));
#endif
}

// The first `count` lanes; the rest are zero (loads) or untouched (stores). For the ragged end of a row.
template <class Element>
static inline Floats load_some(const Element* p, int64_t count) {
    Element whole[LANES] = {};
    memcpy(whole, p, (size_t)count * sizeof(Element));
    return load(whole);
}
template <class Element>
static inline void store_some(Element* p, Floats x, int64_t count) {
    Element whole[LANES];
    store(whole, x);
    memcpy(p, whole, (size_t)count * sizeof(Element));
}

// Over the lanes; the largest is that of the lanes that are no NaN where the others come first.
static inline float sum(Floats x) {
#if defined(PARETUNE_AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
#endif
}
static inline float largest_lane(Floats x) {
#if defined(PARETUNE_AVX512)
    return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
    const __m128 four = _mm_max_ps(_mm256_extractf128_ps((__m256)x, 1), _mm256_castps256_ps128((__m256)x));
    const __m128 two = _mm_max_ps(_mm_movehl_ps(four, four), four);
    return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(two), two));
#else
    float most = x[0];
    for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
    return most;
#endif
}
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// exp, truncated at a relative error of 1.1e-7 and exact at 0; 0 below -87, and at most exp(88). Cody and Waite's reduction, and
// the best polynomial 1 + r + ... of degree 5 on [-ln 2 / 2, ln 2 / 2] (Remez), in Estrin's order.
static inline Floats exp(Floats x) {
    Floats bounded = x > 88.0f ? spread(88.0f) : x;
    const float round_bits = 12582912.0f;  // 1.5 * 2**23: adding it leaves the rounded integer in the low bits
    Floats shifted = bounded * 1.44269504f + round_bits;
    Floats n = shifted - round_bits;
    Floats r = bounded - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Floats square = r * r;
    Floats high = (r * 8.312524958e-3f + 4.189011318e-2f) * square + (r * 1.666711446e-1f + 4.999923179e-1f);
    Floats p = high * square + (r + 1.0f);
    Floats result = (Floats)((Ints)p + ((Ints)shifted << 23));  // what stands above the integer is shifted out
    return x < -87.0f ? spread(0.0f) : (x != x ? x : result);
}

}  // namespace paretune
