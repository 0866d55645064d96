// What the other operators call of linear.cpp: products of fp32 activations with a packed weight.
#pragma once
#include <cstdint>

namespace paretune {

struct Weight {  // kernels/linear.py: _Weight
    const char* panels;
    const float* scale;       // (n,) per channel, or null: all 1
    const int32_t* zero_sum;  // (n,) 128 * sum of a channel's weights, int8 only
    const float* bias;        // (n,) or null
    int64_t n, k, precision;  // precision: index in kernels/weight_formats.py, as in paretune_linear
};

}  // namespace paretune

extern "C" int64_t paretune_linear(const void* weight, const void* x, int x_is_bf16, int64_t x_row_stride, int64_t rows,
                                   void* out, int row_tile, int row_block, int k_block, int prefetch_bytes,
                                   int serial_below_kmacs, void* workspace, int64_t workspace_bytes, int threads);

namespace paretune {

constexpr int TILE_NUMBERS = 5;  // row_tile, row_block, k_block, prefetch_bytes, serial_below_kmacs

// Of `tiles`, which holds TILE_NUMBERS for each power of two of rows, those of so many.
static inline const int32_t* tile_of_rows(const int32_t* tiles, int64_t rows) {
    int bucket = 0;
    while ((int64_t)1 << bucket < rows) ++bucket;
    return tiles + bucket * TILE_NUMBERS;
}

// paretune_linear on fp32 rows.
static inline int64_t linear_with_tile(const Weight& weight, const int32_t* tile, const float* x, int64_t x_stride,
                                       int64_t rows, float* out, void* workspace, int64_t bytes, int threads) {
    return paretune_linear(&weight, x, 0, x_stride, rows, out, tile[0], tile[1], tile[2], tile[3], tile[4], workspace, bytes,
                           threads);
}

}  // namespace paretune
