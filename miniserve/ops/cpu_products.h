// Products with weights: how a weight is packed, 4 and 8 bits unpacked, and the loops over columns and rows.
//
// A weight [columns, size] lies in blocks of KEYS columns, each read from front to end. Numbers of the model's own type are
// panels: for each word of the inner dimension PANEL columns (with tiles 16 words of a panel are a tile).
//
//   block of KEYS columns:  | panel: word 0: PANEL columns | word 1 | ... |  next panel ...
//
// Numbers of 4 and 8 bits are groups: the codes of 32 numbers of all columns, their scales and, where a format has them,
// their minimums (float16); a number is code * scale + minimum.
//
//   block of KEYS columns:  | codes: LANES columns x 32 | ... | KEYS scales | KEYS minimums |  next group ...
//
// A word of codes belongs to one column: 8 numbers of 4 bits (code + 8 where there are no minimums) or 4 of 8 bits, the
// even ones in its lower half and the odd ones in its upper half, so that one shift finds both numbers of a bf16 word.

#pragma once

#include "cpu_matrix.h"

namespace {

constexpr int GROUP = 32;         // numbers that share a scale: GROUP in ops/quantized.py
constexpr int FEW = 16;           // rows up to which codes of 4 bits are multiplied as they are and scaled after that
constexpr int64_t UNPACKED = 24;  // groups that are unpacked at once for many rows: they stay in the L2 cache
constexpr int TALL = TILES ? 2 * TILE_ROWS : ROWS;  // rows of a product that are computed at once
constexpr int64_t SLICE = TILES ? 128 : 96;      // rows that one thread takes at once: a multiple of TALL
constexpr int64_t UNPACKED_SLICE = 512;          // and of a weight that has to be unpacked first (half where it is narrow)

// A weight and its bias or null; ops/cpu_structs.py has the same struct.
template <typename T>
struct Matrix {
    const uint32_t* packed;
    const T* bias;
    int32_t bits;      // of a number: 4, 8, or those of T
    int32_t minimums;  // whether groups have them
    int32_t gated;     // whether a block is KEYS / 2 gates and as many ups

    bool quantized() const { return bits < 16; }
    int group_words() const { return KEYS * bits + KEYS / 2 * (1 + minimums); }
};

// --- packing ---------------------------------------------------------------------------------------------------------

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

// KEYS rows of a weight, `words` words each: packed[row / PANEL][word][row % PANEL].
template <typename T>
void pack_rows(const T* const* rows, int words, uint32_t* packed) {
    for (int first = 0; first < KEYS; first += LANES) {
        uint32_t* out = packed + first / PANEL * words * PANEL + first % PANEL;
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
            for (int i = 0; i < count; i++) std::memcpy(out + (w + i) * PANEL, &square[i], sizeof(Words));
        }
    }
}

// A weight [columns, size] of numbers of T.
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

// The codes [columns, size] of a quantized weight, with scales and perhaps minimums [columns, size / GROUP].
void pack(const int8_t* codes, const uint16_t* scales, const uint16_t* minimums, int64_t columns, int64_t size,
                int bits, uint32_t* packed) {
    const int numbers = 32 / bits, least = bits == 4 && !minimums ? -8 : 0;  // in a word; the code stored as 0
    const int64_t groups = size / GROUP;
#pragma omp for
    for (int64_t first = 0; first < columns; first += KEYS) {
        uint32_t* out = packed + first / KEYS * groups * (KEYS * bits + KEYS / 2 * (minimums ? 2 : 1));
        for (int64_t g = 0; g < groups; g++) {
            for (int c = 0; c < KEYS; c++) {
                const int8_t* from = codes + std::min(first + c, columns - 1) * size + g * GROUP;
                for (int w = 0; w < bits; w++) {
                    uint32_t word = 0;
                    for (int i = 0; i < numbers; i++) {
                        const uint32_t code = static_cast<uint8_t>(from[w * numbers + i] - least);
                        word |= code << (i % 2 * 16 + i / 2 * bits);
                    }
                    out[(c / LANES * bits + w) * LANES + c % LANES] = word;
                }
            }
            out += KEYS * bits;
            for (const uint16_t* halves : {scales, minimums}) {
                if (!halves) continue;
                uint16_t* to = reinterpret_cast<uint16_t*>(out);
                for (int c = 0; c < KEYS; c++) to[c] = halves[std::min(first + c, columns - 1) * groups + g];
                out += KEYS / 2;
            }
        }
    }
}

// --- unpacking -------------------------------------------------------------------------------------------------------

// float16 as float32, for finite numbers: the exponent's bias differs by 112.
Floats load_half(const uint16_t* from) {
#ifdef __AVX512F__
    return (Floats)_mm512_cvtph_ps(load_as<__m256i>(from));
#else
    const Words bits = widened(from);
    return (Floats)((Words)((Floats)((bits & 0x7fff) << 13) * 0x1p112f) | (bits & 0x8000) << 16);
#endif
}

// Number `i` of a word of codes of each column: 0..15 of 4 bits, -128..127 of 8.
template <int BITS>
Floats code(Words words, int i) {
    const int place = i % 2 * 16 + i / 2 * BITS;
    if constexpr (BITS == 8) return __builtin_convertvector((Ints)(words << (24 - place)) >> 24, Floats);
#ifdef __AVX512F__
    Floats numbers;
    for (int n = 0; n < LANES; n++) numbers[n] = n;
    return __builtin_shuffle(numbers, (Ints)(words >> place));  // looks at the last 4 bits only
#else
    return __builtin_convertvector((Ints)(words >> place & 15), Floats);
#endif
}

void store_numbers(float* out, Floats even, Floats odd) {
    store(out, even);
    store(out + PANEL, odd);
}
void store_numbers(bf16* out, Floats even, Floats odd) {
    const Words both = bf16_pairs(even, odd);
    std::memcpy(out, &both, sizeof both);
}

typedef uint16_t Table __attribute__((vector_size(LANES * 4)));

Words look_up(Table table, Words numbers) {
#ifdef __AVX512BW__
    return (Words)_mm512_permutexvar_epi16((__m512i)numbers, (__m512i)table);
#else
    return (Words)__builtin_shuffle(table, (Table)numbers);
#endif
}

// A vector of columns of a group, as numbers.
template <int BITS, typename T>
void unpack_numbers(const uint32_t* codes, Floats scale, Floats minimum, T* out) {
#pragma GCC unroll 8
    for (int w = 0; w < BITS; w++) {
        const Words words = load_as<Words>(codes + w * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < 32 / BITS; i += 2, out += 2 * PANEL)
            store_numbers(out, code<BITS>(words, i) * scale + minimum, code<BITS>(words, i + 1) * scale + minimum);
    }
}

// A vector of columns of a group, as its codes: small whole numbers, which bf16 holds exactly, 4 bits at a time. Of 8 bits
// the lower ones are a plane of numbers, 0..15, and the upper ones another, -128..112; each is multiplied with all of x.
template <int BITS>
void unpack_codes(const uint32_t* codes, bool centered, bf16* out) {
    for (int plane = 0; plane < BITS / 4; plane++) {
        Table table;
        for (int n = 0; n < 2 * LANES; n++) {  // twice, since a number is looked up by 5 bits, of which the first is another's
            const int low = n % 16, high = (low ^ 8) - 8;
            const float number = plane ? 16 * high : BITS == 4 && centered ? low - 8 : low;
            uint32_t bits;
            std::memcpy(&bits, &number, sizeof bits);
            table[n] = bits >> 16;
        }
#pragma GCC unroll 8
        for (int w = 0; w < BITS; w++) {
            const Words words = load_as<Words>(codes + w * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < 16 / BITS; i++, out += 2 * PANEL) {
                const Words both = look_up(table, words >> (i * BITS + plane * 4));
                std::memcpy(out, &both, sizeof both);
            }
        }
    }
}

// Groups of a block of KEYS columns into panels, as a weight of T would lie there. With `SCALED` they are numbers, else
// codes.
template <typename T, bool SCALED, int BITS>
void unpack(const Matrix<T>& weight, const uint32_t* group, int groups, uint32_t* out) {
    constexpr int PER_WORD = 4 / sizeof(T), WORDS = GROUP / PER_WORD * (SCALED ? 1 : BITS / 4);
    for (int g = 0; g < groups; g++, group += weight.group_words()) {
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(group + KEYS * BITS);
        for (int c = 0; c < KEYS; c += LANES) {
            const uint32_t* codes = group + c * BITS;
            T* to = reinterpret_cast<T*>(out + (c / PANEL * groups + g) * WORDS * PANEL + c % PANEL);
            if constexpr (SCALED) {
                const Floats scale = load_half(scales + c);
                Floats minimum{};
                if (weight.minimums)
                    minimum = load_half(scales + KEYS + c);
                else if (BITS == 4)
                    minimum = scale * -8.0f;
                unpack_numbers<BITS>(codes, scale, minimum, to);
            } else {
                unpack_codes<BITS>(codes, !weight.minimums, to);
            }
        }
    }
}

template <typename T, bool SCALED>
void unpack(const Matrix<T>& weight, const uint32_t* group, int groups, uint32_t* out) {
    weight.bits == 4 ? unpack<T, SCALED, 4>(weight, group, groups, out)
                     : unpack<T, SCALED, 8>(weight, group, groups, out);
}

// --- products --------------------------------------------------------------------------------------------------------

// c[rows x KEYS] = or += a[rows x words] * panels, for up to TALL rows. `soon(w)` may prefetch.
template <typename T, typename Soon>
void multiply_block(int rows, const uint32_t* a, int a_stride, const uint32_t* panels, int words, float* c, bool add,
                    Soon soon) {
    if (std::is_same<T, bf16>::value && words % TILE_WORDS == 0 && tiles_allowed())
        return multiply_by_tiles(rows, a, a_stride, Packed{panels, words * PANEL}, 1, words, c, KEYS, add, soon);
    for (int j = 0; j < KEYS; j += COLS)
        multiply_all<T>(rows, a, a_stride, Packed{panels + j * words, words * PANEL}, 1, words, c + j, KEYS, add);
}

// What follows on the sums of a block: bias, residual or gate, and into its place.
template <typename T, typename Out>
struct Finish {
    int64_t columns;
    const T *bias, *residual;
    Out* out;
    bool gated;  // out is [rows, columns / 2]: silu(gate) * up

    Out* place(int64_t row, int64_t first) const { return out + (row * columns + first) / (gated ? 2 : 1); }

    // Asks for the lines that will be written while the sums are computed.
    void prepare(int64_t row, int count, int64_t first) const {
        for (int i = 0; i < count; i++)
            for (int c = 0; c < (gated ? KEYS / 2 : KEYS); c += 64 / sizeof(Out))
                __builtin_prefetch(place(row + i, first) + c, 1);
    }

    void operator()(const float* sums, int64_t row, int count, int64_t first) const {
        const int width = std::min<int64_t>(KEYS, columns - first);
        // Nothing past the last column is read: it may lie behind the memory, or be written by another thread.
        const auto read = [&](const T* from, int c) {
            if (c + LANES <= width) return load(from + c);
            T some[LANES] = {};
            std::memcpy(some, from + c, (width - c) * sizeof(T));
            return load(some);
        };
        for (int i = 0; i < count; i++, sums += KEYS) {
            Out line[KEYS], *to = place(row + i, first), *at = gated || width < KEYS ? line : to;
            for (int c = 0; c < width; c += LANES) {
                Floats sum = load(sums + c);
                if (bias) sum += read(bias + first, c);
                if (residual) sum += read(residual + (row + i) * columns + first, c);
                store(at + c, sum);
            }
            if (gated)
                for (int c = 0; c < KEYS / 2; c += LANES) store(to + c, silu<T>(load(at + c)) * load(at + KEYS / 2 + c));
            else if (at == line)
                std::memcpy(to, line, width * sizeof(Out));
        }
    }
};

template <typename T>
float sum_of(const T* group) {
    Floats sum{};
    for (int i = 0; i < GROUP; i += LANES) sum += load(group + i);
    return sum_lanes(sum);
}

// Few rows of bf16: codes are multiplied exactly, group by group, and scaled after that. A decode step then reads 4 or 8
// bits and does little else. While a group is unpacked, the one before it is multiplied and the one before that is scaled:
// none waits for what was only just stored.
template <typename T, typename Out>
void product_of_codes(const T* x, int rows, int64_t size, const Matrix<T>& weight, const Finish<T, Out>& finish,
                      Scratch& scratch) {
    const int planes = weight.bits / 4, groups = size / GROUP, step = GROUP / 2 * planes, words = step * groups;
    const int group_words = weight.group_words();
    uint32_t* panels = room(scratch, 2 * step * KEYS + 3 * FEW * KEYS + rows * (words + groups));  // of two groups
    float* sums = reinterpret_cast<float*>(panels + 2 * step * KEYS);                             // [rows, KEYS]
    float* parts = sums + FEW * KEYS;                                      // the same of two groups
    uint32_t* a = reinterpret_cast<uint32_t*>(parts + 2 * FEW * KEYS);     // [rows, groups, step]: x for each plane
    float* totals = reinterpret_cast<float*>(a + rows * words);            // [rows, groups]: sums of x
    for (int64_t g = 0; g < rows * groups; g++) {
        for (int plane = 0; plane < planes; plane++)
            std::memcpy(a + g * step + plane * GROUP / 2, x + g * GROUP, GROUP * sizeof(T));
        if (weight.minimums) totals[g] = sum_of(x + g * GROUP);
    }

    const auto multiply = [&](int g) {
        for (int r = 0; r < rows; r += TALL)
            multiply_block<T>(std::min(TALL, rows - r), a + r * words + g * step, words, panels + g % 2 * step * KEYS,
                              step, parts + (g % 2 * FEW + r) * KEYS, false, [](int) {});
    };
    const auto scale = [&](const uint32_t* group, int g) {
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(group + KEYS * weight.bits);
        for (int c = 0; c < KEYS; c += LANES) {
            const Floats scale = load_half(scales + c);
            const Floats minimum = weight.minimums ? load_half(scales + KEYS + c) : Floats{};
            for (int r = 0; r < rows; r++) {
                float* sum = sums + r * KEYS + c;
                Floats added = load(parts + (g % 2 * FEW + r) * KEYS + c) * scale;
                if (weight.minimums) added += minimum * totals[r * groups + g];
                store(sum, g ? load(sum) + added : added);
            }
        }
    };
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < finish.columns; first += KEYS) {
        const uint32_t* group = weight.packed + first / KEYS * groups * group_words;
        for (int g = 0; g < groups + 2; g++, group += group_words) {
            if (g < groups) {
                for (int w = 0; w < group_words; w += 16) __builtin_prefetch(group + 2 * group_words + w);
                unpack<T, false>(weight, group, 1, panels + g % 2 * step * KEYS);
            }
            if (g > 0 && g <= groups) multiply(g - 1);
            if (g > 1) scale(group - 2 * group_words, g - 2);
        }
        for (int r = 0; r < rows; r += TALL) finish(sums + r * KEYS, r, std::min(TALL, rows - r), first);
    }
}

// Many rows: some groups are unpacked to numbers and multiplied with all rows of a slice.
template <typename T, typename Out>
void product_of_unpacked(const T* x, int64_t rows, int64_t size, const Matrix<T>& weight,
                         const Finish<T, Out>& finish, Scratch& scratch) {
    const int words = size * sizeof(T) / 4, groups = size / GROUP, step = words / groups;
    const int64_t slice = finish.columns < 16 * KEYS ? UNPACKED_SLICE / 2 : UNPACKED_SLICE;
    uint32_t* panels = room(scratch, UNPACKED * step * KEYS + slice * KEYS);
    float* sums = reinterpret_cast<float*>(panels + UNPACKED * step * KEYS);  // [slice, KEYS]
    const uint32_t* a = reinterpret_cast<const uint32_t*>(x);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t first = 0; first < finish.columns; first += KEYS)
        for (int64_t top = 0; top < rows; top += slice) {
            const int64_t end = std::min(top + slice, rows);
            const uint32_t* group = weight.packed + first / KEYS * groups * weight.group_words();
            for (int g = 0; g < groups; g += UNPACKED) {
                const int count = std::min<int>(UNPACKED, groups - g);
                const bool last = g + count == groups;
                unpack<T, true>(weight, group + g * weight.group_words(), count, panels);
                for (int64_t r = top; r < end; r += TALL) {
                    const int tall = std::min<int>(TALL, end - r);
                    float* block = sums + (r - top) * KEYS;
                    if (last) finish.prepare(r, tall, first);
                    multiply_block<T>(tall, a + r * words + g * step, words, panels, count * step, block, g > 0,
                                      [](int) {});
                    if (last) finish(block, r, tall, first);
                }
            }
        }
}

// out = x * weight^T + bias + residual, either of which may be null, or the gated halves of that. Threads take blocks as they get done: a core that a
// neighbour of this machine slows down takes fewer. Of a weight that is not quantized, and of any in fp32,
// each row's sums are added up in the same order whatever other rows there are.
template <typename T, typename Out>
void product(const T* x, int64_t rows, int64_t size, const Matrix<T>& weight, int64_t columns, const T* residual,
             Out* out, Scratch& scratch) {
    const Finish<T, Out> finish{columns, weight.bias, residual, out, weight.gated != 0};
    if (weight.quantized()) {
        if constexpr (std::is_same<T, bf16>::value)
            if (rows * weight.bits <= 4 * FEW) return product_of_codes(x, rows, size, weight, finish, scratch);
        return product_of_unpacked(x, rows, size, weight, finish, scratch);
    }
    const int words = size * sizeof(T) / 4, panel = words * PANEL;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t first = 0; first < columns; first += KEYS)
        for (int64_t top = 0; top < rows; top += SLICE)
            for (int64_t r = top; r < std::min(top + SLICE, rows); r += TALL) {
                alignas(64) float block[TALL * KEYS];
                const int count = std::min<int64_t>(TALL, rows - r);
                const uint32_t *a = reinterpret_cast<const uint32_t*>(x + r * size), *panels = weight.packed + first * words;
                finish.prepare(r, count, first);
                multiply_block<T>(count, a, words, panels, words, block, false, [&](int w) {
                    // No hardware foresees from which panel the next tile is loaded.
                    constexpr int AHEAD = 4 * TILE_WORDS;
                    if (r != top || w + AHEAD >= words) return;
                    for (int j = 0; j < SUMS; j++)
                        for (int line = 0; line < TILE_ROWS; line++)
                            __builtin_prefetch(panels + j * panel + (w + AHEAD + line) * PANEL);
                });
                finish(block, r, count, first);
            }
}

}  // namespace
