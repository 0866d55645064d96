// One new token per sequence over its paged KV cache: same name, shapes and reference as kernels/decode_attention.py. Plain C
// interface; the caller owns every buffer, the functions allocate, throw and keep nothing. Tokens are taken in chunks whose
// scores fit the L1 cache: scores of a chunk, one softmax update, then the chunk's V. Meanwhile the same rows of the next KV head
// are fetched into the L2 cache (of the next chunk after the last head): blocks are read in the order in which they lie. Fetched
// one step ahead into the L1 cache they were late or gone again. docs/notes/runtime.md has the figures.

// GCC 12 vectorizes a loop of score_chunk<1> wrongly for AVX-512 (scores of one head, -march=sapphirerapids); what is worth a
// vector here is written as one.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-loop-vectorize")
#endif

#include "attention.h"
#include "parallel.h"

namespace paretune {
namespace {

#if defined(PARETUNE_AVX512)
constexpr int64_t CHUNK = 64;  // tokens
#else
constexpr int64_t CHUNK = 32;
#endif

// Rows of one head, one per token of a chunk: they lie `offset` bytes after where their tokens' blocks say. Behind the last
// token it stands again, so that a group of tokens is always whole.
struct Rows {
    const char* const* tokens;
    int64_t offset;
    template <class Element>
    const Element* row(int64_t token) const {
        return (const Element*)(tokens[token] + offset);
    }
    // The line at a byte of a row, into the L2 cache. Forced inline: GCC takes a function that only prefetches for one without
    // effect, and drops the call.
    __attribute__((always_inline)) void prefetch(int64_t token, int64_t byte) const {
        __builtin_prefetch(tokens[token] + offset + byte, 0, 2);
    }
};

// Lane i is the sum of the lanes of parts[i].
inline __attribute__((always_inline)) Floats sums_of(const Floats* parts) {
#if defined(PARETUNE_AVX512)
    __m512 level[16];
    for (int i = 0; i < 16; ++i) level[i] = (__m512)parts[i];
    __m512 pairs[8], quads[4];
    for (int i = 0; i < 8; ++i) {  // lanes: a, b, a, b in each 128 bits
        __m512 a = level[2 * i], b = level[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; ++i) {  // a, b, c, d in each 128 bits
        __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44), _mm512_shuffle_f32x4(quads[0], quads[1], 0xee));
    __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44), _mm512_shuffle_f32x4(quads[2], quads[3], 0xee));
    return (Floats)_mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
#elif defined(__AVX2__)
    // One shuffle and blends where horizontal additions take two shuffles: lanes a, a, b, b; then a, b', c, d'; then all eight.
    __m256 pairs[4], quads[2];
    for (int i = 0; i < 4; ++i) {
        const __m256 a = (__m256)parts[2 * i], b = (__m256)parts[2 * i + 1];
        pairs[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x4e), _mm256_blend_ps(a, b, 0xcc));
    }
    for (int i = 0; i < 2; ++i) {
        const __m256 a = pairs[2 * i], b = pairs[2 * i + 1];
        quads[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    }
    return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x21), _mm256_blend_ps(quads[0], quads[1], 0xf0));
#else
    Floats sums;
    for (int i = 0; i < LANES; ++i) sums[i] = sum(parts[i]);
    return sums;
#endif
}

// DIMS numbers of a row as VECTORS registers. In which order the dims lie there is the same for queries, keys, values and sums:
// `arrange` brings DIMS floats into it, and back.
template <class Stored>
struct Widened {
    static constexpr int VECTORS = 1, DIMS = LANES;
    template <int VECTOR>
    static inline Floats vector(const Stored* p) {
        return load(p);
    }
    static void arrange(float*) {}
};
#if defined(__AVX2__) && !defined(PARETUNE_AVX512)
// bf16 behind 16 zero bits is fp32: one unpacking with zeros, where widening and shifting take two instructions on the ports
// that the multiply-adds want.
template <>
struct Widened<uint16_t> {
    static constexpr int VECTORS = 2, DIMS = 2 * LANES;
    template <int VECTOR>
    static inline Floats vector(const uint16_t* p) {
        const __m256i zero = _mm256_setzero_si256(), dims = load_as<__m256i>(p);
        return (Floats)(VECTOR ? _mm256_unpackhi_epi16(zero, dims) : _mm256_unpacklo_epi16(zero, dims));
    }
    static void arrange(float* dims) {  // the middle quarters change places
        const __m128 second = _mm_loadu_ps(dims + 4);
        _mm_storeu_ps(dims + 4, _mm_loadu_ps(dims + 8));
        _mm_storeu_ps(dims + 8, second);
    }
};
#endif

// How scores and weighted sums are made: by fp32 multiply-adds, for every format and processor...
template <class Stored>
struct ByMultiplyAdd {
    typedef Stored Element;
    typedef float Query;
    typedef Widened<Stored> Wide;
    static constexpr int DIMS = Wide::DIMS;

    static void arrange(float* rows, int64_t count) {
        for (int64_t d = 0; d < count; d += DIMS) Wide::arrange(rows + d);
    }

    // The dims at p, `left` of them there and zeros behind
    template <int VECTOR>
    static inline __attribute__((always_inline)) Floats load_dims(const Element* p, int64_t left) {
        if (left >= DIMS) return Wide::template vector<VECTOR>(p);
        Element whole[DIMS] = {};
        memcpy(whole, p, (size_t)left * sizeof(Element));
        return Wide::template vector<VECTOR>(whole);
    }

    template <int GROUP, int TOKENS, int VECTOR>
    static inline __attribute__((always_inline)) void score_vector(const Query* q, int64_t padded_dim,
                                                                   const Element* const* rows, int64_t dim, int64_t left,
                                                                   Floats* sums) {
        Floats query[GROUP];
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; ++g) {
            query[g] = load(q + g * padded_dim + dim + VECTOR * LANES);
#if defined(__AVX2__) && !defined(PARETUNE_AVX512)
            __asm__("" : "+x"(query[g]));  // or GCC reads it from memory in every multiply-add, and loads become the limit
#endif
        }
#pragma GCC unroll 16
        for (int i = 0; i < TOKENS; ++i) {
            const Floats k = load_dims<VECTOR>(rows[i] + dim, left);
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; ++g) sums[g * TOKENS + i] += k * query[g];
        }
    }

    // sums[g * TOKENS + i] += q[g] . rows[i] over DIMS dims, `left` of them there
    template <int GROUP, int TOKENS>
    static inline __attribute__((always_inline)) void score(const Query* q, int64_t padded_dim, const Element* const* rows,
                                                            int64_t dim, int64_t left, Floats* sums) {
        score_vector<GROUP, TOKENS, 0>(q, padded_dim, rows, dim, left, sums);
        if (Wide::VECTORS > 1) score_vector<GROUP, TOKENS, Wide::VECTORS - 1>(q, padded_dim, rows, dim, left, sums);
    }

    // mixed[head] += sum over tokens of weights[head][token] * v[token], for PARTS times DIMS dims, `left` of them there. The
    // lines of `soon` are shared out among the passes over the dims without a branch: where several passes read of a line, each
    // takes another one of so many tokens.
    template <int GROUP, int PARTS>
    static inline __attribute__((always_inline)) void mix(const float* weights, int64_t padded_dim, Rows values, int64_t dim,
                                                          int64_t left, int64_t tokens, Rows soon, float* mixed) {
        constexpr int VECTORS = PARTS * Wide::VECTORS, BYTES = PARTS * DIMS * (int)sizeof(Element);
        constexpr int TOKENS = BYTES < 64 ? 64 / BYTES : 1, LINES = BYTES < 64 ? 1 : BYTES / 64;
        const int64_t byte = dim * (int64_t)sizeof(Element), turn = byte / BYTES % TOKENS;
        Floats sums[GROUP][VECTORS];
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; ++g) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sums[g][v] = load(mixed + g * padded_dim + dim + v * LANES);
        }
        for (int64_t t = 0; t < tokens; t += TOKENS) {
#pragma GCC unroll 4
            for (int line = 0; line < LINES; ++line) soon.prefetch(t + turn, byte + line * 64);
#pragma GCC unroll 4
            for (int i = 0; i < TOKENS; ++i) {
                const Element* row = values.row<Element>(t + i) + dim;
                Floats value[VECTORS];
#pragma GCC unroll 4
                for (int p = 0; p < PARTS; ++p) {
                    value[p * Wide::VECTORS] = load_dims<0>(row + p * DIMS, left);
                    if (Wide::VECTORS > 1) value[p * Wide::VECTORS + 1] = load_dims<Wide::VECTORS - 1>(row + p * DIMS, left);
                }
#pragma GCC unroll 4
                for (int g = 0; g < GROUP; ++g) {
                    const Floats weight = spread(weights[g * CHUNK + t + i]);
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; ++v) sums[g][v] += weight * value[v];
                }
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; ++g) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) store(mixed + g * padded_dim + dim + v * LANES, sums[g][v]);
        }
    }
};

#if defined(PARETUNE_BF16_DOT)
// ... or by dot products of bf16 pairs, for a bf16 cache where the processor has them; queries and weights are rounded to bf16,
// as in prefill. (Widening int8 and fp8 to bf16 for it took 10 and 15 % longer than multiply-adds, on Zen 4 in the L2 cache.)
struct ByBf16Dot {
    typedef uint16_t Element;
    typedef uint16_t Query;
    static constexpr int DIMS = 2 * LANES;

    template <class Number>
    static void arrange(Number*, int64_t) {}

    static inline __attribute__((always_inline)) __m512bh load_dims(const uint16_t* p, int64_t left) {
        if (left >= DIMS) return (__m512bh)load_as<__m512i>(p);
        uint16_t whole[DIMS] = {};
        memcpy(whole, p, (size_t)left * 2);
        return (__m512bh)load_as<__m512i>(whole);
    }

    template <int GROUP, int TOKENS>
    static inline __attribute__((always_inline)) void score(const Query* q, int64_t padded_dim, const Element* const* rows,
                                                            int64_t dim, int64_t left, Floats* sums) {
        __m512bh query[GROUP];
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; ++g) query[g] = load_dims(q + g * padded_dim + dim, DIMS);
#pragma GCC unroll 16
        for (int i = 0; i < TOKENS; ++i) {
            const __m512bh k = load_dims(rows[i] + dim, left);
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; ++g) {
                Floats& sum = sums[g * TOKENS + i];
                sum = (Floats)_mm512_dpbf16_ps((__m512)sum, k, query[g]);
            }
        }
    }

    // Two tokens at a time, whose numbers are interleaved: each half of a register of dims gets sums of its own, with its dims
    // in the order in which unpacking leaves them.
    template <int GROUP, int VECTORS>
    static inline __attribute__((always_inline)) void mix(const float* weights, int64_t padded_dim, Rows values, int64_t dim,
                                                          int64_t left, int64_t tokens, Rows soon, float* mixed) {
        const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(4));
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        __m512 sums[GROUP][VECTORS][2];
        uint32_t pairs_of_weights[GROUP][CHUNK / 2];
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; ++g) {
            for (int64_t t = 0; t < tokens; t += 2 * LANES) {
                const float* from = weights + g * CHUNK + t;
                store_as(pairs_of_weights[g] + t / 2, _mm512_cvtne2ps_pbh((__m512)load(from + LANES), (__m512)load(from)));
            }
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const float* from = mixed + g * padded_dim + dim + v * DIMS;
                sums[g][v][0] = _mm512_permutex2var_ps((__m512)load(from), low, (__m512)load(from + LANES));
                sums[g][v][1] = _mm512_permutex2var_ps((__m512)load(from), high, (__m512)load(from + LANES));
            }
        }
        for (int64_t t = 0; t < tokens; t += 2) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {  // a vector of dims is a line
                soon.prefetch(t, (dim + v * DIMS) * 2);
                soon.prefetch(t + 1, (dim + v * DIMS) * 2);
            }
            const Element *even = values.row<Element>(t) + dim, *odd = values.row<Element>(t + 1) + dim;
            __m512bh value[VECTORS][2];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                const __m512i a = (__m512i)load_dims(even + v * DIMS, left), b = (__m512i)load_dims(odd + v * DIMS, left);
                value[v][0] = (__m512bh)_mm512_unpacklo_epi16(a, b);
                value[v][1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
            }
#pragma GCC unroll 4
            for (int g = 0; g < GROUP; ++g) {
                const __m512bh weight = (__m512bh)_mm512_set1_epi32((int)pairs_of_weights[g][t / 2]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; ++v) {
                    sums[g][v][0] = _mm512_dpbf16_ps(sums[g][v][0], value[v][0], weight);
                    sums[g][v][1] = _mm512_dpbf16_ps(sums[g][v][1], value[v][1], weight);
                }
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < GROUP; ++g) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) {
                float* to = mixed + g * padded_dim + dim + v * DIMS;
                store(to, (Floats)_mm512_permutex2var_ps(sums[g][v][0], first, sums[g][v][1]));
                store(to + LANES, (Floats)_mm512_permutex2var_ps(sums[g][v][0], second, sums[g][v][1]));
            }
        }
    }
};
typedef ByBf16Dot ByBestForBf16;
#else
typedef ByMultiplyAdd<uint16_t> ByBestForBf16;
#endif

// rows[i] holds GROUP heads' scores of LANES / GROUP tokens -> LANES tokens of every head, as whole registers: what is stored in
// pieces and loaded as one has to wait for the pieces.
template <int GROUP>
inline __attribute__((always_inline)) void store_by_head(const Floats* rows, float* scores) {
#if defined(__AVX2__) && !defined(PARETUNE_AVX512)
    __m256 heads[4];
    if (GROUP == 4) {
        const __m256d a = (__m256d)rows[0], b = (__m256d)rows[1 % GROUP], c = (__m256d)rows[2 % GROUP], d = (__m256d)rows[3 % GROUP];
        const __m256 even = (__m256)_mm256_unpacklo_pd(a, b), odd = (__m256)_mm256_unpackhi_pd(a, b);  // heads 0 and 2, 1 and 3
        const __m256 even_end = (__m256)_mm256_unpacklo_pd(c, d), odd_end = (__m256)_mm256_unpackhi_pd(c, d);
        heads[0] = _mm256_permute2f128_ps(even, even_end, 0x20);
        heads[1] = _mm256_permute2f128_ps(odd, odd_end, 0x20);
        heads[2] = _mm256_permute2f128_ps(even, even_end, 0x31);
        heads[3] = _mm256_permute2f128_ps(odd, odd_end, 0x31);
    } else if (GROUP == 2) {
        heads[0] = _mm256_permute2f128_ps((__m256)rows[0], (__m256)rows[1 % GROUP], 0x20);
        heads[1] = _mm256_permute2f128_ps((__m256)rows[0], (__m256)rows[1 % GROUP], 0x31);
    } else {
        heads[0] = (__m256)rows[0];
    }
#pragma GCC unroll 4
    for (int g = 0; g < GROUP; ++g) store(scores + g * CHUNK, (Floats)heads[g]);
#else
    constexpr int TOKENS = LANES / GROUP;
    for (int i = 0; i < LANES; ++i) {
        for (int g = 0; g < GROUP; ++g) scores[g * CHUNK + i] = rows[i / TOKENS][g * TOKENS + i % TOKENS];
    }
#endif
}

// scores[head][token] = q[head] . k[token], GROUP heads of one KV head; LANES / GROUP tokens make one set of sums. The rows
// `soon` are fetched meanwhile.
template <int GROUP, class Products>
void score_chunk(const typename Products::Query* q, int64_t padded_dim, int64_t head_dim, Rows keys, int64_t tokens,
                 Rows soon, float* scores) {
    typedef typename Products::Element Element;
    constexpr int TOKENS = LANES / GROUP, DIMS = Products::DIMS;
    for (int64_t t = 0; t < tokens; t += LANES) {
        Floats of_rows[GROUP];
#pragma GCC unroll 1
        for (int part = 0; part < GROUP; ++part) {
            const int64_t first = t + part * TOKENS;
            Floats sums[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) sums[i] = spread(0.0f);
            const Element* rows[TOKENS];
#pragma GCC unroll 16
            for (int i = 0; i < TOKENS; ++i) rows[i] = keys.row<Element>(first + i);
            for (int64_t b = 0; b < head_dim * (int64_t)sizeof(Element); b += 64) {
#pragma GCC unroll 16
                for (int i = 0; i < TOKENS; ++i) soon.prefetch(first + i, b);
            }
            int64_t d = 0;
            for (; d + DIMS <= head_dim; d += DIMS) {
                Products::template score<GROUP, TOKENS>(q, padded_dim, rows, d, DIMS, sums);
            }
            if (d < head_dim) Products::template score<GROUP, TOKENS>(q, padded_dim, rows, d, head_dim - d, sums);
            of_rows[part] = sums_of(sums);
        }
        store_by_head<GROUP>(of_rows, scores + t);
    }
}

// The weighted sums of a chunk, as many dims at a time as the registers hold; the rows `soon` are fetched meanwhile.
template <int GROUP, class Products>
void mix_chunk(const float* weights, int64_t padded_dim, int64_t head_dim, Rows values, int64_t tokens, Rows soon,
               float* mixed) {
    constexpr int64_t DIMS = Products::DIMS;
    constexpr int MOST = std::max<int>(1, (GROUP * 4 + 5 < LANES * 2 ? 4 : 2) * LANES / DIMS);
    int64_t d = 0;
    for (; d + MOST * DIMS <= head_dim; d += MOST * DIMS) {
        Products::template mix<GROUP, MOST>(weights, padded_dim, values, d, DIMS, tokens, soon, mixed);
    }
    for (; d + DIMS <= head_dim; d += DIMS) {
        Products::template mix<GROUP, 1>(weights, padded_dim, values, d, DIMS, tokens, soon, mixed);
    }
    if (d < head_dim) Products::template mix<GROUP, 1>(weights, padded_dim, values, d, head_dim - d, tokens, soon, mixed);
}

void scale_chunk(float* row, const float* scales, int64_t count) {
    for (int64_t t = 0; t < count; ++t) row[t] *= scales[t];
}

// Scores of a chunk become weights exp(score - largest), in place; what was mixed before is scaled down to the new largest.
template <int GROUP>
void softmax_chunk(float* scores, int64_t tokens, float* mixed, int64_t padded_dim, float* largest, float* total) {
    const int64_t padded = (tokens + PANEL - 1) / PANEL * PANEL;
    float peaks[GROUP];
    for (int g = 0; g < GROUP; ++g) {
        float* row = scores + g * CHUNK;
        for (int64_t t = tokens; t < padded; ++t) row[t] = -INFINITY;
        Floats most = spread(-INFINITY);
        for (int64_t t = 0; t < padded; t += LANES) most = larger(load(row + t), most);
        peaks[g] = std::max(largest[g], largest_lane(most));
    }
    float sums[GROUP];
    for (int g = 0; g < GROUP; ++g) {
        float* row = scores + g * CHUNK;
        Floats of_lanes = spread(0.0f);
        for (int64_t t = 0; t < padded; t += LANES) {
            const Floats weight = exp(load(row + t) - peaks[g]);
            of_lanes += weight;
            store(row + t, weight);
        }
        sums[g] = sum(of_lanes);
    }
    for (int g = 0; g < GROUP; ++g) {
        if (peaks[g] > largest[g]) {
            const Floats down = exp(spread(largest[g] - peaks[g]));
            total[g] *= down[0];
            float* row = mixed + g * padded_dim;
            for (int64_t d = 0; d < padded_dim; d += LANES) store(row + d, load(row + d) * down);
            largest[g] = peaks[g];
        }
        total[g] += sums[g];
    }
}

// One KV head's chunk for GROUP of its query heads. Scales (CHUNK,) or null. HEAD_DIM is a constant of the loops, or 0.
template <int GROUP, int HEAD_DIM, class Products>
void attend_group(const Heads& shape, const typename Products::Query* q, Rows keys, Rows values, Rows soon_keys,
                  Rows soon_values, int64_t tokens, const float* key_scales, const float* value_scales, float* mixed, float* largest, float* total, float* scores) {
    static_assert(HEAD_DIM % PANEL == 0);
    const int64_t padded_dim = HEAD_DIM ? HEAD_DIM : shape.padded_dim(), head_dim = HEAD_DIM ? HEAD_DIM : shape.head_dim;
    score_chunk<GROUP, Products>(q, padded_dim, head_dim, keys, tokens, soon_keys, scores);
    for (int g = 0; g < GROUP && key_scales; ++g) scale_chunk(scores + g * CHUNK, key_scales, tokens);
    softmax_chunk<GROUP>(scores, tokens, mixed, padded_dim, largest, total);
    for (int g = 0; g < GROUP && value_scales; ++g) scale_chunk(scores + g * CHUNK, value_scales, tokens);
    mix_chunk<GROUP, Products>(scores, padded_dim, head_dim, values, tokens, soon_values, mixed);
}

// Where the tokens [first, last) of a chunk lie, and their scales; the last stands in all places behind.
struct Chunk {
    const char* keys[CHUNK];
    const float* scales[CHUNK];
    Chunk(const Cache& cache, const int32_t* blocks, int64_t first, int64_t last) {
        int64_t index = first / cache.block_size, offset = first % cache.block_size;
        char* block = cache.block(blocks[index]);
        for (int64_t i = 0; i < CHUNK; ++i) {
            keys[i] = cache.key(block, 0, offset);
            scales[i] = cache.key_scale(block, 0, offset);
            if (first + i + 1 >= last) continue;
            if (++offset == cache.block_size) {
                offset = 0;
                block = cache.block(blocks[++index]);
            }
        }
    }
};

template <int HEAD_DIM, class Products>
void attend(const Heads& shape, const Cache& cache, const int32_t* blocks, int64_t first, int64_t last,
            const typename Products::Query* q, float* mixed, float* largest, float* total, float* scores) {
    const int64_t padded_dim = shape.padded_dim(), group = shape.group();
    float key_scales[CHUNK], value_scales[CHUNK];
    const bool scaled = cache.type == CACHE_INT8;
    Chunk chunk(cache, blocks, first, last), upcoming = chunk;
    for (int64_t t = first; t < last; t += CHUNK, chunk = upcoming) {
        const int64_t tokens = std::min(CHUNK, last - t);
        if (t + CHUNK < last) upcoming = Chunk(cache, blocks, t + CHUNK, last);
        for (int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
            const int64_t offset = kv_head * cache.head_offset();
            const Rows keys = {chunk.keys, offset}, values = {chunk.keys, offset + cache.value_offset()};
            const bool last_head = kv_head + 1 == shape.kv_heads;
            const char* const* soon = last_head ? upcoming.keys : chunk.keys;
            const int64_t soon_offset = last_head ? 0 : offset + cache.head_offset();
            const Rows soon_keys = {soon, soon_offset}, soon_values = {soon, soon_offset + cache.value_offset()};
            for (int64_t i = 0; scaled && i < tokens; ++i) {
                key_scales[i] = chunk.scales[i][kv_head * 2 * cache.block_size];
                value_scales[i] = chunk.scales[i][(kv_head * 2 + 1) * cache.block_size];
                if (i % LANES == 0) {
                    __builtin_prefetch(upcoming.scales[i] + kv_head * 2 * cache.block_size, 0, 2);
                    __builtin_prefetch(upcoming.scales[i] + (kv_head * 2 + 1) * cache.block_size, 0, 2);
                }
            }
            for (int64_t h = kv_head * group, end = h + group; h < end;) {
                const int heads = end - h >= 4 ? 4 : end - h >= 2 ? 2 : 1;
                const auto attend_heads = heads == 4   ? attend_group<4, HEAD_DIM, Products>
                                          : heads == 2 ? attend_group<2, HEAD_DIM, Products>
                                                       : attend_group<1, HEAD_DIM, Products>;
                attend_heads(shape, q + h * padded_dim, keys, values, soon_keys, soon_values, tokens, scaled ? key_scales : nullptr,
                             scaled ? value_scales : nullptr, mixed + h * padded_dim, largest + h, total + h, scores);
                h += heads;
            }
        }
    }
}

// q (heads, head_dim) times the scale -> (heads, padded_dim), zeros behind
template <class From, class To>
void scale_query(const Heads& shape, const From* q, To* scaled) {
    for (int64_t h = 0; h < shape.heads; ++h, q += shape.head_dim, scaled += shape.padded_dim()) {
        for (int64_t d = 0; d < shape.padded_dim(); d += LANES) {
            store(scaled + d, d < shape.head_dim ? load_dims(q, d, shape.head_dim) * shape.scale : spread(0.0f));
        }
    }
}

template <class Products>
void attend_with(const Heads& shape, const Cache& cache, const int32_t* blocks, const void* q, bool q_is_bf16, int64_t first,
                 int64_t last, float* mixed, float* largest, float* total, float* scratch) {
    auto scaled = (typename Products::Query*)scratch;
    if (q_is_bf16) {
        scale_query(shape, (const uint16_t*)q, scaled);
    } else {
        scale_query(shape, (const float*)q, scaled);
    }
    if (first >= last) return;
    const int64_t padded_dim = shape.padded_dim();
    Products::arrange(scaled, shape.heads * padded_dim);
    const auto attend_heads = shape.head_dim == 64    ? attend<64, Products>
                              : shape.head_dim == 128 ? attend<128, Products>
                                                      : attend<0, Products>;
    attend_heads(shape, cache, blocks, first, last, scaled, mixed, largest, total, scratch + shape.heads * padded_dim);
    Products::arrange(mixed, shape.heads * padded_dim);
}

}  // namespace

int64_t one_token_scratch(const Heads& shape) { return shape.heads * shape.padded_dim() + 4 * CHUNK; }

void attend_one_token(const Heads& shape, const Cache& cache, const int32_t* blocks, const void* q, bool q_is_bf16,
                      int64_t first, int64_t last, float* mixed, float* largest, float* total, float* scratch) {
    std::fill(mixed, mixed + shape.heads * shape.padded_dim(), 0.0f);
    std::fill(largest, largest + shape.heads, -INFINITY);
    std::fill(total, total + shape.heads, 0.0f);
    const auto attend_cache = cache.type == CACHE_FP32   ? attend_with<ByMultiplyAdd<float>>
                              : cache.type == CACHE_BF16 ? attend_with<ByBestForBf16>
                              : cache.type == CACHE_FP8  ? attend_with<ByMultiplyAdd<CachedFp8>>
                                                         : attend_with<ByMultiplyAdd<CachedInt8>>;
    attend_cache(shape, cache, blocks, q, q_is_bf16, first, last, mixed, largest, total, scratch);
}

}  // namespace paretune

using namespace paretune;

// Returns 0, or the bytes of workspace it needs where `workspace_bytes` are too few (nothing is computed then).
extern "C" int64_t paretune_decode_attention(const void* q, int64_t q_stride, int q_is_bf16, void* cache_blocks,
                                             int cache_type, int64_t block_size, const void* block_tables, int64_t table_stride, const void* context_len,
                                             int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
                                             void* out, int split_tokens, int serial_below_tokens, void* workspace,
                                             int64_t workspace_bytes, int threads) {
    const Heads shape = {heads, kv_heads, head_dim, scale};
    const Cache cache = {(char*)cache_blocks, (CacheType)cache_type, block_size, kv_heads, head_dim};
    const int32_t *lengths = (const int32_t*)context_len, *tables = (const int32_t*)block_tables;
    int64_t tokens = 0, longest = 0;
    for (int64_t s = 0; s < sequences; ++s) {
        tokens += lengths[s];
        longest = std::max<int64_t>(longest, lengths[s]);
    }
    if (tokens < serial_below_tokens || threads < 1) threads = 1;
    // No smaller parts than balance asks for: eight items per thread.
    int64_t part = std::max<int64_t>(split_tokens, tokens / (8 * threads));
    if (threads == 1) part = longest;
    part = std::max<int64_t>(CHUNK, (part + CHUNK - 1) / CHUNK * CHUNK);
    const int64_t parts = std::max<int64_t>(1, (longest + part - 1) / part);
    const int64_t mixed_floats = heads * shape.padded_dim(), result_floats = mixed_floats + 2 * heads;
    const int64_t scratch_floats = one_token_scratch(shape);
    const int64_t needed = (sequences * parts * result_floats + threads * scratch_floats) * 4;
    if (workspace_bytes < needed) return needed;
    float *results = (float*)workspace, *scratch = results + sequences * parts * result_floats;
    const int64_t q_bytes = q_is_bf16 ? 2 : 4;

    parallel_items(sequences * parts, threads, [&](int64_t item, int thread) {
        const int64_t s = item / parts, first = item % parts * part, last = std::min<int64_t>(lengths[s], first + part);
        if (first >= last && first > 0) return;
        float* mixed = results + item * result_floats;
        attend_one_token(shape, cache, tables + s * table_stride, (const char*)q + s * q_stride * q_bytes, q_is_bf16 != 0,
                         first, last, mixed, mixed + mixed_floats, mixed + mixed_floats + heads,
                         scratch + thread * scratch_floats);
        if (lengths[s] > part) return;
        const float* total = mixed + mixed_floats + heads;
        if (q_is_bf16) {
            write_heads(shape, mixed, total, (uint16_t*)out + s * heads * head_dim);
        } else {
            write_heads(shape, mixed, total, (float*)out + s * heads * head_dim);
        }
    });
    if (parts == 1) return 0;

    const int merging_threads = sequences * parts * mixed_floats < 65536 ? 1 : threads;
    parallel_items(sequences, merging_threads, [&](int64_t s, int) {
        if (lengths[s] <= part) return;
        float* mixed = results + s * parts * result_floats;
        float *largest = mixed + mixed_floats, *total = largest + heads;
        for (int64_t p = 1; p * part < lengths[s]; ++p) {
            const float* other = mixed + p * result_floats;
            const float *other_largest = other + mixed_floats, *other_total = other_largest + heads;
            for (int64_t h = 0; h < heads; ++h) {
                const float peak = std::max(largest[h], other_largest[h]);
                const float ours = std::exp(largest[h] - peak), theirs = std::exp(other_largest[h] - peak);
                largest[h] = peak;
                total[h] = total[h] * ours + other_total[h] * theirs;
                const int64_t begin = h * shape.padded_dim();
                for (int64_t d = begin; d < begin + shape.padded_dim(); d += LANES) {
                    store(mixed + d, load(mixed + d) * ours + load(other + d) * theirs);
                }
            }
        }
        if (q_is_bf16) {
            write_heads(shape, mixed, total, (uint16_t*)out + s * heads * head_dim);
        } else {
            write_heads(shape, mixed, total, (float*)out + s * heads * head_dim);
        }
    });
    return 0;
}
