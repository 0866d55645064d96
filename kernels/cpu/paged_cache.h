// The blocks of the paged KV cache, and its 8-bit numbers: the same formats as kernels/paged_cache.py, which says why they lie
// as they do.
#pragma once
#include "simd.h"

namespace paretune {

enum CacheType : int { CACHE_FP32, CACHE_BF16, CACHE_FP8, CACHE_INT8 };  // the order of CACHE_DTYPES in paged_cache.py

struct CachedFp8 {
    uint8_t bits;  // e4m3, finite but for NaN (0x7f, 0xff): Micikevicius et al., arXiv:2209.05433
};
struct CachedInt8 {
    int8_t value;  // times the scale of its token and head
};

// A block: for every KV head its keys and then its values, (block_size, head_dim) each; behind them, for int8, the fp32 scales
// in the same order.
struct Cache {
    char* blocks;
    CacheType type;
    int64_t block_size, kv_heads, head_dim;

    int64_t row_bytes() const { return head_dim * (type == CACHE_FP32 ? 4 : type == CACHE_BF16 ? 2 : 1); }
    int64_t value_offset() const { return block_size * row_bytes(); }  // from a key to the value of the same token
    int64_t head_offset() const { return 2 * value_offset(); }         // from one KV head to the next
    int64_t scale_offset() const { return kv_heads * head_offset(); }  // from the start of a block
    int64_t block_bytes() const { return scale_offset() + (type == CACHE_INT8 ? kv_heads * 2 * block_size * 4 : 0); }

    char* block(int64_t id) const { return blocks + id * block_bytes(); }
    char* key(char* block, int64_t head, int64_t offset) const { return block + head * head_offset() + offset * row_bytes(); }
    // Scale of a key; that of the value stands block_size further on.
    float* key_scale(char* block, int64_t head, int64_t offset) const {
        return (float*)(block + scale_offset()) + head * 2 * block_size + offset;
    }
};

static inline Floats load(const CachedInt8* p) {
#if defined(PARETUNE_AVX512)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(p)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    return __builtin_convertvector(__builtin_convertvector(load_as<Bytes>(p), Ints), Floats);
#endif
}

// By way of fp16, whose exponent is one bit wider: its conversion knows subnormal numbers, and 2**8 makes up for the bias.
static inline Floats load(const CachedFp8* p) {
#if defined(PARETUNE_AVX512) && defined(__F16C__)
    const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(load_as<__m128i>(p)), 7), _mm256_set1_epi16((short)0xbf80));
    const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(half, _mm256_set1_epi16(0x3f80)), _mm256_set1_epi16(0x3f80));
    return (Floats)_mm512_cvtph_ps(_mm256_or_si256(half, nan)) * 256.0f;
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i half = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p)), 7), _mm_set1_epi16((short)0xbf80));
    const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(half, _mm_set1_epi16(0x3f80)), _mm_set1_epi16(0x3f80));
    return (Floats)_mm256_cvtph_ps(_mm_or_si128(half, nan)) * 256.0f;
#else
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    const Words word = __builtin_convertvector(load_as<Bytes>(p), Words), size = word & 0x7fu;
    const Floats positive = (Floats)(size << 20) * 0x1p120f;
    return (Floats)((Words)positive | (word & 0x80u) << 24 | (size == 0x7fu ? spread_word(0x7fc00000u) : spread_word(0)));
#endif
}

// To the nearest, ties to even; beyond 448 it is 448, as where GPUs store an fp8 cache. A NaN stays one.
static inline void store(CachedFp8* p, Floats x) {
    const Words word = (Words)x, size = word & 0x7fffffffu;
    const Floats positive = (Floats)size;
    // 0.75 * 2**15: its last place is 2**-9, the least number, so that adding it rounds the small ones
    const Words small = (Words)(positive + 24576.0f) - (Words)spread(24576.0f);
    const Words normal = ((size + 0x7ffffu + ((size >> 20) & 1)) >> 20) - (120u << 3);
    Words bits = positive < 0x1p-6f ? small : normal;
    bits = positive > 448.0f ? spread_word(0x7eu) : bits;
    bits = x != x ? spread_word(0x7fu) : bits;
    bits |= (word >> 24) & 0x80u;
    for (int i = 0; i < LANES; ++i) p[i].bits = (uint8_t)bits[i];
}

// Symmetric int8 of one row: value = x * 127 / largest magnitude, to the nearest. Returns the scale, largest / 127; what is not
// finite makes it NaN, and with it the row.
template <class Element>
static float quantize_row(const Element* from, int64_t width, CachedInt8* to) {
    Floats largest = spread(0.0f), poison = spread(0.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats x = width - i >= LANES ? load(from + i) : load_some(from + i, width - i);
        largest = larger(magnitude(x), largest);
        poison += x * 0.0f;
    }
    float most = 0;
    for (int i = 0; i < LANES; ++i) most = largest[i] > most ? largest[i] : most;
    const float inverse = most > 0x1p-100f ? 127.0f / most : 0.0f;
    const float round_bits = 12582912.0f;  // 1.5 * 2**23: adding it leaves the rounded integer in the low bits
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t left = width - i < LANES ? width - i : LANES;
        const Floats x = left == LANES ? load(from + i) : load_some(from + i, left);
        const Words bits = (Words)(x * inverse + round_bits);
        for (int64_t j = 0; j < left; ++j) to[i + j].value = (int8_t)(uint8_t)bits[j];
    }
    return most / 127.0f + sum(poison);
}

}  // namespace paretune
