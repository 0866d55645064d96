// One token per row of logits: the best, or one drawn with a given uniform number; same meaning as kernels/sampling.py. Plain C
// interface; the caller owns every buffer, the functions allocate, throw and keep nothing.
#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "simd.h"

namespace paretune {
namespace {

struct Candidate {
    float weight;  // exp(logit - largest)
    int32_t token;
};
// Heaps and sorts with it bring the largest weight, and of equal ones the smallest token, to the front or the top.
bool worse(const Candidate& a, const Candidate& b) { return a.weight < b.weight || (a.weight == b.weight && a.token > b.token); }
bool better(const Candidate& a, const Candidate& b) { return worse(b, a); }

float largest_of(const float* row, int64_t vocab) {
    Floats most = spread(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= vocab; i += LANES) most = larger(load(row + i), most);
    float largest = largest_lane(most);
    for (; i < vocab; ++i) largest = std::max(largest, row[i]);
    return largest;
}

// The first place whose running sum exceeds `target`; rounding may leave none: then the last.
template <class Weight>
int64_t place_of(int64_t count, double target, const Weight& weight) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        sum += weight(i);
        if (sum > target) return i;
    }
    return count - 1;
}

int64_t draw_whole(const float* weights, int64_t vocab, double total, double uniform) {
    return place_of(vocab, uniform * total, [&](int64_t i) { return weights[i]; });
}

int64_t draw_cut(const float* weights, int64_t vocab, double total, double uniform, int64_t top_k, double top_p,
                 Candidate* candidates) {
    // Tokens below `least` hold less than 1 - top_p together, so none of them is in the nucleus.
    const double least = top_k > 0 ? 0.0 : (1 - top_p) * total / (double)vocab;
    int64_t kept = 0;
    for (int64_t i = 0; i < vocab; ++i) {
        candidates[kept] = {weights[i], (int32_t)i};
        kept += weights[i] >= least;
    }
    if (kept == 0) return 0;  // a NaN among the logits
    if (top_k > 0 && top_k < kept) {
        std::nth_element(candidates, candidates + top_k - 1, candidates + kept, better);
        kept = top_k;
        total = 0;
        for (int64_t i = 0; i < kept; ++i) total += candidates[i].weight;
    }
    // Best first, until the nucleus is whole: popping a heap leaves them in order at its end.
    std::make_heap(candidates, candidates + kept, worse);
    double sum = 0;
    int64_t taken = 0;
    while (taken < kept && (taken == 0 || sum < top_p * total)) {
        std::pop_heap(candidates, candidates + kept - taken, worse);
        ++taken;
        sum += candidates[kept - taken].weight;
    }
    const Candidate* best = candidates + kept - 1;
    return best[-place_of(taken, uniform * sum, [&](int64_t i) { return best[-i].weight; })].token;
}

}  // namespace
}  // namespace paretune

using namespace paretune;

// Of equal logits the first; a NaN counts as the best, so that it is seen.
extern "C" void paretune_argmax(const void* logits, int64_t stride, int64_t rows, int64_t vocab, void* tokens, int threads) {
    parallel_items(rows, rows * vocab < 65536 ? 1 : threads, [&](int64_t r, int) {
        const float* row = (const float*)logits + r * stride;
        const float largest = largest_of(row, vocab);
        int64_t best = 0;
        while (best < vocab - 1 && !(row[best] == largest || row[best] != row[best])) ++best;
        ((int64_t*)tokens)[r] = best;
    });
}

// Returns 0, or the bytes of workspace it needs where `workspace_bytes` are too few (nothing is computed then).
extern "C" int64_t paretune_draw(const void* logits, int64_t stride, int64_t rows, int64_t vocab, const void* uniform,
                                 const void* top_k, const void* top_p, void* tokens, void* workspace,
                                 int64_t workspace_bytes, int threads) {
    threads = rows * vocab < 16384 ? 1 : std::max(1, threads);
    const int64_t own_bytes = (vocab * (int64_t)(sizeof(float) + sizeof(Candidate)) + 63) / 64 * 64;
    if (workspace_bytes < threads * own_bytes) return threads * own_bytes;
    parallel_items(rows, threads, [&](int64_t r, int thread) {
        auto candidates = (Candidate*)((char*)workspace + thread * own_bytes);
        auto weights = (float*)(candidates + vocab);
        const float *row = (const float*)logits + r * stride, largest = largest_of(row, vocab);
        double total = 0;
        for (int64_t i = 0; i < vocab; i += LANES) {
            const int64_t left = std::min<int64_t>(LANES, vocab - i);
            const Floats x = left == LANES ? load(row + i) : load_some(row + i, left);
            const Floats weight = exp(x - largest);
            if (left == LANES) {
                store(weights + i, weight);
                total += sum(weight);
            } else {
                store_some(weights + i, weight, left);
                for (int64_t j = 0; j < left; ++j) total += weight[j];
            }
        }
        const double u = ((const double*)uniform)[r], p = ((const double*)top_p)[r];
        const int64_t k = ((const int64_t*)top_k)[r];
        ((int64_t*)tokens)[r] = k > 0 || p < 1 ? draw_cut(weights, vocab, total, u, k, p, candidates)
                                               : draw_whole(weights, vocab, total, u);
    });
    return 0;
}
