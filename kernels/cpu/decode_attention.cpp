// One new token per sequence over its paged KV cache: same name, shapes and reference as kernels/decode_attention.py. Plain C
// interface; the caller owns every buffer, the functions allocate, throw and keep nothing. Tokens are taken in chunks whose
// scores fit the L1 cache: scores of a chunk, one softmax update, then the chunk's V.
#include "attention.h"
#include "parallel.h"

namespace paretune {
namespace {

constexpr int64_t CHUNK = 64;  // tokens

template <class Element>
void prefetch_row(const Element* row, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += 64 / (int64_t)sizeof(Element)) __builtin_prefetch(row + d);
}

// out[i] = sum of the lanes of parts[i]
void sums_of(const Floats* parts, float* out) {
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
    _mm512_storeu_ps(out, _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd)));
#elif defined(__AVX2__)
    __m256 pairs[4];
    for (int i = 0; i < 4; ++i) pairs[i] = _mm256_hadd_ps((__m256)parts[2 * i], (__m256)parts[2 * i + 1]);
    __m256 low = _mm256_hadd_ps(pairs[0], pairs[1]), high = _mm256_hadd_ps(pairs[2], pairs[3]);
    __m256 crossed = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    _mm256_storeu_ps(out, crossed);
#else
    for (int i = 0; i < LANES; ++i) out[i] = sum(parts[i]);
#endif
}

// scores[head][token] = q[head] . k[token], GROUP heads of one KV head; LANES / GROUP tokens make one set of sums. The rows
// `soon` are fetched meanwhile: rows of one head lie kv_heads apart, which the hardware does not foresee.
template <int GROUP, class Element>
void score_chunk(const float* q, int64_t padded_dim, int64_t head_dim, const Element* const* rows, int64_t tokens,
                 const Element* const* soon, float* scores) {
    constexpr int TOKENS = LANES / GROUP;
    for (int64_t t = 0; t < tokens; t += TOKENS) {
        Floats parts[LANES];
        for (int i = 0; i < TOKENS; ++i) {
            const Element* row = rows[std::min(t + i, tokens - 1)];
            prefetch_row(soon[std::min(t + i, tokens - 1)], head_dim);
            Floats part[GROUP] = {};
            for (int64_t d = 0; d < head_dim; d += LANES) {
                Floats k = load_dims(row, d, head_dim);
#pragma GCC unroll 8
                for (int g = 0; g < GROUP; ++g) part[g] += k * load(q + g * padded_dim + d);
            }
            for (int g = 0; g < GROUP; ++g) parts[g * TOKENS + i] = part[g];
        }
        float sums[LANES];
        sums_of(parts, sums);
        for (int g = 0; g < GROUP; ++g) {
            for (int i = 0; i < TOKENS; ++i) scores[g * CHUNK + t + i] = sums[g * TOKENS + i];
        }
    }
}

// mixed[head] += sum over tokens of weights[head][token] * v[token], for VECTORS registers of dims from `dim`.
template <int GROUP, int VECTORS, class Element>
void mix_chunk(const float* weights, int64_t padded_dim, int64_t head_dim, const Element* const* rows, int64_t tokens,
               int64_t dim, const Element* const* soon, int64_t soon_tokens, float* mixed) {
    Floats sums[GROUP][VECTORS];
    for (int g = 0; g < GROUP; ++g) {
        for (int v = 0; v < VECTORS; ++v) sums[g][v] = load(mixed + g * padded_dim + dim + v * LANES);
    }
    for (int64_t t = 0; t < tokens; ++t) {
        if (t < soon_tokens) prefetch_row(soon[t], head_dim);
        Floats value[VECTORS];
        for (int v = 0; v < VECTORS; ++v) value[v] = load_dims(rows[t], dim + v * LANES, head_dim);
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; ++g) {
            Floats weight = spread(weights[g * CHUNK + t]);
            for (int v = 0; v < VECTORS; ++v) sums[g][v] += weight * value[v];
        }
    }
    for (int g = 0; g < GROUP; ++g) {
        for (int v = 0; v < VECTORS; ++v) store(mixed + g * padded_dim + dim + v * LANES, sums[g][v]);
    }
}

// Scores of a chunk become weights exp(score - largest), in place; what was mixed before is scaled down to the new largest.
void softmax_chunk(float* scores, int64_t tokens, float* mixed, int64_t padded_dim, float* largest, float* total) {
    const int64_t padded = (tokens + LANES - 1) / LANES * LANES;
    for (int64_t t = tokens; t < padded; ++t) scores[t] = -INFINITY;
    Floats most = spread(-INFINITY);
    for (int64_t t = 0; t < padded; t += LANES) most = larger(load(scores + t), most);
    float peak = *largest;
    for (int i = 0; i < LANES; ++i) peak = std::max(peak, (float)most[i]);
    Floats sums = spread(0.0f);
    for (int64_t t = 0; t < padded; t += LANES) {
        Floats weight = exp(load(scores + t) - peak);
        sums += weight;
        store(scores + t, weight);
    }
    if (peak > *largest) {
        const float down = std::exp(*largest - peak);
        *total *= down;
        for (int64_t d = 0; d < padded_dim; d += LANES) store(mixed + d, load(mixed + d) * down);
        *largest = peak;
    }
    *total += sum(sums);
}

template <int GROUP, class Element>
void attend_group(const Heads& shape, const float* q, const Element* const* k_rows, const Element* const* v_rows,
                  int64_t tokens, const Element* const* k_soon, int64_t soon_tokens, float* mixed, float* largest,
                  float* total, float* scores) {
    const int64_t padded_dim = shape.padded_dim(), head_dim = shape.head_dim;
    score_chunk<GROUP>(q, padded_dim, head_dim, k_rows, tokens, v_rows, scores);
    for (int g = 0; g < GROUP; ++g) {
        softmax_chunk(scores + g * CHUNK, tokens, mixed + g * padded_dim, padded_dim, largest + g, total + g);
    }
    int64_t d = 0;
    for (; d + 4 * LANES <= padded_dim && GROUP * 4 + 4 < LANES * 2; d += 4 * LANES) {
        mix_chunk<GROUP, 4>(scores, padded_dim, head_dim, v_rows, tokens, d, k_soon, d == 0 ? soon_tokens : 0, mixed);
    }
    for (; d + 2 * LANES <= padded_dim; d += 2 * LANES) {
        mix_chunk<GROUP, 2>(scores, padded_dim, head_dim, v_rows, tokens, d, k_soon, d == 0 ? soon_tokens : 0, mixed);
    }
    for (; d < padded_dim; d += LANES) mix_chunk<GROUP, 1>(scores, padded_dim, head_dim, v_rows, tokens, d, k_soon, d == 0 ? soon_tokens : 0, mixed);
}

template <class Element>
void attend(const Heads& shape, const Cache& cache, const int32_t* blocks, int64_t first, int64_t last, const float* q,
            float* mixed, float* largest, float* total, float* scores) {
    const int64_t padded_dim = shape.padded_dim(), group = shape.group(), row_bytes = shape.head_dim * sizeof(Element);
    int64_t offsets[2 * CHUNK];
    const Element *k_rows[CHUNK], *v_rows[CHUNK], *k_soon[CHUNK];
    for (int64_t t = first; t < last; t += CHUNK) {
        const int64_t tokens = std::min(CHUNK, last - t), upcoming = std::min(2 * CHUNK, last - t);
        for (int64_t i = 0; i < upcoming; ++i) offsets[i] = cache.token_offset(blocks, t + i);
        for (int64_t kv_head = 0; kv_head < shape.kv_heads; ++kv_head) {
            for (int64_t i = 0; i < tokens; ++i) {
                const int64_t at = offsets[i] + kv_head * row_bytes;
                k_rows[i] = (const Element*)(cache.k + at);
                v_rows[i] = (const Element*)(cache.v + at);
            }
            for (int64_t i = tokens; i < upcoming; ++i) {
                k_soon[i - tokens] = (const Element*)(cache.k + offsets[i] + kv_head * row_bytes);
            }
            for (int64_t h = kv_head * group, end = h + group; h < end;) {
                const float* query = q + h * padded_dim;
                float* to = mixed + h * padded_dim;
                const int64_t soon = h == kv_head * group ? upcoming - tokens : 0;
                if (end - h >= 4) {
                    attend_group<4>(shape, query, k_rows, v_rows, tokens, k_soon, soon, to, largest + h, total + h, scores);
                    h += 4;
                } else if (end - h >= 2) {
                    attend_group<2>(shape, query, k_rows, v_rows, tokens, k_soon, soon, to, largest + h, total + h, scores);
                    h += 2;
                } else {
                    attend_group<1>(shape, query, k_rows, v_rows, tokens, k_soon, soon, to, largest + h, total + h, scores);
                    h += 1;
                }
            }
        }
    }
}

template <class Query>
void scale_query(const Heads& shape, const Query* q, float* scaled) {
    const int64_t padded_dim = shape.padded_dim();
    for (int64_t h = 0; h < shape.heads; ++h) {
        for (int64_t d = 0; d < padded_dim; d += LANES) {
            store(scaled + h * padded_dim + d, load_dims(q + h * shape.head_dim, d, shape.head_dim) * shape.scale);
        }
    }
}

}  // namespace

int64_t one_token_scratch(const Heads& shape) { return shape.heads * shape.padded_dim() + 4 * CHUNK; }

void attend_one_token(const Heads& shape, const Cache& cache, const int32_t* blocks, const void* q, bool q_is_bf16,
                      int64_t first, int64_t last, float* mixed, float* largest, float* total, float* scratch) {
    std::fill(mixed, mixed + shape.heads * shape.padded_dim(), 0.0f);
    std::fill(largest, largest + shape.heads, -INFINITY);
    std::fill(total, total + shape.heads, 0.0f);
    float *scaled = scratch, *scores = scratch + shape.heads * shape.padded_dim();
    if (q_is_bf16) {
        scale_query(shape, (const uint16_t*)q, scaled);
    } else {
        scale_query(shape, (const float*)q, scaled);
    }
    if (cache.is_bf16) {
        attend<uint16_t>(shape, cache, blocks, first, last, scaled, mixed, largest, total, scores);
    } else {
        attend<float>(shape, cache, blocks, first, last, scaled, mixed, largest, total, scores);
    }
}

}  // namespace paretune

using namespace paretune;

// Returns 0, or the bytes of workspace it needs where `workspace_bytes` are too few (nothing is computed then).
extern "C" int64_t paretune_decode_attention(const void* q, int64_t q_stride, int q_is_bf16, const void* k_cache,
                                             const void* v_cache, int cache_is_bf16, int64_t block_size,
                                             const void* block_tables, int64_t table_stride, const void* context_len,
                                             int64_t sequences, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
                                             void* out, int split_tokens, int serial_below_tokens, void* workspace,
                                             int64_t workspace_bytes, int threads) {
    const Heads shape = {heads, kv_heads, head_dim, scale};
    const Cache cache = {(const char*)k_cache, (const char*)v_cache, cache_is_bf16 != 0, block_size, kv_heads, head_dim};
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
