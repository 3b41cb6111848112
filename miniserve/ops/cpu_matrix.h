// The kernels of all matrix products, those of attention too: one of vectors, one of tiles.

#pragma once

#include "cpu_tiles.h"

namespace {

constexpr int PANEL = TILES ? LANES : COLS;  // columns of a weight that lie together

// Matrices are seen as 32-bit words: a float, or two bf16 that are neighbours along the inner dimension (a dot product
// instruction takes both at once). A right-hand matrix is read in vectors, LANES columns of one word of the inner
// dimension. It says where they lie: `begin(s, j)` is vector j of the first word of its s-th part, `stride` words later
// comes that of the next word.

Floats multiply_add(Floats sum, uint32_t a, Words b, float) {
    float x;
    std::memcpy(&x, &a, sizeof x);
    return sum + x * (Floats)b;
}
Floats multiply_add(Floats sum, uint32_t a, Words b, bf16) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
    sum = multiply_add(sum, a << 16, b << 16, 0.0f);
    return multiply_add(sum, a >> 16 << 16, b >> 16 << 16, 0.0f);
#endif
}

// KEYS columns of a weight, in panels: for each word PANEL columns.
struct Packed {
    const uint32_t* words;
    int panel_words;  // from one panel to the next
    static constexpr int stride = PANEL;
    const uint32_t* begin(int, int j) const { return words + j * LANES / PANEL * panel_words + j * LANES % PANEL; }
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

// The same of values that lie together: those of TILE_WORDS words are a part.
struct GatheredValues {
    const uint32_t* words;
    int first, stride;
    const uint32_t* begin(int s, int j) const {
        return words + s * TILE_WORDS * stride + std::min(first + j * LANES, stride - LANES);
    }
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

// As `multiply`, for any number of rows.
template <typename T, typename Right>
void multiply_all(int rows, const uint32_t* a, int a_stride, Right b, int parts, int words, float* c, int c_stride,
                  bool add) {
    for (int r = 0; r < rows; r += ROWS)
        multiply<T>(std::min(ROWS, rows - r), a + r * a_stride, a_stride, b, parts, words, c + r * c_stride, c_stride,
                    add);
}

// --- the same with tiles ---------------------------------------------------------------------------------------------

// Four sums, each with the register of a right tile.
template <typename F>
void each_sum(F apply) {
    apply(Tile<SUM0>{}, Tile<RIGHT>{}, 0), apply(Tile<SUM1>{}, Tile<RIGHT_OTHER>{}, 1);
    apply(Tile<SUM2>{}, Tile<RIGHT>{}, 2), apply(Tile<SUM3>{}, Tile<RIGHT_OTHER>{}, 3);
}

// c[rows x KEYS] = or += a[rows x parts * words] * b[parts * words x KEYS], for up to TILE_ROWS rows; a part is some whole
// tiles of words. `soon(w)` is called before each step of a part, to prefetch.
template <typename Right, typename Soon>
void multiply_tiles(int rows, const uint32_t* a, int a_stride, Right b, int parts, int words, float* c, int c_stride,
                    bool add, Soon soon) {
    const int64_t a_bytes = a_stride * sizeof *a, b_bytes = b.stride * sizeof *a, c_bytes = c_stride * sizeof *c;
    shape_tiles(rows);
    each_sum([&](auto sum, auto, int j) { add ? sum.load(c + j * LANES, c_bytes) : sum.zero(); });
    for (int s = 0; s < parts; s++)
        for (int w = 0; w < words; w += TILE_WORDS) {
            soon(w);
            Tile<LEFT>::load(a + s * words + w, a_bytes);
            each_sum([&](auto sum, auto right, int j) {
                right.load(b.begin(s, j) + w * b.stride, b_bytes);
                sum.add_product(Tile<LEFT>{}, right);
            });
        }
    each_sum([&](auto sum, auto, int j) { sum.store(c + j * LANES, c_bytes); });
}

// The same for two tiles of rows. Two tiles of columns at a time: each tile that is loaded is used twice.
template <typename Right>
void multiply_square(const uint32_t* a, int a_stride, Right b, int parts, int words, float* c, int c_stride, bool add) {
    const int64_t a_bytes = a_stride * sizeof *a, b_bytes = b.stride * sizeof *a, c_bytes = c_stride * sizeof *c;
    shape_tiles(TILE_ROWS);
    for (int j = 0; j < SUMS; j += 2, c += 2 * LANES) {
        const auto at = [&](int i) { return c + i / 2 * TILE_ROWS * c_stride + i % 2 * LANES; };
        each_sum([&](auto sum, auto, int i) { add ? sum.load(at(i), c_bytes) : sum.zero(); });
        for (int s = 0; s < parts; s++)
            for (int w = 0; w < words; w += TILE_WORDS) {
                const uint32_t* left = a + s * words + w;
                Tile<LEFT>::load(left, a_bytes);
                Tile<RIGHT>::load(b.begin(s, j) + w * b.stride, b_bytes);
                Tile<RIGHT_OTHER>::load(b.begin(s, j + 1) + w * b.stride, b_bytes);
                Tile<LEFT_OTHER>::load(left + TILE_ROWS * a_stride, a_bytes);
                Tile<SUM0>::add_product(Tile<LEFT>{}, Tile<RIGHT>{});
                Tile<SUM1>::add_product(Tile<LEFT>{}, Tile<RIGHT_OTHER>{});
                Tile<SUM2>::add_product(Tile<LEFT_OTHER>{}, Tile<RIGHT>{});
                Tile<SUM3>::add_product(Tile<LEFT_OTHER>{}, Tile<RIGHT_OTHER>{});
            }
        each_sum([&](auto sum, auto, int i) { sum.store(at(i), c_bytes); });
    }
}

// Any number of rows: squares as far as they go.
template <typename Right, typename Soon>
void multiply_by_tiles(int rows, const uint32_t* a, int a_stride, Right b, int parts, int words, float* c, int c_stride,
                       bool add, Soon soon) {
    int r = 0;
    for (; r + 2 * TILE_ROWS <= rows; r += 2 * TILE_ROWS)
        multiply_square(a + r * a_stride, a_stride, b, parts, words, c + r * c_stride, c_stride, add);
    for (; r < rows; r += TILE_ROWS)
        multiply_tiles(std::min(TILE_ROWS, rows - r), a + r * a_stride, a_stride, b, parts, words, c + r * c_stride,
                       c_stride, add, soon);
}

}  // namespace
