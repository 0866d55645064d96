// Normalization, rotary embedding with the KV write, and the gated activation: same names, shapes and references as
// kernels/fused.py. Plain C interface; the caller owns every buffer, the functions allocate, throw and keep nothing.
#include <cmath>
#include <type_traits>

#include "paged_cache.h"
#include "rows.h"

namespace paretune {
namespace {

constexpr int64_t MOST_HEAD_DIM = 1024;

// With a residual: residual += x, and that is normalized.
template <class Element>
void norm_row(const Element* x, Element* residual, const float* weight, float eps, Element* out, int64_t width) {
    Floats squares = spread(0.0f);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats v = load_upto(x + i, width - i);
        if (residual) {
            v += load_upto(residual + i, width - i);
            store_upto(residual + i, v, width - i);
            v = load_upto(residual + i, width - i);  // what the next layer will read, rounded to its dtype
        }
        squares += v * v;
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / (float)width + eps);
    const Element* normed = residual ? residual : x;
    for (int64_t i = 0; i < width; i += LANES) {
        store_upto(out + i, load_upto(normed + i, width - i) * factor * load_upto(weight + i, width - i), width - i);
    }
}

template <class Element>
void norm_rows(const void* x, int64_t stride, void* residual, const float* weight, float eps, void* out, int64_t rows,
               int64_t width, int threads) {
    rows_in_parallel(rows, width, threads, [&](int64_t row) {
        norm_row((const Element*)x + row * stride, residual ? (Element*)residual + row * width : nullptr, weight, eps,
                 (Element*)out + row * width, width);
    });
}

template <class Element>
void swiglu_rows(const void* gate_up, int64_t stride, void* out, int64_t rows, int64_t width, int threads) {
    rows_in_parallel(rows, 4 * width, threads, [&](int64_t row) {
        const Element *gate = (const Element*)gate_up + row * stride, *up = gate + width;
        Element* to = (Element*)out + row * width;
        for (int64_t i = 0; i < width; i += LANES) {
            Floats g = load_upto(gate + i, width - i), u = load_upto(up + i, width - i);
            store_upto(to + i, g / (1.0f + exp(-g)) * u, width - i);
        }
    });
}

// One head: (first, second) halves are the real and imaginary parts. `to` may be `from`.
template <class From, class To>
void rotate(const From* from, To* to, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t left = half - i;
        Floats a = load_upto(from + i, left), b = load_upto(from + half + i, left);
        Floats c = load_upto(cosine + i, left), s = load_upto(sine + i, left);
        store_upto(to + i, a * c - b * s, left);
        store_upto(to + half + i, b * c + a * s, left);
    }
}

template <class From, class To>
void copy_row(const From* from, To* to, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) store_upto(to + i, load_upto(from + i, width - i), width - i);
}

template <class Element, class Stored>
void rope_rows(void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
               const int64_t* positions, const float* cosine, const float* sine, const Cache& cache, const int64_t* slots,
               int64_t tokens, int64_t heads, int threads) {
    const int64_t head_dim = cache.head_dim, half = head_dim / 2, kv_heads = cache.kv_heads;
    rows_in_parallel(tokens, (heads + 2 * kv_heads) * head_dim, threads, [&](int64_t t) {
        const float *c = cosine + positions[t] * half, *s = sine + positions[t] * half;
        Element* query = (Element*)q + t * q_stride;
        for (int64_t h = 0; h < heads; ++h) rotate(query + h * head_dim, query + h * head_dim, c, s, half);
        if (slots[t] < 0) return;
        const Element *key = (const Element*)k + t * k_stride, *value = (const Element*)v + t * v_stride;
        const int64_t offset = slots[t] % cache.block_size;
        char* block = cache.block(slots[t] / cache.block_size);
        for (int64_t h = 0; h < kv_heads; ++h, key += head_dim, value += head_dim) {
            char *key_to = cache.key(block, h, offset), *value_to = key_to + cache.value_offset();
            if constexpr (std::is_same<Stored, CachedInt8>::value) {
                float rotated[MOST_HEAD_DIM];
                rotate(key, rotated, c, s, half);
                float* scale = cache.key_scale(block, h, offset);
                scale[0] = quantize_row(rotated, head_dim, (CachedInt8*)key_to);
                scale[cache.block_size] = quantize_row(value, head_dim, (CachedInt8*)value_to);
            } else {
                rotate(key, (Stored*)key_to, c, s, half);
                copy_row(value, (Stored*)value_to, head_dim);
            }
        }
    });
}

}  // namespace
}  // namespace paretune

using namespace paretune;

extern "C" void paretune_rms_norm(const void* x, int64_t x_stride, const void* weight, float eps, void* out, int64_t rows,
                                  int64_t width, int is_bf16, int threads) {
    if (is_bf16) {
        norm_rows<uint16_t>(x, x_stride, nullptr, (const float*)weight, eps, out, rows, width, threads);
    } else {
        norm_rows<float>(x, x_stride, nullptr, (const float*)weight, eps, out, rows, width, threads);
    }
}

extern "C" void paretune_add_rms_norm(const void* x, void* residual, const void* weight, float eps, void* out, int64_t rows,
                                      int64_t width, int is_bf16, int threads) {
    if (is_bf16) {
        norm_rows<uint16_t>(x, width, residual, (const float*)weight, eps, out, rows, width, threads);
    } else {
        norm_rows<float>(x, width, residual, (const float*)weight, eps, out, rows, width, threads);
    }
}

extern "C" void paretune_swiglu(const void* gate_up, int64_t stride, void* out, int64_t rows, int64_t width, int is_bf16,
                                int threads) {
    if (is_bf16) {
        swiglu_rows<uint16_t>(gate_up, stride, out, rows, width, threads);
    } else {
        swiglu_rows<float>(gate_up, stride, out, rows, width, threads);
    }
}

// Returns 0, or 1 where head_dim > MOST_HEAD_DIM (a rotated key stays on the stack until its scale is known).
extern "C" int64_t paretune_rope_and_cache(void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v,
                                           int64_t v_stride, int is_bf16, const void* positions, const void* cosine,
                                           const void* sine, void* cache_blocks, int cache_type, int64_t block_size,
                                           const void* slots, int64_t tokens, int64_t heads, int64_t kv_heads,
                                           int64_t head_dim, int threads) {
    if (head_dim > MOST_HEAD_DIM) return 1;
    const Cache cache = {(char*)cache_blocks, (CacheType)cache_type, block_size, kv_heads, head_dim};
    const auto rows_of = [&](auto element) {
        typedef decltype(element) Element;
        return cache_type == CACHE_FP32   ? rope_rows<Element, float>
               : cache_type == CACHE_BF16 ? rope_rows<Element, uint16_t>
               : cache_type == CACHE_FP8  ? rope_rows<Element, CachedFp8>
                                          : rope_rows<Element, CachedInt8>;
    };
    const auto rows = is_bf16 ? rows_of(uint16_t()) : rows_of(float());
    rows(q, q_stride, k, k_stride, v, v_stride, (const int64_t*)positions, (const float*)cosine, (const float*)sine, cache,
         (const int64_t*)slots, tokens, heads, threads);
    return 0;
}
