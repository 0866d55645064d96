// Mixtures of experts: which experts a token goes to, and their gated MLPs: same names, shapes and reference as kernels/moe.py.
// Plain C interface; the caller owns every buffer, the functions allocate, throw and keep nothing.
#include <algorithm>
#include <limits>

#include "gemm_tile.h"
#include "linear.h"
#include "operators.h"
#include "parts.h"
#include "rows.h"

namespace paretune {
namespace {

constexpr int64_t ROW_BLOCK = 256;  // of one expert at a time: its gathered rows and what lies between its two products

// The k largest logits, the largest first and of equal ones the lower expert; NaN is never larger, and makes every weight NaN.
void route_row(const float* logits, int64_t experts, int64_t k, bool renormalize, int32_t* chosen, float* weight) {
    int64_t found = 0;
    for (int64_t e = 0; e < experts; ++e) {
        if (found == k && !(logits[e] > weight[k - 1])) continue;
        int64_t at = found < k ? found++ : k - 1;
        for (; at > 0 && weight[at - 1] < logits[e]; --at) {
            weight[at] = weight[at - 1];
            chosen[at] = chosen[at - 1];
        }
        weight[at] = logits[e];
        chosen[at] = (int32_t)e;
    }
    const float most = weight[0];
    Floats sums = spread(0.0f);
    for (int64_t e = 0; e < experts; e += LANES) {
        Floats some = spread(-std::numeric_limits<float>::infinity());
        memcpy(&some, logits + e, (size_t)std::min<int64_t>(LANES, experts - e) * 4);
        sums += exp(some - most);
    }
    const float total = sum(sums);
    float of_chosen = 0;
    for (int64_t j = 0; j < k; ++j) {
        weight[j] = exp(spread(weight[j] - most))[0] / total;
        of_chosen += weight[j];
    }
    for (int64_t j = 0; renormalize && j < k; ++j) weight[j] /= of_chosen;
}

struct Experts {  // one call, resolved
    const Weight (*weights)[2];  // of each expert held: gate_up, down
    const int32_t* tiles;        // TILE_NUMBERS for each power of two of rows
    const float* x;
    int64_t x_stride, hidden, inter, block;
    int linear_threads;
    int32_t *start, *token;  // of the rows sorted by expert: where each expert's begin, and whose they are
    float* products;         // (sorted rows, hidden)

    int64_t linear(const Weight& weight, const float* from, int64_t stride, int64_t rows, float* to, void* workspace,
                   int64_t bytes) const {
        return linear_with_tile(weight, tile_of_rows(tiles, rows), from, stride, rows, to, workspace, bytes, linear_threads);
    }

    // Workspace of both products: more rows of one tile never need less.
    int64_t linear_bytes(int64_t rows) const {
        return std::max(linear(weights[0][0], nullptr, 0, rows, nullptr, nullptr, 0),
                        linear(weights[0][1], nullptr, 0, rows, nullptr, nullptr, 0));
    }

    void mlp(int64_t expert, char* memory, int64_t bytes) const {
        Parts parts = {memory};
        float *gathered = parts.take<float>(block * hidden), *gate_up = parts.take<float>(block * 2 * inter);
        float* activated = parts.take<float>(block * inter);
        const int64_t left = bytes - parts.taken;
        char* rest = parts.take<char>(left);
        for (int64_t begin = start[expert]; begin < start[expert + 1]; begin += block) {
            const int64_t rows = std::min<int64_t>(block, start[expert + 1] - begin);
            const float* from = x + token[begin] * x_stride;
            int64_t stride = x_stride;
            if (rows > 1) {
                for (int64_t r = 0; r < rows; ++r) {
                    memcpy(gathered + r * hidden, x + token[begin + r] * x_stride, (size_t)hidden * 4);
                }
                from = gathered;
                stride = hidden;
            }
            linear(weights[expert][0], from, stride, rows, gate_up, rest, left);
            paretune_swiglu(gate_up, 2 * inter, activated, rows, inter, 0, linear_threads);
            linear(weights[expert][1], activated, inter, rows, products + begin * hidden, rest, left);
        }
    }
};

// Whether whole experts, the longest first, keep all threads busy; `order` becomes that order.
bool balanced(const int32_t* start, int64_t count, int threads, int32_t* order, int64_t* load) {
    const auto rows = [&](int32_t e) { return start[e + 1] - start[e]; };
    for (int32_t e = 0; e < count; ++e) order[e] = e;
    std::sort(order, order + count, [&](int32_t a, int32_t b) { return rows(a) != rows(b) ? rows(a) > rows(b) : a < b; });
    std::fill(load, load + threads, 0);
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t cost = tiles_of(rows(order[i]), MAX_ROWS);  // a tile that is not full reads the weights all the same
        *std::min_element(load, load + threads) += cost;
        total += cost;
    }
    return 10 * threads * *std::max_element(load, load + threads) <= 11 * total;
}

}  // namespace
}  // namespace paretune

using namespace paretune;

extern "C" void paretune_route(const void* logits, int64_t stride, int64_t rows, int64_t experts, int64_t k,
                               int renormalize, void* chosen, void* weight, int threads) {
    rows_in_parallel(rows, 4 * experts, threads, [&](int64_t row) {
        route_row((const float*)logits + row * stride, experts, k, renormalize != 0, (int32_t*)chosen + row * k,
                  (float*)weight + row * k);
    });
}

// Experts [first, first + count) are held; choices of others add nothing. `count` > 0. Returns 0, or the bytes of workspace it
// needs, where `workspace_bytes` are too few (nothing is computed then; asked again, it may want more).
extern "C" int64_t paretune_experts(const void* weights, int64_t first, int64_t count, const void* x, int64_t x_stride,
                                    int64_t rows, const void* chosen_experts, const void* routing_weight, int64_t k,
                                    void* result, const void* tiles, void* workspace, int64_t workspace_bytes, int threads) {
    const int32_t* chosen = (const int32_t*)chosen_experts;
    Experts call;
    call.weights = (const Weight(*)[2])weights;
    call.tiles = (const int32_t*)tiles;
    call.x = (const float*)x;
    call.x_stride = x_stride;
    call.hidden = call.weights[0][0].k;
    call.inter = call.weights[0][1].k;

    Parts parts = {workspace};
    const int64_t choices = rows * k;
    call.start = parts.take<int32_t>(count + 1);
    call.token = parts.take<int32_t>(choices);
    int32_t *place = parts.take<int32_t>(choices), *order = parts.take<int32_t>(count), *next = parts.take<int32_t>(count);
    int64_t* load = parts.take<int64_t>(threads);
    if (parts.taken > workspace_bytes) return parts.taken;

    std::fill(call.start, call.start + count + 1, 0);
    const auto held = [&](int64_t choice) { return chosen[choice] >= first && chosen[choice] < first + count; };
    for (int64_t i = 0; i < choices; ++i) {
        if (held(i)) ++call.start[chosen[i] - first + 1];
    }
    int32_t most = 0;
    for (int64_t e = 0; e < count; ++e) {
        most = std::max(most, call.start[e + 1]);
        call.start[e + 1] += call.start[e];
    }
    const bool by_expert = threads > 1 && balanced(call.start, count, threads, order, load);
    const int workers = by_expert ? threads : 1;
    call.linear_threads = by_expert ? 1 : threads;
    call.block = std::min<int64_t>(most, ROW_BLOCK);
    call.products = parts.take<float>(call.start[count] * call.hidden);
    int64_t linear_bytes = 0;
    for (int64_t upto = 1, last = 0; last < call.block; upto *= 2) {
        last = std::min(upto, call.block);
        linear_bytes = std::max(linear_bytes, call.linear_bytes(last));
    }
    Parts own = {nullptr};
    own.take<float>(call.block * call.hidden);
    own.take<float>(call.block * 2 * call.inter);
    own.take<float>(call.block * call.inter);
    own.take<char>(linear_bytes);
    char* memory = parts.take<char>(workers * own.taken);
    if (parts.taken > workspace_bytes) return parts.taken;

    std::copy(call.start, call.start + count, next);
    for (int64_t i = 0; i < choices; ++i) {
        place[i] = held(i) ? next[chosen[i] - first]++ : -1;
        if (place[i] >= 0) call.token[place[i]] = (int32_t)(i / k);
    }
    parallel_items(count, workers, [&](int64_t item, int worker) {
        call.mlp(by_expert ? order[item] : item, memory + worker * own.taken, own.taken);
    });
    rows_in_parallel(rows, k * call.hidden, threads, [&](int64_t row) {
        float* out = (float*)result + row * call.hidden;
        for (int64_t i = 0; i < call.hidden; i += LANES) {
            const int64_t left = call.hidden - i;
            Floats sums = spread(0.0f);
            for (int64_t j = row * k; j < (row + 1) * k; ++j) {
                if (place[j] < 0) continue;
                sums += ((const float*)routing_weight)[j] * load_upto(call.products + place[j] * call.hidden + i, left);
            }
            store_upto(out + i, sums, left);
        }
    });
    return 0;
}
