// The operators that others call; what they compute stands in their own files.
#pragma once
#include <cstdint>

extern "C" {
void paretune_rms_norm(const void* x, int64_t x_stride, const void* weight, float eps, void* out, int64_t rows, int64_t width,
                       int is_bf16, int threads);
void paretune_add_rms_norm(const void* x, void* residual, const void* weight, float eps, void* out, int64_t rows,
                           int64_t width, int is_bf16, int threads);
void paretune_swiglu(const void* gate_up, int64_t stride, void* out, int64_t rows, int64_t width, int is_bf16, int threads);
int64_t paretune_rope_and_cache(void* q, int64_t q_stride, const void* k, int64_t k_stride, const void* v, int64_t v_stride,
                                int is_bf16, const void* positions, const void* cosine, const void* sine,
                                void* cache_blocks, int cache_type, int64_t block_size, const void* slots, int64_t tokens,
                                int64_t heads, int64_t kv_heads, int64_t head_dim, int threads);
int64_t paretune_decode_attention(const void* q, int64_t q_stride, int q_is_bf16, void* cache_blocks, int cache_type,
                                  int64_t block_size, const void* block_tables, int64_t table_stride,
                                  const void* context_len, int64_t sequences, int64_t heads, int64_t kv_heads,
                                  int64_t head_dim, float scale, void* out, int split_tokens, int serial_below_tokens,
                                  void* workspace, int64_t workspace_bytes, int threads);
int64_t paretune_prefill_attention(const void* q, int64_t q_stride, int q_is_bf16, void* cache_blocks, int cache_type,
                                   int64_t block_size, const void* block_tables, int64_t table_stride,
                                   const void* query_start, const void* context_len, int64_t sequences, int64_t heads,
                                   int64_t kv_heads, int64_t head_dim, float scale, void* out, int query_rows,
                                   int serial_below_kmacs, void* workspace, int64_t workspace_bytes, int threads);
}
