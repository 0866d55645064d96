// Causal attention of any number of new tokens per sequence over a paged KV cache: same name, shapes and reference as
// kernels/prefill_attention.py. Plain C interface; the caller owns every buffer, the functions allocate, throw and keep nothing.
// One work item is a block of query tokens under one KV head, with the query heads of its group as further rows: two matrix
// products on register tiles, with the running softmax between them (Dao et al., arXiv:2205.14135).
#include <type_traits>

#include "attention.h"
#include "gemm_tile.h"
#include "parallel.h"

namespace paretune {
namespace {

constexpr int KEYS = 64;  // tokens of context per step; a row of scores is 256 bytes
static_assert(KEYS % PANEL == 0, "whole panels of keys");

#define PARETUNE_PACKED(R) packed_tile<Dot, R>
#define PARETUNE_STRIDED(R) strided_tile<Dot, R, KEYS>

template <class Dot>
TileFunction<Dot> packed_tile_of(int rows) {
    static const TileFunction<Dot> functions[] = PARETUNE_EACH_ROW_COUNT(PARETUNE_PACKED);
    return functions[rows - 1];
}
template <class Dot>
TileFunction<Dot> strided_tile_of(int rows) {
    static const TileFunction<Dot> functions[] = PARETUNE_EACH_ROW_COUNT(PARETUNE_STRIDED);
    return functions[rows - 1];
}

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Where everything of one work item lies, in 4-byte words from the start of a thread's scratch memory.
struct Layout {
    int64_t rows, k_words, v_dims;
    int64_t queries, keys, values, scores, mixed, largest, total, widened, end;
    Layout(const Heads& shape, int64_t query_rows) {
        rows = query_rows * shape.group();
        k_words = shape.head_dim;  // fp32; bf16 pairs need half
        v_dims = round_up(shape.head_dim, PANEL);
        queries = 0;
        keys = queries + round_up(rows * k_words, 16);
        values = keys + KEYS * k_words;
        scores = values + KEYS * v_dims;
        mixed = scores + rows * KEYS;
        largest = mixed + rows * v_dims;
        total = largest + round_up(rows, 16);
        widened = total + round_up(rows, 16);
        end = widened + round_up(2 * KEYS * shape.head_dim, 16);
    }
};

// How the words of queries, keys and values are made: fp32, or bf16 pairs where there is a dot product for them.
template <class Element>
struct AsFp32 {
    typedef Fp32Dot Dot;
    static int64_t steps(int64_t dims) { return dims; }

    static void pack_keys(const Element* const* rows, int64_t tokens, int64_t head_dim, uint32_t* keys) {
        for (int64_t t = 0; t < tokens; t += LANES) {
            float* to = (float*)keys + t / PANEL * PANEL * head_dim + t % PANEL;
            for (int64_t d = 0; d < head_dim; d += LANES) {
                const int64_t dims = std::min<int64_t>(LANES, head_dim - d);
                float square[LANES][LANES];
                for (int i = 0; i < LANES; ++i) store(square[i], load_dims(rows[std::min(t + i, tokens - 1)], d, head_dim));
                for (int64_t j = 0; j < dims; ++j) {
                    for (int i = 0; i < LANES; ++i) to[(d + j) * PANEL + i] = square[i][j];
                }
            }
        }
    }
    static void pack_values(const Element* const* rows, int64_t tokens, int64_t head_dim, uint32_t* values) {
        for (int64_t d = 0; d < head_dim; d += LANES) {
            float* to = (float*)values + d / PANEL * PANEL * KEYS + d % PANEL;
            for (int64_t t = 0; t < tokens; ++t) store(to + t * PANEL, load_dims(rows[t], d, head_dim));
        }
    }
    static void put_query(const float* q, int64_t dims, int rows, uint32_t* to) {
        for (int64_t d = 0; d < dims; ++d) memcpy(to + d * rows, q + d, 4);
    }
    static void put_weights(Floats weights, int64_t token, uint32_t* row) { store((float*)row + token, weights); }
};

#if defined(PARETUNE_BF16_DOT)
struct AsBf16 {
    typedef Bf16Dot Dot;
    static int64_t steps(int64_t dims) { return (dims + 1) / 2; }

    static void pack_keys(const uint16_t* const* rows, int64_t tokens, int64_t head_dim, uint32_t* keys) {
        const int64_t words = steps(head_dim);
        for (int64_t t = 0; t < tokens; t += LANES) {
            uint32_t* to = keys + t / PANEL * PANEL * words + t % PANEL;
            for (int64_t w = 0; w < words; w += LANES) {
                const int64_t count = std::min<int64_t>(LANES, words - w);
                uint32_t square[LANES][LANES] = {};
                for (int i = 0; i < LANES; ++i) {
                    const size_t bytes = (size_t)std::min<int64_t>(4 * LANES, 2 * (head_dim - 2 * w));
                    const uint16_t* from = rows[std::min(t + i, tokens - 1)] + 2 * w;
                    if (bytes == 4 * LANES) {
                        store_as(square[i], load_as<Words>(from));
                    } else {
                        memcpy(square[i], from, bytes);
                    }
                }
                for (int64_t j = 0; j < count; ++j) {
                    for (int i = 0; i < LANES; ++i) to[(w + j) * PANEL + i] = square[i][j];
                }
            }
        }
    }
    static void pack_values(const uint16_t* const* rows, int64_t tokens, int64_t head_dim, uint32_t* values) {
        for (int64_t d = 0; d < head_dim; d += LANES) {
            uint32_t* to = values + d / PANEL * PANEL * (KEYS / 2) + d % PANEL;
            for (int64_t t = 0; t < tokens; t += 2, to += PANEL) {
                Words even = (Words)load_dims(rows[t], d, head_dim);
                Words odd = t + 1 < tokens ? (Words)load_dims(rows[t + 1], d, head_dim) : spread_word(0);
                store_as(to, odd | even >> 16);
            }
        }
    }
    static void put_query(const float* q, int64_t dims, int rows, uint32_t* to) {
        for (int64_t d = 0; d < dims; d += 2) {
            to[d / 2 * rows] = (uint32_t)to_bf16(q[d]) | (d + 1 < dims ? (uint32_t)to_bf16(q[d + 1]) << 16 : 0);
        }
    }
    static void put_weights(Floats weights, int64_t token, uint32_t* row) { store((uint16_t*)row + token, weights); }
};
#endif

// 8-bit rows become rows of what the dot product eats, scales and all: once for all queries of a block.
#if defined(PARETUNE_BF16_DOT)
typedef AsBf16 AsWide;
typedef uint16_t Wide;
typedef AsBf16 AsStoredBf16;
#else
typedef AsFp32<float> AsWide;
typedef float Wide;
typedef AsFp32<uint16_t> AsStoredBf16;
#endif

template <class Stored>
void widen_row(const Stored* row, float scale, int64_t head_dim, Wide* to) {
    for (int64_t d = 0; d < head_dim; d += LANES) {
        const Floats wide = load_dims(row, d, head_dim) * scale;
        if (head_dim - d >= LANES) {
            store(to + d, wide);
        } else {
            store_some(to + d, wide, head_dim - d);
        }
    }
}

struct Call {
    Heads shape;
    Cache cache;
    const void* q;
    bool q_is_bf16;
    int64_t q_stride;
    void* out;
};

template <class Format>
void pack_queries(const Call& call, const Layout& at, int64_t first_row, int64_t kv_head, int64_t rows, int64_t tiles,
                  uint32_t* scratch) {
    const int64_t group = call.shape.group(), head_dim = call.shape.head_dim, steps = Format::steps(head_dim);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t begin = tile_begin(tile, tiles, rows), end = tile_begin(tile + 1, tiles, rows);
        for (int64_t r = begin; r < end; ++r) {
            const int64_t start = (first_row + r / group) * call.q_stride + (kv_head * group + r % group) * head_dim;
            uint32_t* to = scratch + at.queries + begin * steps + (r - begin);
            if (call.q_is_bf16) {
                for (int64_t d = 0; d < head_dim; d += LANES) {
                    float part[LANES];
                    store(part, load_dims((const uint16_t*)call.q + start, d, head_dim));
                    Format::put_query(part, std::min<int64_t>(LANES, head_dim - d), (int)(end - begin),
                                      to + Format::steps(d) * (end - begin));
                }
            } else {
                Format::put_query((const float*)call.q + start, head_dim, (int)(end - begin), to);
            }
        }
    }
}

// Scores [0, visible) of a row become weights in the format of the second product; the rest up to KEYS become 0.
template <class Format>
void softmax_row(float* scores, int64_t visible, float scale, float* mixed, int64_t dims, float* largest, float* total) {
    Ints lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    Floats most = spread(-INFINITY), parts[KEYS / LANES];
    for (int v = 0; v < KEYS / LANES; ++v) {
        Floats score = load(scores + v * LANES) * scale;
        parts[v] = lane + v * LANES < (int32_t)visible ? score : spread(-INFINITY);
        most = larger(parts[v], most);
    }
    const float peak = std::max(*largest, largest_lane(most));
    Floats sums = spread(0.0f);
    for (int v = 0; v < KEYS / LANES; ++v) {
        Floats weight = exp(parts[v] - peak);
        sums += weight;
        Format::put_weights(weight, v * LANES, (uint32_t*)scores);
    }
    if (peak > *largest) {
        const float down = std::exp(*largest - peak);
        *total *= down;
        for (int64_t d = 0; d < dims; d += LANES) store(mixed + d, load(mixed + d) * down);
        *largest = peak;
    }
    *total += sum(sums);
}

// Query tokens first_row .. first_row + tokens of one sequence, which stand at positions first_position and on.
template <class Format, class Element, class Stored>
void attend_block(const Call& call, const Layout& at, const int32_t* blocks, int64_t first_row, int64_t tokens,
                  int64_t first_position, int64_t kv_head, uint32_t* scratch) {
    typedef typename Format::Dot Dot;
    const int64_t group = call.shape.group(), head_dim = call.shape.head_dim, rows = tokens * group;
    const int64_t tiles = tiles_of(rows, MAX_ROWS), steps = Format::steps(head_dim);
    float *scores = (float*)scratch + at.scores, *mixed = (float*)scratch + at.mixed;
    float *largest = (float*)scratch + at.largest, *total = (float*)scratch + at.total;
    std::fill(mixed, mixed + rows * at.v_dims, 0.0f);
    std::fill(largest, largest + rows, -INFINITY);
    std::fill(total, total + rows, 0.0f);
    pack_queries<Format>(call, at, first_row, kv_head, rows, tiles, scratch);

    const int64_t length = first_position + tokens;  // positions that the last query token sees
    for (int64_t start = 0; start < length; start += KEYS) {
        const int64_t keys = std::min<int64_t>(KEYS, length - start);
        const Element *k_rows[KEYS], *v_rows[KEYS];
        for (int64_t t = 0; t < keys; ++t) {
            const int64_t offset = (start + t) % call.cache.block_size;
            char* block = call.cache.block(blocks[(start + t) / call.cache.block_size]);
            const char *key = call.cache.key(block, kv_head, offset), *value = key + call.cache.value_offset();
            if constexpr (std::is_same<Element, Stored>::value) {
                k_rows[t] = (const Element*)key;
                v_rows[t] = (const Element*)value;
            } else {
                Element* wide = (Element*)(scratch + at.widened) + 2 * t * head_dim;
                const float* scale = call.cache.key_scale(block, kv_head, offset);
                const bool scaled = std::is_same<Stored, CachedInt8>::value;
                widen_row((const Stored*)key, scaled ? scale[0] : 1.0f, head_dim, wide);
                widen_row((const Stored*)value, scaled ? scale[call.cache.block_size] : 1.0f, head_dim, wide + head_dim);
                k_rows[t] = wide;
                v_rows[t] = wide + head_dim;
            }
        }
        Format::pack_keys(k_rows, keys, head_dim, scratch + at.keys);
        Format::pack_values(v_rows, keys, head_dim, scratch + at.values);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t begin = tile_begin(tile, tiles, rows), end = tile_begin(tile + 1, tiles, rows);
            // Keys that the last, and so any, row of the tile sees in this step.
            const int64_t seen = std::min(keys, first_position + (end - 1) / group + 1 - start);
            if (seen <= 0) continue;
            const int height = (int)(end - begin);
            for (int64_t key = 0; key < seen; key += PANEL) {
                packed_tile_of<Dot>(height)(steps, scratch + at.queries + begin * steps, scratch + at.keys + key * steps,
                                            scores + begin * KEYS + key, KEYS, false, 0);
            }
            for (int64_t r = begin; r < end; ++r) {
                const int64_t visible = std::min(keys, first_position + r / group + 1 - start);
                softmax_row<Format>(scores + r * KEYS, visible, call.shape.scale, mixed + r * at.v_dims, at.v_dims,
                                    largest + r, total + r);
            }
            for (int64_t d = 0; d < at.v_dims; d += PANEL) {
                strided_tile_of<Dot>(height)(Format::steps(seen), scores + begin * KEYS,
                                             scratch + at.values + Format::steps(d * KEYS), mixed + begin * at.v_dims + d,
                                             at.v_dims, true, 0);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const Heads one = {1, 1, head_dim, 0};
        const int64_t to = ((first_row + r / group) * call.shape.heads + kv_head * group + r % group) * head_dim;
        if (call.q_is_bf16) {
            write_heads(one, mixed + r * at.v_dims, total + r, (uint16_t*)call.out + to);
        } else {
            write_heads(one, mixed + r * at.v_dims, total + r, (float*)call.out + to);
        }
    }
}

void attend_single(const Call& call, const int32_t* blocks, int64_t row, int64_t length, float* scratch) {
    const Heads& shape = call.shape;
    float *mixed = scratch, *largest = mixed + shape.heads * shape.padded_dim(), *total = largest + shape.heads;
    attend_one_token(shape, call.cache, blocks, (const char*)call.q + row * call.q_stride * (call.q_is_bf16 ? 2 : 4),
                     call.q_is_bf16, 0, length, mixed, largest, total, total + shape.heads);
    if (call.q_is_bf16) {
        write_heads(shape, mixed, total, (uint16_t*)call.out + row * shape.heads * shape.head_dim);
    } else {
        write_heads(shape, mixed, total, (float*)call.out + row * shape.heads * shape.head_dim);
    }
}

}  // namespace
}  // namespace paretune

using namespace paretune;

// Returns 0, or the bytes of workspace it needs where `workspace_bytes` are too few (nothing is computed then).
extern "C" int64_t paretune_prefill_attention(const void* q, int64_t q_stride, int q_is_bf16, void* cache_blocks,
                                              int cache_type, int64_t block_size, const void* block_tables, int64_t table_stride, const void* query_start,
                                              const void* context_len, int64_t sequences, int64_t heads, int64_t kv_heads,
                                              int64_t head_dim, float scale, void* out, int query_rows, int serial_below_kmacs,
                                              void* workspace, int64_t workspace_bytes, int threads) {
    const Call call = {{heads, kv_heads, head_dim, scale},
                       {(char*)cache_blocks, (CacheType)cache_type, block_size, kv_heads, head_dim},
                       q, q_is_bf16 != 0, q_stride, out};
    const int32_t *starts = (const int32_t*)query_start, *contexts = (const int32_t*)context_len;
    const int32_t* tables = (const int32_t*)block_tables;
    int64_t most_rows = 1, multiply_adds = 0, items = 0;
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t rows = starts[s + 1] - starts[s];
        most_rows = std::max(most_rows, rows);
        multiply_adds += 2 * rows * (contexts[s] + rows) * heads * head_dim;
    }
    // Keys and values are packed once per block of queries: 256 rows make that a small part of the work.
    const int64_t wished = query_rows > 0 ? query_rows : std::max<int64_t>(8, 256 / call.shape.group());
    const int64_t block = std::min(wished, most_rows);
    threads = multiply_adds < (int64_t)serial_below_kmacs * 1000 ? 1 : std::max(1, threads);
    const Layout at(call.shape, block);
    const int64_t single = heads * call.shape.padded_dim() + 2 * heads + one_token_scratch(call.shape);
    const int64_t scratch_words = round_up(std::max(at.end, single), 16), offset_bytes = round_up((sequences + 1) * 8, 64);
    const int64_t needed = offset_bytes + threads * scratch_words * 4;
    if (workspace_bytes < needed) return needed;
    int64_t* first_item = (int64_t*)workspace;
    uint32_t* scratch = (uint32_t*)((char*)workspace + offset_bytes);
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t rows = starts[s + 1] - starts[s];
        first_item[s] = items;
        items += rows == 1 ? 1 : (rows + block - 1) / block * kv_heads;
    }
    first_item[sequences] = items;
    parallel_items(items, threads, [&](int64_t index, int thread) {
        const int64_t item = items - 1 - index;  // the last blocks of a prompt see most: longest first
        const int64_t s = std::upper_bound(first_item, first_item + sequences + 1, item) - first_item - 1;
        const int32_t* blocks = tables + s * table_stride;
        const int64_t rows = starts[s + 1] - starts[s];
        uint32_t* own = scratch + thread * scratch_words;
        if (rows == 1) {
            attend_single(call, blocks, starts[s], contexts[s] + 1, (float*)own);
            return;
        }
        const int64_t within = item - first_item[s], first = within / kv_heads * block, kv_head = within % kv_heads;
        const int64_t tokens = std::min(block, rows - first);
        const auto attend = call.cache.type == CACHE_FP32   ? attend_block<AsFp32<float>, float, float>
                            : call.cache.type == CACHE_BF16 ? attend_block<AsStoredBf16, uint16_t, uint16_t>
                            : call.cache.type == CACHE_FP8  ? attend_block<AsWide, Wide, CachedFp8>
                                                            : attend_block<AsWide, Wide, CachedInt8>;
        attend(call, at, blocks, starts[s] + first, tokens, contexts[s] + first, kv_head, own);
    });
    return 0;
}
