// All layers of a dense decoder and its head in one call, operator by operator: what runtime/transformer.py does, without a
// trip through Python between two operators, which finds none of its code and data in the caches once a step has streamed its
// weights through them (docs/notes/runtime.md). Whoever changes a layer there changes it here.
// Plain C interface; the caller owns every buffer, the functions allocate, throw and keep nothing.
#include <algorithm>
#include <cstring>

#include "linear.h"
#include "operators.h"
#include "parts.h"
#include "rows.h"

namespace paretune {
namespace {

constexpr int64_t MLP_ROWS = 128;  // most between gate_up and down: enough to multiply at full speed, few enough to keep

struct Layer {  // kernels/decoder.py: _Layer
    const Weight *qkv, *o, *gate_up, *down;
    const float *input_norm, *post_norm;
    const float *q_norm, *k_norm;  // (head_dim,) or null
    void* cache_blocks;
};

struct Model {  // kernels/decoder.py: _Model
    const Layer* layers;
    const int32_t *tiles, *head_tiles;  // as in tile_of_rows
    const void* embedding;              // (vocabulary, hidden) fp32 or bf16, or null: an earlier stage embeds
    const float* norm;                  // before the head
    const Weight* head;                 // null: a later stage has it, and the residual is the result
    const float *cosine, *sine;
    int64_t embedding_is_bf16, num_layers, hidden, inter, heads, kv_heads, head_dim, cache_type, block_size;
    double eps, scale;

    int64_t attention_width() const { return heads * head_dim; }
    int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

struct Step {  // kernels/decoder.py: Decoder.__call__; pointers as runtime/batch.py has them
    const int64_t *token_ids, *positions, *slots;
    const int32_t *block_tables, *query_start, *context_len, *length;
    const int64_t* head_rows;
    int64_t table_stride, tokens, sequences, num_head_rows, decode_only;
    int64_t tile[2];  // of attention
};
static_assert(sizeof(Step) == 15 * 8, "kernels/decoder.py fills it place by place");

struct Pass {  // one call, resolved
    const Model& model;
    const Step& step;
    int threads;
    float* residual;             // (tokens, hidden)
    float *a, *b;                // (tokens, widest that comes into it)
    float *gate_up, *activated;  // (MLP_ROWS, ...)
    char* scratch;
    int64_t scratch_bytes;

    // `of` so many rows of the step, whose tile it is.
    int64_t multiply(const Weight* weight, const float* x, int64_t rows, float* out, int64_t of) const {
        return linear_with_tile(*weight, tile_of_rows(model.tiles, of), x, weight->k, rows, out, scratch, scratch_bytes,
                                threads);
    }

    int64_t multiply_head(const float* x, float* logits) const {
        const int64_t rows = step.num_head_rows;
        return linear_with_tile(*model.head, tile_of_rows(model.head_tiles, rows), x, model.hidden, rows, logits, scratch,
                                scratch_bytes, threads);
    }

    // The rows of an MLP go through it in pieces of nearly equal size; where piece `index` begins.
    static int64_t pieces(int64_t rows) { return (rows + MLP_ROWS - 1) / MLP_ROWS; }
    static int64_t piece_begin(int64_t index, int64_t rows) { return index * rows / pieces(rows); }

    int64_t attend(const Layer& layer) const {
        const int64_t stride = model.qkv_width();
        const Step& s = step;
        if (s.decode_only)
            return paretune_decode_attention(b, stride, 0, layer.cache_blocks, (int)model.cache_type, model.block_size,
                                             s.block_tables, s.table_stride, s.length, s.sequences, model.heads,
                                             model.kv_heads, model.head_dim, (float)model.scale, a, (int)s.tile[0],
                                             (int)s.tile[1], scratch, scratch_bytes, threads);
        return paretune_prefill_attention(b, stride, 0, layer.cache_blocks, (int)model.cache_type, model.block_size,
                                          s.block_tables, s.table_stride, s.query_start, s.context_len, s.sequences,
                                          model.heads, model.kv_heads, model.head_dim, (float)model.scale, a,
                                          (int)s.tile[0], (int)s.tile[1], scratch, scratch_bytes, threads);
    }

    // Scratch that the operators want; asked of the first layer, since all are alike.
    int64_t scratch_needed() const {
        Pass nothing = *this;
        nothing.scratch = nullptr;
        nothing.scratch_bytes = 0;
        const Layer& layer = model.layers[0];
        int64_t most = nothing.attend(layer);
        for (int64_t rows : {step.tokens, step.num_head_rows}) {
            if (rows == 0) continue;
            most = std::max(most, nothing.multiply(layer.qkv, nullptr, rows, nullptr, rows));
            most = std::max(most, nothing.multiply(layer.o, nullptr, rows, nullptr, rows));
            const int64_t fewest = rows / pieces(rows);
            for (int64_t some : {fewest, std::min(rows, fewest + 1)}) {
                most = std::max(most, nothing.multiply(layer.gate_up, nullptr, some, nullptr, rows));
                most = std::max(most, nothing.multiply(layer.down, nullptr, some, nullptr, rows));
            }
        }
        return model.head ? std::max(most, nothing.multiply_head(nullptr, nullptr)) : most;
    }

    void embed() const {
        const int64_t hidden = model.hidden;
        rows_in_parallel(step.tokens, hidden, threads, [&](int64_t token) {
            const int64_t first = step.token_ids[token] * hidden;
            float* to = residual + token * hidden;
            if (!model.embedding_is_bf16) {
                memcpy(to, (const float*)model.embedding + first, (size_t)hidden * 4);
                return;
            }
            const uint16_t* from = (const uint16_t*)model.embedding + first;
            for (int64_t i = 0; i < hidden; i += LANES) store_upto(to + i, load_upto(from + i, hidden - i), hidden - i);
        });
    }

    void normalize_heads(const Layer& layer) const {
        const int64_t width = model.head_dim, stride = model.qkv_width();
        rows_in_parallel(step.tokens, (model.heads + model.kv_heads) * width, threads, [&](int64_t token) {
            float *q = b + token * stride, *k = q + model.attention_width();
            paretune_rms_norm(q, width, layer.q_norm, (float)model.eps, q, model.heads, width, 0, 1);
            paretune_rms_norm(k, width, layer.k_norm, (float)model.eps, k, model.kv_heads, width, 0, 1);
        });
    }

    // Of (tokens, width) the rows of the head, moved to the front; they ascend.
    void keep_head_rows(float* x, int64_t width) const {
        for (int64_t row = 0; row < step.num_head_rows; ++row)
            memmove(x + row * width, x + step.head_rows[row] * width, (size_t)width * 4);
    }

    // a: the normed input of the first layer -> the normed input of the head. Returns what operators that had too little
    // scratch asked for, which scratch_needed() should have known; 0: none.
    int64_t layers() const {
        const int64_t qkv = model.qkv_width(), hidden = model.hidden;
        int64_t missed = 0;
        for (int64_t index = 0; index < model.num_layers; ++index) {
            const Layer& layer = model.layers[index];
            const bool last = index + 1 == model.num_layers;
            missed |= multiply(layer.qkv, a, step.tokens, b, step.tokens);
            if (layer.q_norm) normalize_heads(layer);
            float *k = b + model.attention_width(), *v = k + model.kv_heads * model.head_dim;
            paretune_rope_and_cache(b, qkv, k, qkv, v, qkv, 0, step.positions, model.cosine, model.sine, layer.cache_blocks,
                                    (int)model.cache_type, model.block_size, step.slots, step.tokens, model.heads,
                                    model.kv_heads, model.head_dim, threads);
            missed |= attend(layer);
            int64_t rows = step.tokens;
            if (last && model.head) {
                keep_head_rows(a, model.attention_width());
                keep_head_rows(residual, hidden);
                rows = step.num_head_rows;
            }
            missed |= multiply(layer.o, a, rows, b, rows);
            paretune_add_rms_norm(b, residual, layer.post_norm, (float)model.eps, a, rows, hidden, 0, threads);
            for (int64_t piece = 0; piece < pieces(rows); ++piece) {
                const int64_t first = piece_begin(piece, rows), some = piece_begin(piece + 1, rows) - first;
                missed |= multiply(layer.gate_up, a + first * hidden, some, gate_up, rows);
                paretune_swiglu(gate_up, 2 * model.inter, activated, some, model.inter, 0, threads);
                missed |= multiply(layer.down, activated, some, b + first * hidden, rows);
            }
            const float* norm = last ? model.norm : model.layers[index + 1].input_norm;
            paretune_add_rms_norm(b, residual, norm, (float)model.eps, a, rows, hidden, 0, threads);
        }
        return missed;
    }
};

}  // namespace
}  // namespace paretune

using namespace paretune;

// hidden: (tokens, hidden) fp32, overwritten with the result where the model has no head; null: of a model that embeds and has the
// head. logits: (num_head_rows, vocabulary) fp32. Returns 0, or the bytes of workspace it needs, where `workspace_bytes` are too
// few (nothing is computed then); negative: a defect of this file, and no result.
extern "C" int64_t paretune_decoder(const void* model_address, const void* step_address, void* hidden, void* logits,
                                    void* workspace, int64_t workspace_bytes, int threads) {
    const Model& model = *(const Model*)model_address;
    const Step& step = *(const Step*)step_address;
    if (step.tokens == 0) return 0;
    Pass pass = {model, step, threads, (float*)hidden, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
    Parts parts = {workspace};
    if (!hidden) pass.residual = parts.take<float>(step.tokens * model.hidden);
    pass.a = parts.take<float>(step.tokens * std::max(model.hidden, model.attention_width()));
    pass.b = parts.take<float>(step.tokens * std::max(model.hidden, model.qkv_width()));
    const int64_t some = std::min(step.tokens, MLP_ROWS);
    pass.gate_up = parts.take<float>(some * 2 * model.inter);
    pass.activated = parts.take<float>(some * model.inter);
    pass.scratch_bytes = pass.scratch_needed();
    pass.scratch = parts.take<char>(pass.scratch_bytes);
    if (parts.taken > workspace_bytes) return parts.taken;

    if (model.embedding) pass.embed();
    paretune_rms_norm(pass.residual, model.hidden, model.layers[0].input_norm, (float)model.eps, pass.a, step.tokens, model.hidden,
                      0, threads);
    int64_t missed = pass.layers();
    if (model.head) missed |= pass.multiply_head(pass.a, (float*)logits);
    return missed == 0 ? 0 : -1;
}
