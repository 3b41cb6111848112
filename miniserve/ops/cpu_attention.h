// Paged attention: FlashAttention's loop (arXiv 2205.14135) over the pages of PagedAttention (arXiv 2309.06180). A work
// item is a block of queries of one sequence for one key/value head; the query heads that share that head are further
// rows of the same block. For 64 keys at a time: look them up in the page table, multiply, fold the scores into the
// running softmax, multiply with the values. A decode is a block of one query, so both cases are the same code.
//
// Keys and values lie in their pages as the matrix kernel reads them: a decode uses each once, so that to rearrange them
// then would take longer than to multiply.

#pragma once

#include "cpu_products.h"

// What all layers of a step share; ops/native.py reads its fields here. Counts are in elements unless said otherwise.
struct Batch {
    int32_t sequences;
    const int32_t *starts, *lengths, *contexts;  // [sequences]: first row, new tokens, tokens with these
    const int32_t* tables;                       // [sequences]: where its pages begin in `pages`
    const int32_t* slots;                        // [sequences]: of its recurrent state, if the model has one
    const int32_t* pages;                        // page numbers
    void* pool;                                  // [page, layer, k/v, kv_head, group], see `PagedAttention`
    int32_t layers, page_tokens, kv_heads, dim;  // of the pool
    void* conv;                                  // [slot, layer, taps - 1, channels], slots `conv_slot` apart
    float* delta;                                // [slot, layer, v_head, k_dim, v_dim], slots `delta_slot` apart
    int64_t conv_slot, delta_slot;
};

namespace {

constexpr int BAND = TILES ? TILE_ROWS : ROWS;  // rows of scores that are computed at once

// LANES tokens of a page are a group. A head's keys of one are [word, token], two neighbouring numbers of a bf16 key in
// a word; its values are [word, dim], those of two neighbouring tokens in a word:
//
//   keys     token 0        1            15       values   dim 0          1           ...
//   word 0 | k0  k1  | k0  k1  | ... | k0  k1  |   word 0 | t0  t1  | t0  t1  | ... |
//        1 | k2  k3  | k2  k3  | ... | k2  k3  |        1 | t2  t3  | t2  t3  | ... |
//
// 16 words of keys are a tile as they lie; so are 16 of values, of which a group has 8.
template <typename T>
struct PagedAttention {
    const Batch& batch;
    int layer, heads;
    float scale;
    int window;  // of the last so many tokens a query sees, itself included; 0: all
    const T *q, *gates;
    int64_t q_stride;
    T* out;

    static constexpr int PER_WORD = 4 / sizeof(T);  // numbers in a word

    // The keys (kv = 0) or values (1) of the group that token `at` of a sequence is in.
    uint32_t* group(int sequence, int head, int at, int kv) const {
        int64_t page = batch.pages[batch.tables[sequence] + at / batch.page_tokens];
        int64_t half = (page * batch.layers + layer) * 2 + kv;
        int64_t slot = (half * batch.kv_heads + head) * batch.page_tokens + at % batch.page_tokens / LANES * LANES;
        return static_cast<uint32_t*>(batch.pool) + slot * (batch.dim / PER_WORD);
    }

    // The new keys and values, [T, kv_heads, dim] with rows `k_stride` and `v_stride` apart, into their groups.
    void store_new(const T* k, int64_t k_stride, const T* v, int64_t v_stride) const {
        const int dim = batch.dim, words = dim / PER_WORD;
#pragma omp for collapse(2) schedule(dynamic)
        for (int s = 0; s < batch.sequences; s++)
            for (int head = 0; head < batch.kv_heads; head++)
                for (int i = 0; i < batch.lengths[s];) {
                    const int at = batch.contexts[s] - batch.lengths[s] + i, lane = at % LANES;
                    const int64_t row = batch.starts[s] + i;
                    const T *key = k + row * k_stride + head * dim, *value = v + row * v_stride + head * dim;
                    uint32_t *keys = group(s, head, at, 0), *values = group(s, head, at, 1);
                    if (lane == 0 && i + LANES <= batch.lengths[s]) {
                        store_group(key, k_stride, value, v_stride, keys, values);
                        i += LANES;
                        continue;
                    }
                    // What an earlier sequence has left could be NaN, which no weight of 0 makes harmless.
                    if (lane == 0) std::memset(values, 0, LANES * words * sizeof *values);
                    T* to = reinterpret_cast<T*>(values) + lane / PER_WORD * dim * PER_WORD + lane % PER_WORD;
                    for (int w = 0; w < words; w++) std::memcpy(keys + w * LANES + lane, key + w * PER_WORD, 4);
                    for (int d = 0; d < dim; d++) to[d * PER_WORD] = value[d];
                    i++;
                }
    }

    // The same for all tokens of a group.
    void store_group(const T* key, int64_t k_stride, const T* value, int64_t v_stride, uint32_t* keys,
                     uint32_t* values) const {
        for (int w = 0; w < batch.dim / PER_WORD; w += LANES) {
            Words square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load_as<Words>(key + i * k_stride + w * PER_WORD);
            transpose(square);
            std::memcpy(keys + w * LANES, square, sizeof square);
        }
        for (int i = 0; i < LANES; i += PER_WORD, value += PER_WORD * v_stride)
            for (int d = 0; d < batch.dim; d += LANES, values += LANES) {
                Words both;
                if constexpr (PER_WORD == 1)
                    both = load_as<Words>(value + d);
                else
                    both = widened(value + d) | widened(value + v_stride + d) << 16;
                std::memcpy(values, &both, sizeof both);
            }
    }

    // Where the keys and values of KEYS tokens lie, from token `first` on. Past the last visible one any group will do:
    // its weights will be 0. No hardware foresees the next page, so it is prefetched here, while the block before is
    // computed.
    void find_block(int sequence, int head, int first, int visible, const uint32_t** keys,
                    const uint32_t** values) const {
        const int size = LANES * batch.dim / PER_WORD, line = 16;  // words
        for (int g = 0; g < GROUPS; g++) {
            const int at = std::min(first + g * LANES, visible - 1);
            keys[g] = group(sequence, head, at, 0);
            values[g] = group(sequence, head, at, 1);
            if (first + g * LANES >= visible) continue;
            for (int w = 0; w < size; w += line) {
                __builtin_prefetch(keys[g] + w, 0, 2);
                __builtin_prefetch(values[g] + w, 0, 2);
            }
        }
    }

    // Queries `begin` to `end` of a sequence's new tokens, for the query heads that share key/value head `head`. Blocks of
    // keys that no query of the block sees are not looked at; nor are those that none of a band sees.
    //
    //   keys     first          first + KEYS
    //   query 0 | . x x x x x x x | x . . . . . . . |     x: seen, the last `window` of each query
    //         1 | . . x x x x x x | x x . . . . . . |
    void attend(int sequence, int head, int begin, int end, Scratch& scratch) const {
        const int dim = batch.dim, group = heads / batch.kv_heads;
        const int words = dim / PER_WORD, key_words = KEYS / PER_WORD, group_words = LANES / PER_WORD;
        const int rows = (end - begin) * group, width = (dim + COLS - 1) / COLS * COLS;
        const int before = batch.contexts[sequence] - batch.lengths[sequence];

        const bool tiles = std::is_same<T, bf16>::value && tiles_allowed();
        uint32_t* gathered = room(scratch, key_words * dim + rows * (words + width + LANES + 1) + BAND * KEYS * 2);
        uint32_t* queries = gathered + key_words * dim;                         // [rows, words]
        float* sums = reinterpret_cast<float*>(queries + rows * words);         // [rows, width]: weighted values
        float* total = sums + rows * width;                                     // [rows, LANES]: sums of weights so far
        float* scores = total + rows * LANES;                                   // [BAND, KEYS]
        uint32_t* weights = reinterpret_cast<uint32_t*>(scores + BAND * KEYS);  // [BAND, key_words]
        float* largest = reinterpret_cast<float*>(weights + BAND * key_words);  // [rows]: largest score so far

        for (int r = 0; r < rows; r++) {
            int64_t token = batch.starts[sequence] + begin + r / group;
            std::memcpy(queries + r * words, q + token * q_stride + (head * group + r % group) * dim, dim * sizeof(T));
            largest[r] = -INFINITY;
        }
        std::fill(sums, sums + rows * width, 0.0f);
        std::fill(total, total + rows * LANES, 0.0f);

        const float sharpness = scale * 1.4426950408889634f;  // weights are 2^x instead of e^x
        const int visible = before + end;                     // keys that the last query sees
        const auto oldest = [&](int query) { return window ? std::max(before + query + 1 - window, 0) : 0; };
        const int start = oldest(begin) / KEYS * KEYS;
        const uint32_t *keys[2][GROUPS], *values[2][GROUPS];  // of this block and the next
        find_block(sequence, head, start, visible, keys[0], values[0]);
        for (int first = start, now = 0; first < visible; first += KEYS, now ^= 1) {
            if (first + KEYS < visible)
                find_block(sequence, head, first + KEYS, visible, keys[now ^ 1], values[now ^ 1]);
            // A tile of values is those of two groups, which lie in two pages.
            for (int g = 0; tiles && g < GROUPS; g++)
                std::memcpy(gathered + g * group_words * dim, values[now][g], group_words * dim * sizeof *gathered);
            for (int r = 0; r < rows; r += BAND) {
                const int count = std::min(BAND, rows - r);
                const int earliest = begin + r / group, latest = begin + (r + count - 1) / group;
                if (before + latest < first || oldest(earliest) >= first + KEYS) continue;
                if (tiles)
                    multiply_tiles(count, queries + r * words, words, Keys{keys[now]}, 1, words, scores, KEYS, false,
                                      [](int) {});
                else
                    for (int c = 0; c < KEYS; c += COLS)
                        multiply_all<T>(count, queries + r * words, words, Keys{keys[now] + c / LANES}, 1, words,
                                        scores + c, KEYS, false);
                for (int i = 0; i < count; i++) {
                    const int query = begin + (r + i) / group;  // sees keys of this block from `hidden` to `seen`
                    const int hidden = oldest(query) - first, seen = before + query + 1 - first;
                    soften(scores + i * KEYS, hidden, seen, sharpness, largest[r + i], total + (r + i) * LANES,
                           sums + (r + i) * width, width, reinterpret_cast<T*>(weights + i * key_words));
                }
                for (int d = 0; d < width; d += COLS)
                    if (tiles)
                        multiply_tiles(count, weights, key_words, GatheredValues{gathered, d, dim}, GROUPS / 2,
                                          TILE_WORDS, sums + r * width + d, width, true, [](int) {});
                    else
                        multiply_all<T>(count, weights, key_words, Values{values[now], d, dim}, GROUPS, group_words,
                                        sums + r * width + d, width, true);
            }
        }

        for (int r = 0; r < rows; r++) {
            const int64_t token = batch.starts[sequence] + begin + r / group, at = (head * group + r % group) * dim;
            T* to = out + token * heads * dim + at;
            const float share = 1 / sum_lanes(load(total + r * LANES));
            for (int d = 0; d < dim; d += LANES) {
                const Floats found = load(sums + r * width + d) * share;
                store(to + d, gates ? found * sigmoid<T>(load(gates + token * q_stride + at + d)) : found);
            }
        }
    }

    // A row of KEYS scores as weights 2^(score * sharpness - largest), of which only the keys from `hidden` to `seen` count.
    // `largest` is the largest product so far, or up to SLACK less: when it grows from a to b, what was summed up before
    // has to shrink by 2^(a - b), and that rarely.
    static void soften(const float* scores, int hidden, int seen, float sharpness, float& largest, float* total,
                       float* sums, int width, T* weights) {
        constexpr float SLACK = 8;
        if (seen <= 0 || hidden >= KEYS) {
            std::memset(weights, 0, KEYS * sizeof *weights);
            return;
        }
        Floats row[GROUPS], top = splat(-INFINITY);
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) row[g] = load(scores + g * LANES);
        Floats lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        if (seen < KEYS)
#pragma GCC unroll 8
            for (int g = 0; g < GROUPS; g++) row[g] = lane < float(seen - g * LANES) ? row[g] : splat(-INFINITY);
        if (hidden > 0)
#pragma GCC unroll 8
            for (int g = 0; g < GROUPS; g++) row[g] = lane < float(hidden - g * LANES) ? splat(-INFINITY) : row[g];
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) top = larger(top, row[g]);
        const float most = largest_lane(top) * sharpness;
        Floats added = load(total);
        if (most > largest + SLACK) {
            const float shrink = exp2<T>(splat(largest - most))[0];
            added *= shrink;
            for (int d = 0; d < width; d += LANES) store(sums + d, load(sums + d) * shrink);
            largest = most;
        }
#pragma GCC unroll 8
        for (int g = 0; g < GROUPS; g++) {
            const Floats weight = exp2<T>(row[g] * sharpness - largest);
            added += weight;
            store(weights + g * LANES, weight);
        }
        store(total, added);
    }
};

// q is [T, heads, dim] with rows `q_stride` apart, out the same without gaps; T is the sum of the batch's lengths. What is
// found is multiplied with the sigmoid of `gates`, which are null or lie as q does. Each thread has a `scratch` of its own.
template <typename T>
void attention(const Batch& batch, int layer, int heads, float scale, int window, const T* q, int64_t q_stride, const T* k,
               int64_t k_stride, const T* v, int64_t v_stride, const T* gates, T* out, Scratch& scratch) {
    PagedAttention<T> it{batch, layer, heads, scale, window, q, gates, q_stride, out};
    it.store_new(k, k_stride, v, v_stride);

    struct Item {
        int sequence, head, begin, end;
    };
    std::vector<Item> items;
    const int block = std::max(1, BLOCK_ROWS / (heads / batch.kv_heads));
    for (int s = 0; s < batch.sequences; s++)
        // The last block of a prompt sees the most keys: begun first, so that no thread ends long after the others.
        for (int end = batch.lengths[s]; end > 0; end -= block)
            for (int head = 0; head < batch.kv_heads; head++) items.push_back({s, head, std::max(end - block, 0), end});
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < items.size(); i++)
        it.attend(items[i].sequence, items[i].head, items[i].begin, items[i].end, scratch);
}

}  // namespace
