// What decode and prefill attention share: the paged cache, and one sequence with one new token over a part of its context.
#pragma once
#include <algorithm>
#include <cmath>

#include "paged_cache.h"

namespace paretune {

struct Heads {
    int64_t heads, kv_heads, head_dim;
    float scale;
    int64_t group() const { return heads / kv_heads; }
    int64_t padded_dim() const { return (head_dim + PANEL - 1) / PANEL * PANEL; }
};

// Scratch floats that `attend_one_token` needs.
int64_t one_token_scratch(const Heads& shape);

// Attention of one query token over positions [first, last): the weighted sum of V is left unnormalized.
//   q        (heads, head_dim) fp32 or bf16
//   mixed    (heads, padded_dim) out: sum of exp(score - largest) * V
//   largest, total   (heads,) out: the largest score, and the sum of exp(score - largest); -inf and 0 for no positions
void attend_one_token(const Heads& shape, const Cache& cache, const int32_t* blocks, const void* q, bool q_is_bf16,
                      int64_t first, int64_t last, float* mixed, float* largest, float* total, float* scratch);

template <class Element>
static inline Floats load_dims(const Element* row, int64_t dim, int64_t head_dim) {
    return dim + LANES <= head_dim ? load(row + dim) : load_some(row + dim, head_dim - dim);
}

// mixed (heads, padded_dim) / total -> out (heads, head_dim)
template <class Out>
static void write_heads(const Heads& shape, const float* mixed, const float* total, Out* out) {
    for (int64_t h = 0; h < shape.heads; ++h, mixed += shape.padded_dim(), out += shape.head_dim) {
        const float inverse = total[h] > 0 || total[h] != total[h] ? 1.0f / total[h] : 0.0f;
        for (int64_t d = 0; d < shape.head_dim; d += LANES) {
            const int64_t left = shape.head_dim - d;
            if (left >= LANES) {
                store(out + d, load(mixed + d) * inverse);
            } else {
                store_some(out + d, load(mixed + d) * inverse, left);
            }
        }
    }
}

}  // namespace paretune
