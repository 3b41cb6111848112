// CPU kernels: products with weights (cpu_products.h), mixtures of experts (cpu_experts.h), paged attention
// (cpu_attention.h), the delta net (cpu_delta.h), sums over ranks (cpu_group.h), and here RMS norm, rotary embedding and the
// whole model. Compiled at first use by ops/native.py.
//
// Plain pointers, no libtorch: any version of torch works. Each kernel exists for float and, where the CPU multiplies
// bf16 in hardware (AVX-512 BF16), for bf16; all sums are in float.
//
// A kernel is called by all threads of a team, which share its work and wait for each other at its end. Each can be called
// by itself from Python; `forward` at the end is the whole model, so that a step of a hundred and more kernels is one call
// and its threads never go to sleep between two of them.

#include "cpu_delta.h"
#include "cpu_experts.h"
#include "cpu_group.h"

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

// out += x, both [rows, size].
template <typename T>
void add(const T* x, int64_t rows, int64_t size, T* out) {
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = row * size; i < (row + 1) * size; i += LANES) store(out + i, load(out + i) + load(x + i));
}

// In place: x is [rows, heads, dim] with rows `x_stride` apart, cos and sin are [positions, size], where row r is at
// `positions[r]`. The first `size` numbers of a head rotate, each with the one half of `size` away; the first half of sin is
// negated.
template <typename T>
void rope(T* x, int64_t x_stride, int64_t rows, int64_t heads, int64_t dim, int64_t size, const int64_t* positions,
          const T* cos, const T* sin) {
    const int64_t half = size / 2;
    const auto turn = [&](T* low, const T* c, const T* s, auto load, auto store) {
        const Floats a = load(low), b = load(low + half);
        store(low, a * load(c) + b * load(s));
        store(low + half, b * load(c + half) + a * load(s + half));
    };
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            T* low = x + row * x_stride + head * dim;
            const T *c = cos + positions[row] * size, *s = sin + positions[row] * size;
            int64_t i = 0;
            for (; i + LANES <= half; i += LANES)
                turn(low + i, c + i, s + i, [](const T* p) { return load(p); }, [](T* p, Floats v) { store(p, v); });
            const int rest = half - i;
            if (rest)
                turn(low + i, c + i, s + i, [=](const T* p) { return load_some(p, rest); },
                     [=](T* p, Floats v) { store_some(p, v, rest); });
        }
}

// --- the model -------------------------------------------------------------------------------------------------------

// The parts of a layer as in ops/decoder.py; ops/native.py reads the fields here. q, k, v and gates are one matrix;
// the norms may be null. cos and sin are [positions, rotary] as in `rope`.
template <typename T>
struct Attention {
    int32_t index, heads, window, gated, rotary;
    float scale;
    const T *cos, *sin, *q_norm, *k_norm;
    Matrix<T> qkv, out;
};

// Either `attention` or `delta` is not null, and either `mlp` or `experts`; mixer_norm and mlp_norm may be.
template <typename T>
struct Layer {
    const T *input_norm, *mixer_norm, *post_norm, *mlp_norm;
    const Attention<T>* attention;
    const DeltaNet<T>* delta;
    const Mlp<T>* mlp;
    const Experts<T>* experts;

    const Matrix<T>& in() const { return attention ? attention->qkv : delta->qkvz; }
    const Matrix<T>& out() const { return attention ? attention->out : delta->out; }
};

}  // namespace

template <typename T>
struct Model {
    int64_t hidden, layers;
    float eps, scale;
    const T *embedding, *norm;
    Matrix<T> head;
    const Layer<T>* layer;
    Group* group;  // of ranks that have parts of each matrix; or null
};

namespace {

// qkv is what attention's matrix has made of `rows` rows: -> what the heads found, [rows, heads * dim].
template <typename T>
void attend(const Attention<T>& part, const Batch& batch, int64_t rows, const int64_t* positions, float eps, T* qkv,
            T* found, Scratch& scratch) {
    const int64_t dim = batch.dim, q_width = part.heads * dim, kv_width = batch.kv_heads * dim, width = part.qkv.columns;
    T *k = qkv + q_width, *v = k + kv_width, *gates = v + kv_width;
    if (part.q_norm) {
        rms_norm(qkv, width, rows, part.heads, dim, part.q_norm, eps, qkv, width);
        rms_norm(k, width, rows, batch.kv_heads, dim, part.k_norm, eps, k, width);
    }
    // Keys come right after queries, and are rotated alike.
    rope(qkv, width, rows, part.heads + batch.kv_heads, dim, part.rotary, positions, part.cos, part.sin);
    attention(batch, part.index, part.heads, part.scale, part.window, qkv, width, k, width, v, width,
              part.gated ? gates : nullptr, found, scratch);
}

// The same as `Transformer.compute`: float logits [outputs, columns of the head] of the rows `wanted`, in rising order, or
// where there is room for these in place of logits their hidden states [outputs, hidden].
template <typename T>
void forward(const Model<T>& model, const Batch& batch, int64_t rows, const int64_t* tokens, const int64_t* positions,
             int64_t outputs, const int64_t* wanted, float* logits, T* normed) {
    const int64_t hidden = model.hidden;
    int64_t in = 0, mixed = 0, inner = 0;  // numbers of a row, in the layer where they are most
    Mixing<T> mixing;
    Deltas deltas;
    for (const Layer<T>* layer = model.layer; layer < model.layer + model.layers; layer++) {
        in = std::max<int64_t>(in, layer->in().columns), mixed = std::max<int64_t>(mixed, layer->out().size);
        if (layer->mlp) inner = std::max<int64_t>(inner, layer->mlp->down.size);
        if (layer->experts && !mixing.each) mixing.fit(*layer->experts, rows, layer->experts->each());
        if (layer->delta && !deltas.ba) deltas.fit(*layer->delta, rows);
    }
    std::unique_ptr<T[]> memory(new T[rows * (2 * hidden + in + mixed + inner)]);  // as it is, not zeros
    T *x = memory.get(), *h = x + rows * hidden, *made = h + rows * hidden, *found = made + rows * in;
    T* gated = found + rows * mixed;
#pragma omp parallel firstprivate(rows)
    {
        Scratch scratch;
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            const T* from = model.embedding + tokens[row] * hidden;
            if (model.scale == 1)
                std::memcpy(x + row * hidden, from, hidden * sizeof(T));
            else
                for (int64_t i = 0; i < hidden; i += LANES) store(x + row * hidden + i, load(from + i) * model.scale);
        }
        for (int64_t l = 0; l < model.layers; l++) {
            const Layer<T>& layer = model.layer[l];
            rms_norm(x, hidden, rows, 1, hidden, layer.input_norm, model.eps, h, hidden);
            product<T, T>(h, rows, layer.in(), nullptr, made, scratch);
            if (layer.attention) {
                attend(*layer.attention, batch, rows, positions, model.eps, made, found, scratch);
            } else {
                const DeltaNet<T>& part = *layer.delta;
                product<T, float>(h, rows, part.ba, nullptr, deltas.ba.get(), scratch);
                delta(part, batch, rows, made, part.qkvz.columns, deltas.ba.get(), deltas, scratch);
                gated_norm(part, rows, deltas, made + part.channels(), part.qkvz.columns, model.eps, found);
            }
            if (l == model.layers - 1) {
                // No later layer reads the other rows, and of a prompt only the last one's logits are wanted.
                const int64_t width = layer.out().size;
#pragma omp single
                for (int64_t i = 0; i < outputs; i++) {
                    std::memmove(found + i * width, found + wanted[i] * width, width * sizeof(T));
                    std::memmove(x + i * hidden, x + wanted[i] * hidden, hidden * sizeof(T));
                }
                rows = outputs;
            }
            // What is normed before it is added is made in h. Of several ranks the first one adds the residual.
            T* residual = model.group && model.group->rank ? nullptr : x;
            const auto add_made = [&](const T* norm) {
                if (model.group) sum(*model.group, norm ? h : x, rows * hidden);
                if (!norm) return;
                rms_norm(h, hidden, rows, 1, hidden, norm, model.eps, h, hidden);
                add(h, rows, hidden, x);
            };
            product<T, T>(found, rows, layer.out(), layer.mixer_norm ? nullptr : residual, layer.mixer_norm ? h : x, scratch);
            add_made(layer.mixer_norm);
            rms_norm(x, hidden, rows, 1, hidden, layer.post_norm, model.eps, h, hidden);
            T* out = layer.mlp_norm ? h : x;
            if (layer.mlp_norm) residual = nullptr;
            if (layer.mlp) {
                product<T, T>(h, rows, layer.mlp->gate_up, nullptr, gated, scratch);
                product<T, T>(gated, rows, layer.mlp->down, residual, out, scratch);
            } else {
                route(*layer.experts, h, rows, mixing, scratch);
                mixture(*layer.experts, h, rows, mixing, residual, out, scratch);
            }
            add_made(layer.mlp_norm);
        }
        rms_norm(x, hidden, rows, 1, hidden, model.norm, model.eps, logits ? h : normed, hidden);
        if (logits) product<T, float>(h, rows, model.head, nullptr, logits, scratch);
        release_tiles();
    }
}

}  // namespace

// A kernel by itself, by a team of its own.
#define TEAM(...)              \
    _Pragma("omp parallel") {  \
        Scratch scratch;       \
        __VA_ARGS__;           \
        release_tiles();       \
    }

#define EXPORT(T, NAME)                                                                                             \
    extern "C" void forward_##NAME(const Model<T>* model, const Batch* batch, int64_t rows, const int64_t* tokens,  \
                                   const int64_t* positions, int64_t outputs, const int64_t* wanted,                \
                                   float* logits, T* normed) {                                                      \
        forward(*model, *batch, rows, tokens, positions, outputs, wanted, logits, normed);                          \
    }                                                                                                               \
    extern "C" void attention_##NAME(const Batch* batch, int layer, int heads, float scale, int window, const T* q, \
                                     int64_t q_stride, const T* k, int64_t k_stride, const T* v, int64_t v_stride,  \
                                     T* out) {                                                                      \
        TEAM(attention<T>(*batch, layer, heads, scale, window, q, q_stride, k, k_stride, v, v_stride, nullptr, out, \
                          scratch))                                                                                 \
    }                                                                                                               \
    extern "C" void delta_##NAME(const DeltaNet<T>* part, const Batch* batch, int64_t rows, const T* qkv,           \
                                 int64_t stride, const float* ba, T* out) {                                         \
        Deltas at;                                                                                                  \
        at.fit(*part, rows);                                                                                        \
        TEAM(delta(*part, *batch, rows, qkv, stride, ba, at, scratch))                                              \
        const int64_t values = part->values();                                                                      \
        for (int64_t row = 0; row < rows; row++)                                                                    \
            for (int64_t c = 0; c < values; c += LANES)                                                             \
                store(out + row * values + c, load(at.mixed.get() + row * part->channels() + 2 * part->keys() + c));\
    }                                                                                                               \
    extern "C" void mixture_##NAME(const Experts<T>* part, const T* x, int64_t rows, const int32_t* ids,            \
                                   const float* weights, T* out) {                                                  \
        Mixing<T> at;                                                                                               \
        at.fit(*part, rows, part->chosen);                                                                          \
        std::copy(ids, ids + rows * at.each, at.ids.data());                                                        \
        std::copy(weights, weights + rows * at.each, at.weights.data());                                            \
        TEAM(mixture<T>(*part, x, rows, at, nullptr, out, scratch))                                                 \
    }                                                                                                               \
    extern "C" void rms_norm_##NAME(const T* x, int64_t x_stride, int64_t rows, int64_t group, int64_t size,        \
                                    const T* weight, float eps, T* out) {                                           \
        _Pragma("omp parallel if (rows * group * size > PARALLEL)")                                                 \
            rms_norm(x, x_stride, rows, group, size, weight, eps, out, group * size);                               \
    }                                                                                                               \
    extern "C" void rope_##NAME(T* x, int64_t x_stride, int64_t rows, int64_t heads, int64_t dim, int64_t size,     \
                                const int64_t* positions, const T* cos, const T* sin) {                             \
        _Pragma("omp parallel if (rows * heads * dim > PARALLEL)")                                                  \
            rope(x, x_stride, rows, heads, dim, size, positions, cos, sin);                                         \
    }                                                                                                               \
    extern "C" void pack_##NAME(const T* weight, int64_t columns, int64_t size, uint32_t* packed) {                 \
        _Pragma("omp parallel") pack(weight, columns, size, packed);                                                \
    }                                                                                                               \
    extern "C" void product_##NAME(const T* x, int64_t rows, const Matrix<T>* weight, const T* residual, T* out) {  \
        TEAM(product<T, T>(x, rows, *weight, residual, out, scratch))                                               \
    }                                                                                                               \
    extern "C" void logits_##NAME(const T* x, int64_t rows, const Matrix<T>* weight, const T* residual,             \
                                  float* out) {                                                                     \
        TEAM(product<T, float>(x, rows, *weight, residual, out, scratch))                                           \
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
extern "C" void group_sum_float32(Group* group, float* x, int64_t count) {
#pragma omp parallel if (count > FEW_NUMBERS)
    sum(*group, x, count);
}
extern "C" void group_sum_bfloat16(Group* group, bf16* x, int64_t count) {
#pragma omp parallel if (count > FEW_NUMBERS)
    sum(*group, x, count);
}
extern "C" void group_gather(Group* group, const char* x, int64_t rows, int64_t width, char* out) {
    gather(*group, x, rows, width, out);
}
// Whether products of bf16 are made by tiles.
extern "C" int tiles() { return TILES && tiles_allowed(); }
// Numbers in a vector: the sizes of norms, heads and gates must be multiples of it.
extern "C" int lanes() { return LANES; }
