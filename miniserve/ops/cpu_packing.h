// How a weight is packed, and how 4 and 8 bits are unpacked.
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

constexpr int GROUP = 32;  // numbers that share a scale: GROUP in ops/quantized.py

// What the gates of a product go through, if it has any.
enum Gate : int32_t { NO_GATE, SILU, GELU_TANH };

// A weight [columns, size] and its bias or null; ops/native.py reads the fields here, up to the blank line.
template <typename T>
struct Matrix {
    const uint32_t* packed;
    const T* bias;
    int32_t columns, size;
    int32_t bits;      // of a number: 4, 8, or those of T
    int32_t minimums;  // whether groups have them
    Gate gate;         // if there is one, a block is KEYS / 2 gates and as many ups

    int width() const { return gate ? columns / 2 : columns; }  // of a row of the product

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

}  // namespace
