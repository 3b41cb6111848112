// Products with weights: the loops over columns and rows, and what becomes of the sums. A product is cut into tasks of KEYS
// columns and a slice of rows, so that threads can share those of one product or of many.

#pragma once

#include "cpu_packing.h"

namespace {

constexpr int FEW = 16;           // rows up to which codes of 4 bits are multiplied as they are and scaled after that
constexpr int64_t UNPACKED = 24;  // groups that are unpacked at once for many rows: they stay in the L2 cache
constexpr int TALL = TILES ? 2 * TILE_ROWS : ROWS;  // rows of a product that are computed at once
constexpr int64_t SLICE = TILES ? 128 : 96;         // rows that one thread takes at once: a multiple of TALL
constexpr int64_t UNPACKED_SLICE = 512;             // and of a weight that is unpacked first (half where it is narrow)

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
    Gate gate;  // with one, out is [rows, columns / 2]: activation(gate) * up

    Out* place(int64_t row, int64_t first) const { return out + (row * columns + first) / (gate ? 2 : 1); }

    // Asks for the lines that will be written while the sums are computed.
    void prepare(int64_t row, int count, int64_t first) const {
        for (int i = 0; i < count; i++)
            for (int c = 0; c < (gate ? KEYS / 2 : KEYS); c += 64 / sizeof(Out))
                __builtin_prefetch(place(row + i, first) + c, 1);
    }

    void operator()(const float* sums, int64_t row, int count, int64_t first) const {
        const int width = std::min<int64_t>(KEYS, columns - first);
        // Nothing past the last column is read: it may lie behind the memory, or be written by another thread.
        const auto read = [&](const T* from, int c) {
            return c + LANES <= width ? load(from + c) : load_some(from + c, width - c);
        };
        for (int i = 0; i < count; i++, sums += KEYS) {
            Out line[KEYS], *to = place(row + i, first), *at = gate || width < KEYS ? line : to;
            for (int c = 0; c < width; c += LANES) {
                Floats sum = load(sums + c);
                if (bias) sum += read(bias + first, c);
                if (residual) sum += read(residual + (row + i) * columns + first, c);
                store(at + c, sum);
            }
            const Out* ups = at + KEYS / 2;
            if (gate == SILU)
                for (int c = 0; c < KEYS / 2; c += LANES) store(to + c, silu<T>(load(at + c)) * load(ups + c));
            else if (gate == GELU_TANH)
                for (int c = 0; c < KEYS / 2; c += LANES) store(to + c, gelu_tanh<T>(load(at + c)) * load(ups + c));
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

// out = x * weight^T + bias + residual, either of which may be null, or the gated halves of that. Of a weight that is not
// quantized, and of any in fp32, each row's sums are added up in the same order whatever other rows there are.
template <typename T, typename Out>
struct Product {
    const T* x;
    int64_t rows;
    const Matrix<T>& weight;
    Finish<T, Out> finish;

    Product(const T* x, int64_t rows, const Matrix<T>& weight, const T* residual, Out* out)
        : x(x), rows(rows), weight(weight), finish{weight.columns, weight.bias, residual, out, weight.gate} {}

    bool of_codes() const {
        return std::is_same<T, bf16>::value && weight.quantized() && rows * weight.bits <= 4 * FEW;
    }

    // Rows of a task.
    int64_t slice() const {
        if (!weight.quantized() || of_codes()) return SLICE;
        return weight.columns < 16 * KEYS ? UNPACKED_SLICE / 2 : UNPACKED_SLICE;
    }

    // Each thread calls this before its tasks; until the last of them it leaves `scratch` to them.
    void prepare(Scratch& scratch) const {
        if constexpr (std::is_same<T, bf16>::value)
            if (of_codes()) prepare_codes(Codes(*this, scratch));
    }

    // The task of the columns from `first` and the rows from `top`.
    void block(int64_t first, int64_t top, Scratch& scratch) const {
        const int64_t end = std::min(top + slice(), rows);
        if (!weight.quantized()) return block_of_numbers(first, top, end);
        if constexpr (std::is_same<T, bf16>::value)
            if (of_codes()) return block_of_codes(first, Codes(*this, scratch));
        block_of_unpacked(first, top, end, scratch);
    }

    void block_of_numbers(int64_t first, int64_t top, int64_t end) const {
        const int words = weight.size * sizeof(T) / 4, panel = words * PANEL;
        const uint32_t *a = reinterpret_cast<const uint32_t*>(x), *panels = weight.packed + first * words;
        for (int64_t r = top; r < end; r += TALL) {
            alignas(64) float sums[TALL * KEYS];
            const int count = std::min<int64_t>(TALL, end - r);
            finish.prepare(r, count, first);
            multiply_block<T>(count, a + r * words, words, panels, words, sums, false, [&](int w) {
                // No hardware foresees from which panel the next tile is loaded.
                constexpr int AHEAD = 4 * TILE_WORDS;
                if (r != top || w + AHEAD >= words) return;
                for (int j = 0; j < SUMS; j++)
                    for (int line = 0; line < TILE_ROWS; line++)
                        __builtin_prefetch(panels + j * panel + (w + AHEAD + line) * PANEL);
            });
            finish(sums, r, count, first);
        }
    }

    // Where in a thread's scratch things lie that are computed with codes.
    struct Codes {
        int planes, groups, step, words;
        uint32_t* panels;  // of two groups
        float* sums;       // [rows, KEYS]
        float* parts;      // the same of two groups
        uint32_t* a;       // [rows, groups, step]: x for each plane
        float* totals;     // [rows, groups]: sums of x

        Codes(const Product& of, Scratch& scratch)
            : planes(of.weight.bits / 4), groups(of.weight.size / GROUP), step(GROUP / 2 * planes), words(step * groups) {
            panels = room(scratch, 2 * step * KEYS + 3 * FEW * KEYS + of.rows * (words + groups));
            sums = reinterpret_cast<float*>(panels + 2 * step * KEYS);
            parts = sums + FEW * KEYS;
            a = reinterpret_cast<uint32_t*>(parts + 2 * FEW * KEYS);
            totals = reinterpret_cast<float*>(a + of.rows * words);
        }
    };

    void prepare_codes(const Codes& at) const {
        for (int64_t g = 0; g < rows * at.groups; g++) {
            for (int plane = 0; plane < at.planes; plane++)
                std::memcpy(at.a + g * at.step + plane * GROUP / 2, x + g * GROUP, GROUP * sizeof(T));
            if (weight.minimums) at.totals[g] = sum_of(x + g * GROUP);
        }
    }

    // Few rows of bf16: codes are multiplied exactly, group by group, and scaled after that. A decode step then reads 4 or
    // 8 bits and does little else. While a group is unpacked, the one before it is multiplied and the one before that is
    // scaled: none waits for what was only just stored.
    void block_of_codes(int64_t first, const Codes at) const {
        // Copies, which no store to memory can change.
        const Matrix<T> weight = this->weight;
        const int rows = this->rows, groups = at.groups, step = at.step, group_words = weight.group_words();
        const auto multiply = [&](int g) {
            for (int r = 0; r < rows; r += TALL)
                multiply_block<T>(std::min(TALL, rows - r), at.a + r * at.words + g * step, at.words,
                                  at.panels + g % 2 * step * KEYS, step, at.parts + (g % 2 * FEW + r) * KEYS, false,
                                  [](int) {});
        };
        const auto scale = [&](const uint32_t* group, int g) {
            const uint16_t* scales = reinterpret_cast<const uint16_t*>(group + KEYS * weight.bits);
            for (int c = 0; c < KEYS; c += LANES) {
                const Floats scale = load_half(scales + c);
                const Floats minimum = weight.minimums ? load_half(scales + KEYS + c) : Floats{};
                for (int r = 0; r < rows; r++) {
                    float* sum = at.sums + r * KEYS + c;
                    Floats added = load(at.parts + (g % 2 * FEW + r) * KEYS + c) * scale;
                    if (weight.minimums) added += minimum * at.totals[r * groups + g];
                    store(sum, g ? load(sum) + added : added);
                }
            }
        };
        const uint32_t* group = weight.packed + first / KEYS * groups * group_words;
        for (int g = 0; g < groups + 2; g++, group += group_words) {
            if (g < groups) {
                for (int w = 0; w < group_words; w += 16) __builtin_prefetch(group + 2 * group_words + w);
                unpack<T, false>(weight, group, 1, at.panels + g % 2 * step * KEYS);
            }
            if (g > 0 && g <= groups) multiply(g - 1);
            if (g > 1) scale(group - 2 * group_words, g - 2);
        }
        for (int r = 0; r < rows; r += TALL) finish(at.sums + r * KEYS, r, std::min(TALL, rows - r), first);
    }

    // Many rows: some groups are unpacked to numbers and multiplied with all rows of a slice.
    void block_of_unpacked(int64_t first, int64_t top, int64_t end, Scratch& scratch) const {
        const int words = weight.size * sizeof(T) / 4, groups = weight.size / GROUP, step = words / groups;
        uint32_t* panels = room(scratch, UNPACKED * step * KEYS + slice() * KEYS);
        float* sums = reinterpret_cast<float*>(panels + UNPACKED * step * KEYS);  // [slice, KEYS]
        const uint32_t* a = reinterpret_cast<const uint32_t*>(x);
        const uint32_t* group = weight.packed + first / KEYS * groups * weight.group_words();
        for (int g = 0; g < groups; g += UNPACKED) {
            const int count = std::min<int>(UNPACKED, groups - g);
            const bool last = g + count == groups;
            unpack<T, true>(weight, group + g * weight.group_words(), count, panels);
            for (int64_t r = top; r < end; r += TALL) {
                const int tall = std::min<int>(TALL, end - r);
                float* block = sums + (r - top) * KEYS;
                if (last) finish.prepare(r, tall, first);
                multiply_block<T>(tall, a + r * words + g * step, words, panels, count * step, block, g > 0, [](int) {});
                if (last) finish(block, r, tall, first);
            }
        }
    }
};

// A product whose tasks threads take as they get done: a core that a neighbour of this machine slows down takes fewer.
template <typename T, typename Out>
void product(const T* x, int64_t rows, const Matrix<T>& weight, const T* residual, Out* out, Scratch& scratch) {
    const Product<T, Out> whole(x, rows, weight, residual, out);
    const int64_t slice = whole.slice();
    whole.prepare(scratch);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t first = 0; first < weight.columns; first += KEYS)
        for (int64_t top = 0; top < rows; top += slice) whole.block(first, top, scratch);
}

}  // namespace
