// The gated delta net (arXiv 2412.06464; ops/delta.py is the reference): a short convolution over q, k and v, and a state S,
// [k_dim, v_dim] for each head of values, that each token in turn makes smaller and adds to:
//
//   S <- a S + k d^T   with   d = b (v - a S^T k),   read: S^T q      a: decay, b: how much is learned
//
// Columns of S are independent. A task is a few of them for one head of one sequence, which stay in the L1 cache for all
// its tokens; what is learned of a token is added while S is multiplied with the next one's k and q. So a row is the same
// in any company and in any chunks. S^T q is a (S_before^T q) + (k q) d.

#pragma once

#include "cpu_attention.h"

namespace {

// As in ops/decoder.py; ops/native.py reads the fields here.
template <typename T>
struct DeltaNet {
    int32_t index, k_heads, v_heads, k_dim, v_dim, taps;
    const T* conv;              // [taps, channels]
    const float *rate, *bias;   // [v_heads]
    const T* norm;              // [v_dim]
    Matrix<T> qkvz, ba, out;

    int64_t keys() const { return int64_t(k_heads) * k_dim; }
    int64_t values() const { return int64_t(v_heads) * v_dim; }
    int64_t channels() const { return 2 * keys() + values(); }
};

// What a delta net of some rows works with.
struct Deltas {
    std::unique_ptr<float[]> mixed;    // [rows, channels]: q, k and v after the convolution; then what is read, in v's place
    std::unique_ptr<float[]> ba;       // [rows, 2 * v_heads]
    std::unique_ptr<float[]> factors;  // [rows, v_heads, 2]: decay, and how much is learned

    template <typename T>
    void fit(const DeltaNet<T>& part, int64_t rows) {
        mixed.reset(new float[rows * part.channels()]);
        for (auto* small : {&ba, &factors}) small->reset(new float[rows * 2 * part.v_heads]);
    }
};

template <typename T>
struct DeltaRule {
    const DeltaNet<T>& part;
    const Batch& batch;
    const T* qkv;  // [rows, channels], `stride` apart
    int64_t stride;
    const float* ba;  // [rows, 2 * v_heads]
    const Deltas& at;

    T* past(int sequence) const {
        return static_cast<T*>(batch.conv) + batch.slots[sequence] * batch.conv_slot +
               part.index * (part.taps - 1) * part.channels();
    }

    // A head of q, k or v of a row: weighed with its last values, activated, and of q and k the norm is made 1.
    void convolve(int64_t row, int head) const {
        const int sequence = std::upper_bound(batch.starts, batch.starts + batch.sequences, row) - batch.starts - 1;
        const bool value = head >= 2 * part.k_heads;
        const int64_t channels = part.channels(), dim = value ? part.v_dim : part.k_dim;
        const int64_t first = value ? 2 * part.keys() + (head - 2 * part.k_heads) * dim : head * dim;
        const int64_t before = row - batch.starts[sequence];  // new tokens of the sequence
        float* to = at.mixed.get() + row * channels + first;
        Floats squares{};
        for (int64_t c = 0; c < dim; c += LANES) {
            Floats sum{};
            for (int i = 0; i < part.taps; i++) {
                const int64_t back = part.taps - 1 - i;
                const T* from = back <= before ? qkv + (row - back) * stride
                                               : past(sequence) + (part.taps - 1 + before - back) * channels;
                sum += load(part.conv + i * channels + first + c) * load(from + first + c);
            }
            const Floats found = silu<T>(sum);
            squares += found * found;
            store(to + c, found);
        }
        if (value) return gate(row, head - 2 * part.k_heads);
        const float scale = 1 / std::sqrt(sum_lanes(squares) + 1e-6f) / (head < part.k_heads ? std::sqrt(float(dim)) : 1);
        for (int64_t c = 0; c < dim; c += LANES) store(to + c, load(to + c) * scale);
    }

    void gate(int64_t row, int head) const {
        const float *b = ba + row * 2 * part.v_heads + head, x = b[part.v_heads] + part.bias[head];
        float* to = at.factors.get() + (row * part.v_heads + head) * 2;
        to[0] = std::exp(part.rate[head] * (x > 20 ? x : std::log1p(std::exp(x))));
        to[1] = 1 / (1 + std::exp(-*b));
    }

    // The last inputs of the convolution become those of the next one.
    void keep(int sequence) const {
        const int64_t channels = part.channels(), length = batch.lengths[sequence];
        for (int64_t i = 0; i < part.taps - 1; i++) {
            const int64_t row = length - (part.taps - 1) + i;
            const T* from = row >= 0 ? qkv + (batch.starts[sequence] + row) * stride
                                     : past(sequence) + (i + length) * channels;
            std::memmove(past(sequence) + i * channels, from, channels * sizeof(T));
        }
    }

    // V vectors of columns, from `first` on, of the state of a head.
    template <int V>
    void recur(int sequence, int head, int first, Scratch& scratch) const {
        const int k_dim = part.k_dim, v_dim = part.v_dim, width = V * LANES;
        float* state = batch.delta + batch.slots[sequence] * batch.delta_slot +
                       (int64_t(part.index) * part.v_heads + head) * k_dim * v_dim + first;
        float* block = reinterpret_cast<float*>(room(scratch, k_dim * width));  // [k_dim, width]
        for (int k = 0; k < k_dim; k++) std::memcpy(block + k * width, state + k * v_dim, width * sizeof(float));

        const int64_t channels = part.channels(), length = batch.lengths[sequence];
        const float* q = at.mixed.get() + batch.starts[sequence] * channels + head / (part.v_heads / part.k_heads) * k_dim;
        const float* factors = at.factors.get() + (int64_t(batch.starts[sequence]) * part.v_heads + head) * 2;
        float* value = at.mixed.get() + batch.starts[sequence] * channels + 2 * part.keys() + head * v_dim + first;
        const float* learned_key = q + part.keys();
        float decay = 1;
        Floats learned[V] = {};
        for (int64_t token = 0; token <= length; token++) {
            const float* key = q + part.keys();
            Floats found[V] = {}, read[V] = {};
            for (int k = 0; k < k_dim; k++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) {
                    const Floats now = load(block + k * width + v * LANES) * decay + learned_key[k] * learned[v];
                    store(block + k * width + v * LANES, now);
                    found[v] += now * key[k];
                    read[v] += now * q[k];
                }
            if (token == length) break;
            Floats both{};
            for (int k = 0; k < k_dim; k += LANES) both += load(q + k) * load(key + k);
            const float same = sum_lanes(both);
            decay = factors[0], learned_key = key;
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                learned[v] = (load(value + v * LANES) - found[v] * decay) * factors[1];
                store(value + v * LANES, read[v] * decay + learned[v] * same);
            }
            if (token + 1 < length) q += channels;  // the last round only adds what is learned
            value += channels, factors += 2 * part.v_heads;
        }
        for (int k = 0; k < k_dim; k++) std::memcpy(state + k * v_dim, block + k * width, width * sizeof(float));
    }
};

// What is read from the state stays in `at`: [rows, v_heads, v_dim] in the place of v.
template <typename T>
void delta(const DeltaNet<T>& part, const Batch& batch, int64_t rows, const T* qkv, int64_t stride, const float* ba,
           const Deltas& at, Scratch& scratch) {
    const DeltaRule<T> rule{part, batch, qkv, stride, ba, at};
    const int heads = 2 * part.k_heads + part.v_heads;
#pragma omp for collapse(2)
    for (int64_t row = 0; row < rows; row++)
        for (int head = 0; head < heads; head++) rule.convolve(row, head);
#pragma omp for nowait
    for (int s = 0; s < batch.sequences; s++) rule.keep(s);
    const int width = part.v_dim % (2 * LANES) ? LANES : 2 * LANES;
#pragma omp for collapse(3) schedule(dynamic)
    for (int s = 0; s < batch.sequences; s++)
        for (int head = 0; head < part.v_heads; head++)
            for (int first = 0; first < part.v_dim; first += width)
                width == LANES ? rule.template recur<1>(s, head, first, scratch)
                               : rule.template recur<2>(s, head, first, scratch);
}

// RMS norm of what was read, head by head, times silu of the gates z, which lie `stride` apart: out is [rows, values].
template <typename T>
void gated_norm(const DeltaNet<T>& part, int64_t rows, const Deltas& at, const T* z, int64_t stride, float eps, T* out) {
#pragma omp for collapse(2)
    for (int64_t row = 0; row < rows; row++)
        for (int head = 0; head < part.v_heads; head++) {
            const float* from = at.mixed.get() + row * part.channels() + 2 * part.keys() + head * part.v_dim;
            const T* gates = z + row * stride + head * part.v_dim;
            Floats squares{};
            for (int c = 0; c < part.v_dim; c += LANES) squares += load(from + c) * load(from + c);
            const float scale = 1 / std::sqrt(sum_lanes(squares) / part.v_dim + eps);
            for (int c = 0; c < part.v_dim; c += LANES)
                store(out + row * part.values() + head * part.v_dim + c,
                      load(from + c) * scale * load(part.norm + c) * silu<T>(load(gates + c)));
        }
}

}  // namespace
