// What the other operators call of linear.cpp.
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
