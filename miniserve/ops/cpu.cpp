// CPU kernels: matrix products, paged attention, RMS norm, rotary embedding, SiLU gate. Compiled at first use by
// ops/native.py.
//
// Plain pointers, no libtorch: any version of torch works. Each kernel exists for float and, where the CPU multiplies
// bf16 in hardware (AVX-512 BF16), for bf16; all sums are in float. Vectors are GCC's own, which it lowers to whatever
// the CPU has, so the only intrinsics are those of bf16.
//
// A kernel is called by all threads of a team, which share its work and wait for each other at its end. Each can be called
// by itself from Python; `forward` at the end is the whole model, so that a step of a hundred and more kernels is one call
// and its threads never go to sleep between two of them.
//
// Attention is FlashAttention's loop (arXiv 2205.14135) over the pages of PagedAttention (arXiv 2309.06180). A work
// item is a block of queries of one sequence for one key/value head; the query heads that share that head are further
// rows of the same block. For 64 keys at a time: look them up in the page table, multiply, fold the scores into the
// running softmax, multiply with the values. A decode is a block of one query, so both cases are the same code.
//
// Keys and values lie in their pages as the matrix kernel reads them: a decode uses each once, so that to rearrange them
// then would take longer than to multiply.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, VECTORS = 4;  // of the 32 registers 6 x 4 hold sums
#else
constexpr int LANES = 8, VECTORS = 2;  // of 16 registers (AVX2) 6 x 2
#endif
constexpr int COLS = LANES * VECTORS;  // columns that the matrix kernel computes at once
constexpr int ROWS = 6;                // and rows
constexpr int KEYS = 64;               // keys in a block, and columns of a weight: a multiple of COLS
constexpr int GROUPS = KEYS / LANES;   // of keys in a block
constexpr int BLOCK_ROWS = 192;        // most rows in a block of queries: what fits beside the keys in the L2 cache
constexpr int64_t PANEL = 96;          // rows of a product that one thread takes at once: a multiple of ROWS
constexpr int64_t PARALLEL = 1 << 14;  // numbers below which another thread costs more than it saves

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

template <typename V>
V load_as(const void* from) {
    V vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

Floats splat(float x) { return x - Floats{}; }

Floats load(const float* from) { return load_as<Floats>(from); }
void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

#ifdef __AVX512BF16__
Floats load(const bf16* from) { return (Floats)(__builtin_convertvector(load_as<Halves>(from), Words) << 16); }
void store(bf16* to, Floats x) {
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &rounded, sizeof rounded);
}
#endif

// 2^x to float precision for x up to 127: the nearest power of two, times the Taylor series of the rest.
Floats exp2(Floats x) {
    const float round =
        12582912.0f;  // 1.5 * 2^23: a sum with it has no room for a fraction, its last bits are the number
    Floats shifted = x + round;
    Floats t = (x - (shifted - round)) * 0.6931471805599453f;
    Floats series =
        1.0f + t * (1.0f + t * (1 / 2.f + t * (1 / 6.f + t * (1 / 24.f + t * (1 / 120.f + t * (1 / 720.f))))));
    return x < -126.0f ? Floats{} : (Floats)((Words)series + ((Words)shifted << 23));
}

template <int S>
Floats swap_lanes(Floats x) {
    Ints from;
    for (int i = 0; i < LANES; i++) from[i] = i ^ S;
    return __builtin_shuffle(x, from);
}

Floats larger(Floats a, Floats b) { return a > b ? a : b; }

float largest_lane(Floats x) {
    if constexpr (LANES == 16) x = larger(x, swap_lanes<LANES / 2>(x));
    x = larger(x, swap_lanes<4>(x));
    x = larger(x, swap_lanes<2>(x));
    return larger(x, swap_lanes<1>(x))[0];
}

float sum_lanes(Floats x) {
    if constexpr (LANES == 16) x += swap_lanes<LANES / 2>(x);
    x += swap_lanes<4>(x);
    x += swap_lanes<2>(x);
    return (x + swap_lanes<1>(x))[0];
}

// --- matrix kernel ---------------------------------------------------------------------------------------------------
//
// Matrices are seen as 32-bit words: a float, or two bf16 that are neighbours along the inner dimension (a dot product
// instruction takes both at once). A right-hand matrix is read in vectors, LANES columns of one word of the inner
// dimension. It says where they lie: `begin(s, j)` is vector j of the first word of its s-th part, `stride` words later
// comes that of the next word.

Floats multiply_add(Floats sum, uint32_t a, Words b, float) {
    float x;
    std::memcpy(&x, &a, sizeof x);
    return sum + x * (Floats)b;
}
#ifdef __AVX512BF16__
Floats multiply_add(Floats sum, uint32_t a, Words b, bf16) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
}
#endif

// A weight as `pack` leaves it: for each word COLS columns.
struct Packed {
    const uint32_t* words;
    static constexpr int stride = COLS;
    const uint32_t* begin(int, int j) const { return words + j * LANES; }
};

// The keys of COLS tokens, from group to group, as the right-hand matrix of their dot products.
struct Keys {
    const uint32_t* const* groups;
    static constexpr int stride = LANES;
    const uint32_t* begin(int, int j) const { return groups[j]; }
};

// COLS columns, from `first` on, of the values of all groups in a block: each group is a part. Columns past the last are
// computed from some other and not looked at.
struct Values {
    const uint32_t* const* groups;
    int first, stride;
    const uint32_t* begin(int s, int j) const { return groups[s] + std::min(first + j * LANES, stride - LANES); }
};

// c[R x COLS] = or += a[R x parts * words] * b[parts * words x COLS]
template <typename T, int R, typename Right>
__attribute__((noinline)) void multiply_rows(const uint32_t* a, int a_stride, Right b, int parts, int words, float* c,
                                             int c_stride, bool add) {
    Floats sums[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) sums[r][j] = add ? load(c + r * c_stride + j * LANES) : Floats{};
    for (int s = 0; s < parts; s++, a += words) {
        const uint32_t* from[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) from[j] = b.begin(s, j);
        for (int w = 0; w < words; w++) {
            Words columns[VECTORS];
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) columns[j] = load_as<Words>(from[j] + w * b.stride);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; j++)
                    sums[r][j] = multiply_add(sums[r][j], a[r * a_stride + w], columns[j], T{});
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) store(c + r * c_stride + j * LANES, sums[r][j]);
}

template <typename T, typename Right>
void multiply(int rows, const uint32_t* a, int a_stride, Right b, int parts, int words, float* c, int c_stride,
              bool add) {
    switch (rows) {
        case 1:
            return multiply_rows<T, 1>(a, a_stride, b, parts, words, c, c_stride, add);
        case 2:
            return multiply_rows<T, 2>(a, a_stride, b, parts, words, c, c_stride, add);
        case 3:
            return multiply_rows<T, 3>(a, a_stride, b, parts, words, c, c_stride, add);
        case 4:
            return multiply_rows<T, 4>(a, a_stride, b, parts, words, c, c_stride, add);
        case 5:
            return multiply_rows<T, 5>(a, a_stride, b, parts, words, c, c_stride, add);
        default:
            return multiply_rows<T, 6>(a, a_stride, b, parts, words, c, c_stride, add);
    }
}

// --- packing weights -------------------------------------------------------------------------------------------------

// One step of a transpose: in each pair of rows S apart, swap what lies off the diagonal of the 2S x 2S squares they
// run through. S = 1 turns rows (a b), (c d) into (a c), (b d); with S = 1, 2, 4, ... all of the matrix is turned.
template <int S>
void swap_squares(Words* m) {
    Words low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i & S ? LANES + (i ^ S) : i;
        high[i] = i & S ? LANES + i : i ^ S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        if (i & S) continue;
        Words a = m[i], b = m[i + S];
        m[i] = __builtin_shuffle(a, b, low);
        m[i + S] = __builtin_shuffle(a, b, high);
    }
}

void transpose(Words* m) {
    swap_squares<1>(m);
    swap_squares<2>(m);
    swap_squares<4>(m);
    if constexpr (LANES == 16) swap_squares<LANES / 2>(m);
}

// KEYS rows of a weight, `words` words each: packed[row / COLS][word][row % COLS].
template <typename T>
void pack_rows(const T* const* rows, int words, uint32_t* packed) {
    for (int first = 0; first < KEYS; first += LANES) {
        uint32_t* out = packed + first / COLS * words * COLS + first % COLS;
        for (int w = 0; w < words; w += LANES) {
            int count = std::min(LANES, words - w);
            Words square[LANES];
            for (int i = 0; i < LANES; i++) {
                const uint32_t* row = reinterpret_cast<const uint32_t*>(rows[first + i]) + w;
                if (count == LANES)
                    square[i] = load_as<Words>(row);
                else
                    std::memcpy(&square[i], row, count * 4);
            }
            transpose(square);
            for (int i = 0; i < count; i++) std::memcpy(out + (w + i) * COLS, &square[i], sizeof(Words));
        }
    }
}

// --- paged attention -------------------------------------------------------------------------------------------------

}  // namespace

// What all layers of a step share; ops/cpu_ops.py has the same struct. Counts are in elements unless said otherwise.
struct Batch {
    int32_t sequences;
    const int32_t *starts, *lengths, *contexts;  // [sequences]: first row, new tokens, tokens with these
    const int32_t* tables;                       // [sequences]: where its pages begin in `pages`
    const int32_t* pages;                        // page numbers
    void* pool;                                  // [page, layer, k/v, kv_head, group], see `Attention`
    int32_t layers, page_tokens, kv_heads, dim;
};

namespace {

// LANES tokens of a page are a group. A head's keys of one are [word, token], two neighbouring numbers of a bf16 key in
// a word; its values are [word, dim], those of two neighbouring tokens in a word.
template <typename T>
struct Attention {
    const Batch& batch;
    int layer, heads;
    float scale;
    const T* q;
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
                for (int i = 0; i < batch.lengths[s]; i++) {
                    const int at = batch.contexts[s] - batch.lengths[s] + i, lane = at % LANES;
                    const int64_t row = batch.starts[s] + i;
                    const uint32_t* key = reinterpret_cast<const uint32_t*>(k + row * k_stride + head * dim);
                    const T* value = v + row * v_stride + head * dim;
                    uint32_t *keys = group(s, head, at, 0), *values = group(s, head, at, 1);
                    // What an earlier sequence has left could be NaN, which no weight of 0 makes harmless.
                    if (lane == 0 && at + LANES > batch.contexts[s])
                        std::memset(values, 0, LANES * words * sizeof *values);
                    T* to = reinterpret_cast<T*>(values) + lane / PER_WORD * dim * PER_WORD + lane % PER_WORD;
                    for (int w = 0; w < words; w++) keys[w * LANES + lane] = key[w];
                    for (int d = 0; d < dim; d++) to[d * PER_WORD] = value[d];
                }
    }

    // Where the keys and values of KEYS tokens lie, from token `first` on. Past the last visible one any group will do:
    // its weights will be 0. Nobody guesses the next page, so the memory is asked for it here, while the block before is
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

    // Queries `begin` to `end` of a sequence's new tokens, for the query heads that share key/value head `head`.
    void attend(int sequence, int head, int begin, int end, std::vector<uint32_t>& scratch) const {
        const int dim = batch.dim, group = heads / batch.kv_heads;
        const int words = dim / PER_WORD, key_words = KEYS / PER_WORD, group_words = LANES / PER_WORD;
        const int rows = (end - begin) * group, width = (dim + COLS - 1) / COLS * COLS;
        const int before = batch.contexts[sequence] - batch.lengths[sequence];

        scratch.resize(rows * words + rows * (width + LANES + 1) + ROWS * KEYS * 2);
        uint32_t* queries = scratch.data();                                     // [rows, words]
        float* sums = reinterpret_cast<float*>(queries + rows * words);         // [rows, width]: weighted values
        float* largest = sums + rows * width;                                   // [rows]: largest score so far
        float* total = largest + rows;                                          // [rows, LANES]: sums of weights so far
        float* scores = total + rows * LANES;                                   // [ROWS, KEYS]
        uint32_t* weights = reinterpret_cast<uint32_t*>(scores + ROWS * KEYS);  // [ROWS, key_words]

        for (int r = 0; r < rows; r++) {
            int64_t token = batch.starts[sequence] + begin + r / group;
            std::memcpy(queries + r * words, q + token * q_stride + (head * group + r % group) * dim, dim * sizeof(T));
            largest[r] = -INFINITY;
        }
        std::fill(sums, sums + rows * width, 0.0f);
        std::fill(total, total + rows * LANES, 0.0f);

        const float sharpness = scale * 1.4426950408889634f;  // weights are 2^x instead of e^x
        const int visible = before + end;                     // keys that the last query sees
        const uint32_t *keys[2][GROUPS], *values[2][GROUPS];  // of this block and the next
        find_block(sequence, head, 0, visible, keys[0], values[0]);
        for (int first = 0, now = 0; first < visible; first += KEYS, now ^= 1) {
            if (first + KEYS < visible)
                find_block(sequence, head, first + KEYS, visible, keys[now ^ 1], values[now ^ 1]);
            for (int r = 0; r < rows; r += ROWS) {
                const int count = std::min(ROWS, rows - r);
                for (int c = 0; c < KEYS; c += COLS)
                    multiply<T>(count, queries + r * words, words, Keys{keys[now] + c / LANES}, 1, words, scores + c,
                                KEYS, false);
                for (int i = 0; i < count; i++) {
                    const int seen = before + begin + (r + i) / group + 1 - first;  // keys of this block it may see
                    soften(scores + i * KEYS, seen, sharpness, largest[r + i], total + (r + i) * LANES,
                           sums + (r + i) * width, width, reinterpret_cast<T*>(weights + i * key_words));
                }
                for (int d = 0; d < width; d += COLS)
                    multiply<T>(count, weights, key_words, Values{values[now], d, dim}, GROUPS, group_words,
                                sums + r * width + d, width, true);
            }
        }

        for (int r = 0; r < rows; r++) {
            int64_t token = batch.starts[sequence] + begin + r / group;
            T* to = out + (token * heads + head * group + r % group) * dim;
            const float whole = sum_lanes(load(total + r * LANES));
            for (int d = 0; d < dim; d += LANES) store(to + d, load(sums + r * width + d) / whole);
        }
    }

    // A row of KEYS scores as weights 2^(score * sharpness - largest), where `largest` is the largest product so far
    // and only the first `seen` keys count. When it grows from a to b, what was summed up before shrinks by 2^(a - b).
    static void soften(float* scores, int seen, float sharpness, float& largest, float* total, float* sums, int width,
                       T* weights) {
        for (int i = std::max(seen, 0); i < KEYS; i++) scores[i] = -INFINITY;
        Floats top = load(scores);
        for (int i = LANES; i < KEYS; i += LANES) top = larger(top, load(scores + i));
        const float most = std::max(largest, largest_lane(top) * sharpness);
        Floats added = load(total);
        if (most > largest) {
            const float shrink = exp2(splat(largest - most))[0];
            added *= shrink;
            for (int d = 0; d < width; d += LANES) store(sums + d, load(sums + d) * shrink);
            largest = most;
        }
        for (int i = 0; i < KEYS; i += LANES) {
            Floats weight = exp2(load(scores + i) * sharpness - most);
            added += weight;
            store(weights + i, weight);
        }
        store(total, added);
    }
};

// q is [T, heads, dim] with rows `q_stride` apart, out the same without gaps; T is the sum of the batch's lengths. Each
// thread has a `scratch` of its own.
template <typename T>
void attention(const Batch& batch, int layer, int heads, float scale, const T* q, int64_t q_stride, const T* k,
               int64_t k_stride, const T* v, int64_t v_stride, T* out, std::vector<uint32_t>& scratch) {
    Attention<T> it{batch, layer, heads, scale, q, q_stride, out};
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

// --- matrix products -------------------------------------------------------------------------------------------------

// A weight [columns, size] in blocks of KEYS columns of the product, each read from front to end.
template <typename T>
void pack(const T* weight, int64_t columns, int64_t size, uint32_t* packed) {
    const int words = size * sizeof(T) / 4;
#pragma omp for
    for (int64_t first = 0; first < columns; first += KEYS) {
        const T* rows[KEYS];
        for (int i = 0; i < KEYS; i++) rows[i] = weight + std::min(first + i, columns - 1) * size;
        pack_rows(rows, words, packed + first * words);
    }
}

// out = x * weight^T + bias + residual, either of which may be null. Each row's sums are added up in the same order
// whatever other rows there are.
template <typename T, typename Out>
void product(const T* x, int64_t rows, int64_t size, const uint32_t* packed, int64_t columns, const T* bias,
             const T* residual, Out* out) {
    const int words = size * sizeof(T) / 4;
#pragma omp for collapse(2)
    for (int64_t first = 0; first < columns; first += KEYS)
        for (int64_t panel = 0; panel < rows; panel += PANEL)
            for (int64_t r = panel; r < std::min(panel + PANEL, rows); r += ROWS) {
                float block[ROWS * KEYS];
                Out line[KEYS];
                const int count = std::min<int64_t>(ROWS, rows - r), width = std::min<int64_t>(KEYS, columns - first);
                const uint32_t* from = reinterpret_cast<const uint32_t*>(x + r * size);
                for (int c = 0; c < KEYS; c += COLS)
                    multiply<T>(count, from, words, Packed{packed + (first + c) * words}, 1, words, block + c, KEYS,
                                false);
                for (int i = 0; i < count; i++) {
                    const int64_t at = (r + i) * columns + first;
                    for (int c = 0; c < width; c += LANES) {
                        Floats sum = load(block + i * KEYS + c);
                        if (bias) sum += load(bias + first + c);
                        if (residual) sum += load(residual + at + c);
                        store(line + c, sum);
                    }
                    std::memcpy(out + at, line, width * sizeof(Out));
                }
            }
}

// --- between the matrix products -------------------------------------------------------------------------------------

// x is [rows, group, size] with rows `x_stride` apart: one vector of `size` for a hidden state, `group` heads for q and
// k. out is the same with rows `out_stride` apart, and may be x.
template <typename T>
void rms_norm(const T* x, int64_t x_stride, int64_t rows, int64_t group, int64_t size, const T* weight, float eps,
              T* out, int64_t out_stride) {
#pragma omp for
    for (int64_t row = 0; row < rows * group; row++) {
        const T* from = x + row / group * x_stride + row % group * size;
        T* to = out + row / group * out_stride + row % group * size;
        Floats squares{};
        for (int64_t i = 0; i < size; i += LANES) {
            Floats v = load(from + i);
            squares += v * v;
        }
        const float scale = 1.0f / std::sqrt(sum_lanes(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES)
            store(to + i, load(from + i) * scale * load(weight + i));
    }
}

// In place: x is [rows, heads, dim] with rows `x_stride` apart, cos and sin are [positions, dim], where row r is at
// `positions[r]`. A number turns with the one half a head away; the first half of sin is negated.
template <typename T>
void rope(T* x, int64_t x_stride, int64_t rows, int64_t heads, int64_t dim, const int64_t* positions, const T* cos,
          const T* sin) {
    const int64_t half = dim / 2;
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            T *low = x + row * x_stride + head * dim, *high = low + half;
            const T *c = cos + positions[row] * dim, *s = sin + positions[row] * dim;
            for (int64_t i = 0; i < half; i += LANES) {
                Floats a = load(low + i), b = load(high + i);
                store(low + i, a * load(c + i) + b * load(s + i));
                store(high + i, b * load(c + half + i) + a * load(s + half + i));
            }
        }
}

// out[rows, size] = silu(gate) * up of gate_up[rows, 2 * size].
template <typename T>
void silu_mul(const T* gate_up, int64_t rows, int64_t size, T* out) {
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += LANES) {
            Floats x = load(gate + i);
            Floats power = x * -1.4426950408889634f;
            power = power > 126.0f ? splat(126.0f) : power;
            store(out + row * size + i, x / (1.0f + exp2(power)) * load(up + i));
        }
    }
}

// --- the model -------------------------------------------------------------------------------------------------------

// A weight as `pack` leaves it, and its bias or null.
template <typename T>
struct Matrix {
    const uint32_t* packed;
    const T* bias;
};

// As `Layer` in model/transformer.py: q, k and v are one matrix, gate and up another; q_norm and k_norm may be null.
template <typename T>
struct Layer {
    const T *input_norm, *q_norm, *k_norm, *post_norm;
    Matrix<T> qkv, out, gate_up, down;
};

}  // namespace

// ops/cpu_ops.py has the same struct. cos and sin are [positions, dim] as in `rope`.
template <typename T>
struct Model {
    int64_t hidden, inner, heads, layers, vocab;
    float eps, scale;
    const T *embedding, *cos, *sin, *norm;
    const uint32_t* head;
    const Layer<T>* layer;
};

namespace {

// The same as `Transformer.compute`: float logits [outputs, vocab] of the rows `wanted`, in rising order.
template <typename T>
void forward(const Model<T>& model, const Batch& batch, int64_t rows, const int64_t* tokens, const int64_t* positions,
             int64_t outputs, const int64_t* wanted, float* logits) {
    const int64_t hidden = model.hidden, inner = model.inner, dim = batch.dim;
    const int64_t q_width = model.heads * dim, kv_width = batch.kv_heads * dim, width = q_width + 2 * kv_width;
    std::unique_ptr<T[]> memory(new T[rows * (2 * hidden + width + q_width + 3 * inner)]);  // as it is, not zeros
    T *x = memory.get(), *h = x + rows * hidden, *qkv = h + rows * hidden, *attended = qkv + rows * width;
    T *gate_up = attended + rows * q_width, *gated = gate_up + rows * 2 * inner;
    T *q = qkv, *k = q + q_width, *v = k + kv_width;
#pragma omp parallel firstprivate(rows)
    {
        std::vector<uint32_t> scratch;
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            std::memcpy(x + row * hidden, model.embedding + tokens[row] * hidden, hidden * sizeof(T));
        for (int64_t l = 0; l < model.layers; l++) {
            const Layer<T>& layer = model.layer[l];
            rms_norm(x, hidden, rows, 1, hidden, layer.input_norm, model.eps, h, hidden);
            product<T, T>(h, rows, hidden, layer.qkv.packed, width, layer.qkv.bias, nullptr, qkv);
            if (layer.q_norm) {
                rms_norm(q, width, rows, model.heads, dim, layer.q_norm, model.eps, q, width);
                rms_norm(k, width, rows, batch.kv_heads, dim, layer.k_norm, model.eps, k, width);
            }
            // Keys come right after queries, and are turned alike.
            rope(q, width, rows, model.heads + batch.kv_heads, dim, positions, model.cos, model.sin);
            attention(batch, l, model.heads, model.scale, q, width, k, width, v, width, attended, scratch);
            if (l == model.layers - 1) {
                // No later layer reads the other rows, and of a prompt only the last one's logits are wanted.
#pragma omp single
                for (int64_t i = 0; i < outputs; i++) {
                    std::memmove(attended + i * q_width, attended + wanted[i] * q_width, q_width * sizeof(T));
                    std::memmove(x + i * hidden, x + wanted[i] * hidden, hidden * sizeof(T));
                }
                rows = outputs;
            }
            product<T, T>(attended, rows, q_width, layer.out.packed, hidden, layer.out.bias, x, x);
            rms_norm(x, hidden, rows, 1, hidden, layer.post_norm, model.eps, h, hidden);
            product<T, T>(h, rows, hidden, layer.gate_up.packed, 2 * inner, layer.gate_up.bias, nullptr, gate_up);
            silu_mul(gate_up, rows, inner, gated);
            product<T, T>(gated, rows, inner, layer.down.packed, hidden, layer.down.bias, x, x);
        }
        rms_norm(x, hidden, rows, 1, hidden, model.norm, model.eps, h, hidden);
        product<T, float>(h, rows, hidden, model.head, model.vocab, nullptr, nullptr, logits);
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                                             \
    extern "C" void forward_##NAME(const Model<T>* model, const Batch* batch, int64_t rows, const int64_t* tokens,  \
                                   const int64_t* positions, int64_t outputs, const int64_t* wanted,                \
                                   float* logits) {                                                                 \
        forward(*model, *batch, rows, tokens, positions, outputs, wanted, logits);                                  \
    }                                                                                                               \
    extern "C" void attention_##NAME(const Batch* batch, int layer, int heads, float scale, const T* q,             \
                                     int64_t q_stride, const T* k, int64_t k_stride, const T* v, int64_t v_stride,  \
                                     T* out) {                                                                      \
        _Pragma("omp parallel") {                                                                                   \
            std::vector<uint32_t> scratch;                                                                          \
            attention(*batch, layer, heads, scale, q, q_stride, k, k_stride, v, v_stride, out, scratch);            \
        }                                                                                                           \
    }                                                                                                               \
    extern "C" void rms_norm_##NAME(const T* x, int64_t x_stride, int64_t rows, int64_t group, int64_t size,        \
                                    const T* weight, float eps, T* out) {                                           \
        _Pragma("omp parallel if (rows * group * size > PARALLEL)")                                                 \
            rms_norm(x, x_stride, rows, group, size, weight, eps, out, group * size);                               \
    }                                                                                                               \
    extern "C" void rope_##NAME(T* x, int64_t x_stride, int64_t rows, int64_t heads, int64_t dim,                   \
                                const int64_t* positions, const T* cos, const T* sin) {                             \
        _Pragma("omp parallel if (rows * heads * dim > PARALLEL)")                                                  \
            rope(x, x_stride, rows, heads, dim, positions, cos, sin);                                               \
    }                                                                                                               \
    extern "C" void silu_mul_##NAME(const T* gate_up, int64_t rows, int64_t size, T* out) {                         \
        _Pragma("omp parallel if (rows * size > PARALLEL)") silu_mul(gate_up, rows, size, out);                     \
    }                                                                                                               \
    extern "C" void pack_##NAME(const T* weight, int64_t columns, int64_t size, uint32_t* packed) {                 \
        _Pragma("omp parallel") pack(weight, columns, size, packed);                                                \
    }                                                                                                               \
    extern "C" void product_##NAME(const T* x, int64_t rows, int64_t size, const uint32_t* packed, int64_t columns, \
                                   const T* bias, const T* residual, T* out) {                                      \
        _Pragma("omp parallel") product<T, T>(x, rows, size, packed, columns, bias, residual, out);                 \
    }                                                                                                               \
    extern "C" void logits_##NAME(const T* x, int64_t rows, int64_t size, const uint32_t* packed, int64_t columns,  \
                                  float* out) {                                                                     \
        _Pragma("omp parallel") product<T, float>(x, rows, size, packed, columns, nullptr, nullptr, out);           \
    }

EXPORT(float, float32)
#ifdef __AVX512BF16__
EXPORT(bf16, bfloat16)
#endif
// Numbers in a vector: the sizes of norms, heads and gates must be multiples of it.
extern "C" int lanes() { return LANES; }
