// One token per row of logits: the best, one drawn with a given uniform number, or the winner of a race; same meaning as
// kernels/sampling.py. Plain C interface; the caller owns every buffer, the functions allocate, throw and keep nothing.
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

uint64_t mix(uint64_t x) {  // SplitMix64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

// Two ways to choose among `count` tokens by their weights.
struct ByNumber {
    const double* uniform;

    template <class Weight, class Token>
    int64_t choose(int64_t row, int64_t count, double total, const Weight& weight, const Token&) const {
        return place_of(count, uniform[row] * total, weight);
    }
};

struct ByRace {
    const uint64_t* seeds;

    // Token i arrives after -log(u_i) / weight_i; u_i is its own number in (0, 1). As -log(u) >= 1 - u, few need a logarithm.
    template <class Weight, class Token>
    int64_t choose(int64_t row, int64_t count, double, const Weight& weight, const Token& token) const {
        double fastest = 0;
        int64_t first = 0;
        for (int64_t i = 0; i < count; ++i) {
            const double u = ((double)(mix(seeds[row] + (uint64_t)(token(i) + 1) * 0x9E3779B97F4A7C15u) >> 12) + 0.5) * 0x1p-52;
            if (weight(i) <= fastest * (1 - u)) continue;
            const double speed = weight(i) / -std::log(u);
            if (speed > fastest) fastest = speed, first = i;
        }
        return first;
    }
};

template <class Choice>
int64_t draw_cut(const float* weights, int64_t vocab, double total, const Choice& choice, int64_t row, int64_t top_k,
                 double top_p, Candidate* candidates) {
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
    const int64_t chosen =
        choice.choose(row, taken, sum, [&](int64_t i) { return best[-i].weight; }, [&](int64_t i) { return best[-i].token; });
    return best[-chosen].token;
}

// Returns 0, or the bytes of workspace it needs where `workspace_bytes` are too few (nothing is computed then).
template <class Choice>
int64_t draw(const float* logits, int64_t stride, int64_t rows, int64_t vocab, const Choice& choice, const int64_t* top_k,
             const double* top_p, int64_t* tokens, void* workspace, int64_t workspace_bytes, int threads) {
    threads = rows * vocab < 16384 ? 1 : std::max(1, threads);
    const int64_t own_bytes = (vocab * (int64_t)(sizeof(float) + sizeof(Candidate)) + 63) / 64 * 64;
    if (workspace_bytes < threads * own_bytes) return threads * own_bytes;
    parallel_items(rows, threads, [&](int64_t r, int thread) {
        auto candidates = (Candidate*)((char*)workspace + thread * own_bytes);
        auto weights = (float*)(candidates + vocab);
        const float *row = logits + r * stride, largest = largest_of(row, vocab);
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
        const auto weight = [&](int64_t i) { return weights[i]; };
        tokens[r] = top_k[r] > 0 || top_p[r] < 1
                        ? draw_cut(weights, vocab, total, choice, r, top_k[r], top_p[r], candidates)
                        : choice.choose(r, vocab, total, weight, [](int64_t i) { return i; });
    });
    return 0;
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

// Both return what draw does.
extern "C" int64_t paretune_draw(const void* logits, int64_t stride, int64_t rows, int64_t vocab, const void* uniform,
                                 const void* top_k, const void* top_p, void* tokens, void* workspace,
                                 int64_t workspace_bytes, int threads) {
    return draw((const float*)logits, stride, rows, vocab, ByNumber{(const double*)uniform}, (const int64_t*)top_k,
                (const double*)top_p, (int64_t*)tokens, workspace, workspace_bytes, threads);
}

extern "C" int64_t paretune_race(const void* logits, int64_t stride, int64_t rows, int64_t vocab, const void* seeds,
                                 const void* top_k, const void* top_p, void* tokens, void* workspace,
                                 int64_t workspace_bytes, int threads) {
    return draw((const float*)logits, stride, rows, vocab, ByRace{(const uint64_t*)seeds}, (const int64_t*)top_k,
                (const double*)top_p, (int64_t*)tokens, workspace, workspace_bytes, threads);
}
