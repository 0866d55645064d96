// Weights in formats that the processor cannot multiply, expanded panel by panel into what it can: the same numbers exactly, fp16
// as fp32, fp8 and fp4 as bf16 (their scales per channel come in at the end). Infinities and NaN are not expected.
#pragma once
#include "gemm_tile.h"

namespace paretune {

// [PANEL] values at p, of one or two bytes each, as words.
static inline Words widen_bytes(const void* p) {
#if defined(PARETUNE_AVX512)
    return (Words)_mm512_cvtepu8_epi32(load_as<__m128i>(p));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    return __builtin_convertvector(load_as<Bytes>(p), Words);
#endif
}
static inline Words widen_halves(const void* p) {
#if defined(PARETUNE_AVX512)
    return (Words)_mm512_cvtepu16_epi32(load_as<__m256i>(p));
#elif defined(__AVX2__)
    return (Words)_mm256_cvtepu16_epi32(load_as<__m128i>(p));
#else
    return __builtin_convertvector(load_as<Halves>(p), Words);
#endif
}

// A float of EXPONENT and MANTISSA bits below a sign bit. Its exponent is moved to that of fp32; a subnormal number m then reads
// as least * (1 + m), and the 1 goes.
template <int EXPONENT, int MANTISSA>
static inline Floats to_floats(Words bits) {
    constexpr int BIAS = (1 << (EXPONENT - 1)) - 1, DOWN = 23 - MANTISSA;
    const Words magnitude = bits & ((1u << (EXPONENT + MANTISSA)) - 1);
    const Floats moved = (Floats)((magnitude << DOWN) + ((uint32_t)(127 - BIAS) << 23));
    const float least = to_float((uint16_t)((127 - BIAS) << 7));
    const Floats value = (magnitude >> MANTISSA) == 0 ? (moved - least) * 2.0f : moved;
    return (Floats)((Words)value | (bits >> (EXPONENT + MANTISSA)) << 31);
}
static inline Words bf16_pair(Floats low, Floats high) { return (Words)low >> 16 | ((Words)high & 0xffff0000u); }

// Each: GROUP input channels stored in STEP_BYTES a panel; expand() writes them as Dot wants its steps.
struct Fp16Panel {  // [PANEL] fp16
    typedef Fp32Dot Dot;
    static constexpr int GROUP = 1;
    static constexpr int64_t STEP_BYTES = PANEL * 2;
    static void expand(const char* from, int64_t steps, char* to) {
        for (int64_t i = 0; i < 2 * steps; ++i, from += LANES * 2, to += LANES * 4)
            store_as(to, to_floats<5, 10>(widen_halves(from)));
    }
};

struct Fp8Panel {  // [PANEL][2] e4m3
    typedef Bf16Dot Dot;
    static constexpr int GROUP = 2;
    static constexpr int64_t STEP_BYTES = PANEL * 2;
    static void expand(const char* from, int64_t steps, char* to) {
        for (int64_t i = 0; i < 2 * steps; ++i, from += LANES * 2, to += LANES * 4) {
            const Words both = widen_halves(from);
            store_as(to, bf16_pair(to_floats<4, 3>(both & 0xff), to_floats<4, 3>(both >> 8)));
        }
    }
};

// [PANEL] bytes of scale, then [BLOCK / 2][PANEL] bytes, the even input channel in the low half. e2m1 times a scale of four
// significant bits (e4m3, nvfp4) or one (e8m0, mxfp4) fits into bf16.
template <int BLOCK, bool POWERS>
struct Fp4Panel {
    typedef Bf16Dot Dot;
    static constexpr int GROUP = BLOCK;
    static constexpr int64_t STEP_BYTES = PANEL * (1 + BLOCK / 2);
    static void expand(const char* from, int64_t steps, char* to) {
        for (int64_t s = 0; s < steps; ++s) {
            const Words scales[2] = {widen_bytes(from), widen_bytes(from + LANES)};
            Floats scale[2];
            for (int half = 0; half < 2; ++half)
                scale[half] = POWERS ? (Floats)(scales[half] << 23) : to_floats<4, 3>(scales[half]);
            from += PANEL;
            for (int i = 0; i < BLOCK / 2; ++i) {
                for (int half = 0; half < 2; ++half, from += LANES, to += LANES * 4) {
                    const Words both = widen_bytes(from);
                    store_as(to, bf16_pair(to_floats<2, 1>(both & 15) * scale[half], to_floats<2, 1>(both >> 4) * scale[half]));
                }
            }
        }
    }
};

}  // namespace paretune
