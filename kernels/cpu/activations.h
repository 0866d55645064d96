// Rows of x as the dot products eat them: [steps][rows] words. Each Pack writes rows [first, first + rows) to dst, `k_padded` channels
// wide; the int8 ones round them first, row by row.
#pragma once
#include <algorithm>

#include "gemm_tile.h"

namespace paretune {

struct Activations {
    const void* data;
    bool is_bf16;
    int64_t row_stride, width;  // elements
    float* row_scale;           // (rows,) what a rounded row is multiplied with again; int8 only
    int32_t* row_sum;           // (rows,) sum of a rounded row, ternary only
};

// Channels [first, first + count) of a row, zeros where they lie past its end; in `copy` unless they can be read where they are.
static inline const float* row_as_floats(const Activations& x, int64_t row, int64_t first, int64_t count, float* copy) {
    const int64_t k = x.width;
    if (!x.is_bf16) {
        const float* source = (const float*)x.data + row * x.row_stride + first;
        if (first + count <= k) return source;
        std::copy(source, source + (k - first), copy);
    } else {
        const uint16_t* source = (const uint16_t*)x.data + row * x.row_stride + first;
        int64_t i = 0, end = std::min(count, k - first);
        for (; i + LANES <= end; i += LANES) store(copy + i, load(source + i));
        for (; i < end; ++i) copy[i] = to_float(source[i]);
    }
    for (int64_t i = k - first; i < count; ++i) copy[i] = 0;
    return copy;
}

constexpr int64_t STRETCH = 256;  // channels of x packed at a time: 1 KB of fp32, well inside the L1 cache

struct PackFp32 {
    static void pack(const Activations& x, int64_t first, int rows, uint32_t* dst, int64_t k_padded) {
        float copy[STRETCH];
        for (int64_t k = 0; k < k_padded; k += STRETCH) {
            int64_t count = std::min(STRETCH, k_padded - k);
            for (int r = 0; r < rows; ++r) {
                const float* source = row_as_floats(x, first + r, k, count, copy);
                float* to = (float*)dst + k * rows + r;
                if (rows == 1) {
                    memcpy(to, source, (size_t)count * 4);
                } else {
                    for (int64_t i = 0; i < count; ++i) to[i * rows] = source[i];
                }
            }
        }
    }
};

struct PackBf16 {
    static void pack(const Activations& x, int64_t first, int rows, uint32_t* dst, int64_t k_padded) {
#if defined(PARETUNE_BF16_DOT)
        float copy[STRETCH];
        uint16_t halves[STRETCH];
        for (int64_t k = 0; k < k_padded; k += STRETCH) {
            int64_t count = std::min(STRETCH, k_padded - k);
            for (int r = 0; r < rows; ++r) {
                const uint16_t* pairs = halves;
                if (x.is_bf16 && k + count <= x.width) {
                    pairs = (const uint16_t*)x.data + (first + r) * x.row_stride + k;
                } else {
                    const float* source = row_as_floats(x, first + r, k, count, copy);
                    int64_t i = 0;
                    for (; i + LANES <= count; i += LANES) store(halves + i, load(source + i));
                    for (; i < count; ++i) halves[i] = to_bf16(source[i]);
                }
                uint32_t* to = dst + k / 2 * rows + r;
                if (rows == 1) {
                    memcpy(to, pairs, (size_t)count * 2);
                } else {
                    for (int64_t i = 0; i < count / 2; ++i) memcpy(to + i * rows, pairs + 2 * i, 4);
                }
            }
        }
#else
        PackFp32::pack(x, first, rows, dst, k_padded);
#endif
    }
};

// A row rounded to int8 in [-127, 127]: finds its scale, then hands over stretches of `count` integers, k_padded of them in all.
template <class Take>
static inline void round_row(const Activations& x, int64_t row, int64_t k_padded, const Take& take) {
    float copy[STRETCH];
    Floats most = spread(0.0f);
    float most_tail = 0;
    for (int64_t k = 0; k < x.width; k += STRETCH) {
        int64_t count = std::min(STRETCH, x.width - k), i = 0;
        const float* source = row_as_floats(x, row, k, count, copy);
        for (; i + LANES <= count; i += LANES) most = larger(magnitude(load(source + i)), most);
        for (; i < count; ++i) most_tail = std::max(most_tail, __builtin_fabsf(source[i]));
    }
    for (int i = 0; i < LANES; ++i) most_tail = std::max(most_tail, (float)most[i]);
    const float scale = most_tail / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    x.row_scale[row] = scale;
    const float round_bits = 12582912.0f;  // 1.5 * 2**23: rounds to nearest even
    for (int64_t k = 0; k < k_padded; k += STRETCH) {
        int64_t count = std::min(STRETCH, k_padded - k), i = 0;
        const float* source = row_as_floats(x, row, k, count, copy);
        int32_t whole[STRETCH];
        for (; i + LANES <= count; i += LANES) {
            Floats shifted = load(source + i) * inverse + round_bits;
            store_as(whole + i, (Ints)shifted - (Ints)spread(round_bits));
        }
        for (; i < count; ++i) whole[i] = (int32_t)__builtin_rintf(source[i] * inverse);
        take(k, count, whole);
    }
}

// Four integers as the bytes of a word, for [count / 4][stride] words.
static inline void bytes_of(const int32_t* whole, int64_t count, int32_t shift, uint32_t* to, int64_t stride) {
    uint8_t bytes[STRETCH];
    for (int64_t i = 0; i < count; ++i) bytes[i] = (uint8_t)(whole[i] + shift);
    for (int64_t i = 0; i < count / 4; ++i) memcpy(to + i * stride, bytes + 4 * i, 4);
}

struct PackInt8 {
    static void pack(const Activations& x, int64_t first, int rows, uint32_t* dst, int64_t k_padded) {
        for (int r = 0; r < rows; ++r) {
            round_row(x, first + r, k_padded, [&](int64_t k, int64_t count, const int32_t* whole) {
#if defined(PARETUNE_INT8_DOT)
                bytes_of(whole, count, 128, dst + k / 4 * rows + r, rows);
#else
                uint32_t* to = dst + k / 2 * rows + r;
                for (int64_t i = 0; i < count; i += 4, to += 2 * rows) {
                    to[0] = (uint32_t)(whole[i] & 0xffff) | (uint32_t)whole[i + 2] << 16;
                    to[rows] = (uint32_t)(whole[i + 1] & 0xffff) | (uint32_t)whole[i + 3] << 16;
                }
#endif
            });
        }
    }
};

static inline int32_t sum_of(const int32_t* whole, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += whole[i];
    return sum;
}

struct PackInt4 {  // each group of 64: -8 times its sum, then its bytes
    static void pack(const Activations& x, int64_t first, int rows, uint32_t* dst, int64_t k_padded) {
        for (int r = 0; r < rows; ++r) {
            uint32_t* to = dst + r;
            round_row(x, first + r, k_padded, [&](int64_t, int64_t count, const int32_t* whole) {
                for (int64_t i = 0; i < count; i += 64, to += 17 * rows) {
                    *to = (uint32_t)(-8 * sum_of(whole + i, 64));
                    bytes_of(whole + i, 64, 0, to + rows, rows);
                }
            });
        }
    }
};

struct PackTernary {
    static void pack(const Activations& x, int64_t first, int rows, uint32_t* dst, int64_t k_padded) {
        for (int r = 0; r < rows; ++r) {
            int32_t sum = 0;
            round_row(x, first + r, k_padded, [&](int64_t k, int64_t count, const int32_t* whole) {
                sum += sum_of(whole, count);
                bytes_of(whole, count, 0, dst + k / 4 * rows + r, rows);
            });
            x.row_sum[first + r] = sum;
        }
    }
};

}  // namespace paretune
