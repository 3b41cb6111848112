// Matrix products over packed weights, and the kernel of all matrix products, those of attention too.

#pragma once

#include "cpu_vectors.h"

namespace {

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
// run through. S = 1 turns rows (a b), (c d) into (a c), (b d); with S = 1, 2, 4, ... all of the matrix is transposed.
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

}  // namespace
