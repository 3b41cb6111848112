// A mixture of experts. The router's logits choose some for each row; the rows are sorted by expert, and the products of
// all experts are the tasks of one loop, whether an expert has one row or hundreds:
//
//   row 0: experts 3, 1               gathered          gated (x gate_up)         made (x down)
//       1: experts 2, 3         1 |  row 0   |        |   inner    |            |  hidden  |
//                      sort     2 |  row 1   |   ->   |            |     ->     |          |  -> weighed, added up by row
//                               3 |  row 0   |        |            |            |          |
//                               3 |  row 1   |        |            |            |          |
//
// The expert that is shared by all rows is one more at the end, which each row has chosen last. What a row gets is added up
// in the order of its choices, whatever thread computes it.

#pragma once

#include "cpu_products.h"

namespace {

// As in ops/decoder.py; ops/native.py reads the fields here.
template <typename T>
struct Mlp {
    Matrix<T> gate_up, down;
};

template <typename T>
struct Experts {
    int32_t count, chosen, renormed, shared;  // shared: 1 if there is one after `count` experts
    Matrix<T> router, shared_gate;
    const Mlp<T>* experts;

    int each() const { return chosen + shared; }
};

// What a mixture of some rows, of which each goes to `each` experts, works with. All threads use the same one.
template <typename T>
struct Mixing {
    int each = 0;
    std::vector<float> logits, shared, weights;  // [rows, count], [rows], [rows, each]
    std::vector<int32_t> ids, places;            // [rows, each]: the experts, and where the row lies among those gathered
    std::vector<int32_t> starts;                 // [count + 2]: where the rows of each expert begin
    std::unique_ptr<T[]> gathered, gated, made;  // [rows * each, hidden], [rows * each, inner], [rows * each, hidden]

    void fit(const Experts<T>& part, int64_t rows, int each_row) {
        const int64_t pairs = rows * each_row, hidden = part.experts->gate_up.size;
        const int64_t inner = std::max(part.experts->down.size, part.experts[part.count + part.shared - 1].down.size);
        each = each_row;
        ids.resize(pairs), places.resize(pairs), weights.resize(pairs);
        gathered.reset(new T[pairs * hidden]), made.reset(new T[pairs * hidden]), gated.reset(new T[pairs * inner]);
        logits.resize(rows * part.count), shared.resize(rows);
    }
};

// The best experts of each row of x [rows, hidden], of equal ones those that come first, and their weights.
template <typename T>
void route(const Experts<T>& part, const T* x, int64_t rows, Mixing<T>& to, Scratch& scratch) {
    product<T, float>(x, rows, part.router, nullptr, to.logits.data(), scratch);
    if (part.shared) product<T, float>(x, rows, part.shared_gate, nullptr, to.shared.data(), scratch);
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
        const float* logits = to.logits.data() + row * part.count;
        int32_t* ids = reinterpret_cast<int32_t*>(room(scratch, part.count));
        for (int e = 0; e < part.count; e++) ids[e] = e;
        std::partial_sort(ids, ids + part.chosen, ids + part.count, [&](int a, int b) {
            return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
        });
        float *weights = to.weights.data() + row * to.each, total = 0;
        std::copy(ids, ids + part.chosen, to.ids.data() + row * to.each);
        for (int i = 0; i < (part.renormed ? part.chosen : part.count); i++)
            total += std::exp(logits[ids[i]] - logits[ids[0]]);
        for (int i = 0; i < part.chosen; i++) weights[i] = std::exp(logits[ids[i]] - logits[ids[0]]) / total;
        if (!part.shared) continue;
        to.ids[row * to.each + part.chosen] = part.count;
        weights[part.chosen] = 1 / (1 + std::exp(-to.shared[row]));
    }
}

// The products of all experts with their rows, by all threads. `of(e)` is that of expert e.
template <typename T, typename F>
void each_product(const std::vector<int32_t>& starts, F of, Scratch& scratch) {
    struct Task {
        int expert, first, top;
    };
    std::vector<Task> tasks;
    for (int e = 0; e + 1 < int(starts.size()); e++) {
        const Product<T, T> whole = of(e);
        for (int first = 0; whole.rows > 0 && first < whole.weight.columns; first += KEYS)
            for (int top = 0; top < whole.rows; top += whole.slice()) tasks.push_back({e, first, top});
    }
    int prepared = -1;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tasks.size(); i++) {
        const Product<T, T> whole = of(tasks[i].expert);
        if (prepared != tasks[i].expert) whole.prepare(scratch);
        prepared = tasks[i].expert;
        whole.block(tasks[i].first, tasks[i].top, scratch);
    }
}

// out = what the experts of `at` make of x [rows, hidden], weighed, plus the residual or null; out may be x or residual.
template <typename T>
void mixture(const Experts<T>& part, const T* x, int64_t rows, Mixing<T>& at, const T* residual, T* out,
             Scratch& scratch) {
    const int64_t hidden = part.experts->gate_up.size, inner = part.experts->down.size, pairs = rows * at.each;
#pragma omp single
    {
        at.starts.assign(part.count + part.shared + 1, 0);
        for (int64_t i = 0; i < pairs; i++) at.starts[at.ids[i] + 1]++;
        for (size_t e = 1; e < at.starts.size(); e++) at.starts[e] += at.starts[e - 1];
        std::vector<int32_t> next(at.starts);
        for (int64_t i = 0; i < pairs; i++) at.places[i] = next[at.ids[i]]++;
    }
#pragma omp for
    for (int64_t i = 0; i < pairs; i++)
        std::memcpy(at.gathered.get() + at.places[i] * hidden, x + i / at.each * hidden, hidden * sizeof(T));
    // All experts have the same size but the shared one, and that is the last.
    const auto of = [&](int e, const Matrix<T>& weight, const std::unique_ptr<T[]>& from, int64_t from_size,
                        const std::unique_ptr<T[]>& to, int64_t to_size) {
        const int64_t start = at.starts[e], count = at.starts[e + 1] - start;
        return Product<T, T>(from.get() + start * from_size, count, weight, nullptr, to.get() + start * to_size);
    };
    each_product<T>(at.starts, [&](int e) { return of(e, part.experts[e].gate_up, at.gathered, hidden, at.gated, inner); },
                    scratch);
    each_product<T>(at.starts, [&](int e) { return of(e, part.experts[e].down, at.gated, inner, at.made, hidden); },
                    scratch);
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
        for (int64_t c = 0; c < hidden; c += LANES) {
            Floats sum = residual ? load(residual + row * hidden + c) : Floats{};
            for (int64_t i = row * at.each; i < (row + 1) * at.each; i++)
                sum += load(at.made.get() + at.places[i] * hidden + c) * at.weights[i];
            store(out + row * hidden + c, sum);
        }
}

}  // namespace
