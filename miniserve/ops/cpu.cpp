// CPU kernels: products with weights (cpu_products.h), paged attention (cpu_attention.h), and here RMS norm, rotary
// embedding and the whole model. Compiled at first use by ops/native.py.
//
// Plain pointers, no libtorch: any version of torch works. Each kernel exists for float and, where the CPU multiplies
// bf16 in hardware (AVX-512 BF16), for bf16; all sums are in float.
//
// A kernel is called by all threads of a team, which share its work and wait for each other at its end. Each can be called
// by itself from Python; `forward` at the end is the whole model, so that a step of a hundred and more kernels is one call
// and its threads never go to sleep between two of them.

#include "cpu_attention.h"

namespace {

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
// `positions[r]`. A number rotates with the one half a head away; the first half of sin is negated.
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

// --- the model -------------------------------------------------------------------------------------------------------

// As `Layer` in ops/decoder.py: q, k and v are one matrix, gate and up another; q_norm and k_norm may be null.
template <typename T>
struct Layer {
    const T *input_norm, *q_norm, *k_norm, *post_norm;
    Matrix<T> qkv, out, gate_up, down;
};

}  // namespace

// ops/cpu_structs.py has the same struct. cos and sin are [positions, dim] as in `rope`.
template <typename T>
struct Model {
    int64_t hidden, inner, heads, layers, vocab;
    float eps, scale;
    const T *embedding, *cos, *sin, *norm;
    Matrix<T> head;
    const Layer<T>* layer;
};

namespace {

// The same as `Transformer.compute`: float logits [outputs, vocab] of the rows `wanted`, in rising order.
template <typename T>
void forward(const Model<T>& model, const Batch& batch, int64_t rows, const int64_t* tokens, const int64_t* positions,
             int64_t outputs, const int64_t* wanted, float* logits) {
    const int64_t hidden = model.hidden, inner = model.inner, dim = batch.dim;
    const int64_t q_width = model.heads * dim, kv_width = batch.kv_heads * dim, width = q_width + 2 * kv_width;
    std::unique_ptr<T[]> memory(new T[rows * (2 * hidden + width + q_width + inner)]);  // as it is, not zeros
    T *x = memory.get(), *h = x + rows * hidden, *qkv = h + rows * hidden, *attended = qkv + rows * width;
    T* gated = attended + rows * q_width;
    T *q = qkv, *k = q + q_width, *v = k + kv_width;
#pragma omp parallel firstprivate(rows)
    {
        Scratch scratch;
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            std::memcpy(x + row * hidden, model.embedding + tokens[row] * hidden, hidden * sizeof(T));
        for (int64_t l = 0; l < model.layers; l++) {
            const Layer<T>& layer = model.layer[l];
            rms_norm(x, hidden, rows, 1, hidden, layer.input_norm, model.eps, h, hidden);
            product<T, T>(h, rows, hidden, layer.qkv, width, nullptr, qkv, scratch);
            if (layer.q_norm) {
                rms_norm(q, width, rows, model.heads, dim, layer.q_norm, model.eps, q, width);
                rms_norm(k, width, rows, batch.kv_heads, dim, layer.k_norm, model.eps, k, width);
            }
            // Keys come right after queries, and are rotated alike.
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
            product<T, T>(attended, rows, q_width, layer.out, hidden, x, x, scratch);
            rms_norm(x, hidden, rows, 1, hidden, layer.post_norm, model.eps, h, hidden);
            product<T, T>(h, rows, hidden, layer.gate_up, 2 * inner, nullptr, gated, scratch);
            product<T, T>(gated, rows, inner, layer.down, hidden, x, x, scratch);
        }
        rms_norm(x, hidden, rows, 1, hidden, model.norm, model.eps, h, hidden);
        product<T, float>(h, rows, hidden, model.head, model.vocab, nullptr, logits, scratch);
        release_tiles();
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
            Scratch scratch;                                                                          \
            attention(*batch, layer, heads, scale, q, q_stride, k, k_stride, v, v_stride, out, scratch);            \
            release_tiles();                                                                                        \
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
    extern "C" void pack_##NAME(const T* weight, int64_t columns, int64_t size, uint32_t* packed) {                 \
        _Pragma("omp parallel") pack(weight, columns, size, packed);                                                \
    }                                                                                                               \
    extern "C" void product_##NAME(const T* x, int64_t rows, int64_t size, const Matrix<T>* weight,                 \
                                   int64_t columns, const T* residual, T* out) {                                    \
        _Pragma("omp parallel") {                                                                                   \
            Scratch scratch;                                                                                        \
            product<T, T>(x, rows, size, *weight, columns, residual, out, scratch);                                 \
            release_tiles();                                                                                        \
        }                                                                                                           \
    }                                                                                                               \
    extern "C" void logits_##NAME(const T* x, int64_t rows, int64_t size, const Matrix<T>* weight, int64_t columns, \
                                  const T* residual, float* out) {                                                  \
        _Pragma("omp parallel") {                                                                                   \
            Scratch scratch;                                                                                        \
            product<T, float>(x, rows, size, *weight, columns, residual, out, scratch);                             \
            release_tiles();                                                                                        \
        }                                                                                                           \
    }

EXPORT(float, float32)
#if defined(__AVX512BF16__) || defined(TILES_EMULATED)
EXPORT(bf16, bfloat16)
#endif

extern "C" void pack_codes(const int8_t* codes, const uint16_t* scales, const uint16_t* minimums, int64_t columns,
                           int64_t size, int bits, uint32_t* packed) {
#pragma omp parallel
    pack(codes, scales, minimums, columns, size, bits, packed);
}
// Whether products of bf16 are made by tiles.
extern "C" int tiles() { return TILES && tiles_allowed(); }
// Numbers in a vector: the sizes of norms, heads and gates must be multiples of it.
extern "C" int lanes() { return LANES; }
