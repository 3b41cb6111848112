// Vectors of floats for cpu.cpp. They are GCC's own, which it lowers to whatever the CPU has, so there are few
// intrinsics, most of them for bf16. All headers of cpu.cpp are parts of that one file.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) || defined(TILES_EMULATED)
constexpr int LANES = 16, VECTORS = 4;  // of the 32 registers 6 x 4 hold sums
#else
constexpr int LANES = 8, VECTORS = 2;  // of 16 registers (AVX2) 6 x 2
#endif
constexpr int COLS = LANES * VECTORS;  // columns that the matrix kernel computes at once
constexpr int ROWS = 6;                // and rows
constexpr int KEYS = 64;               // keys in a block, and columns of a weight: a multiple of COLS
constexpr int GROUPS = KEYS / LANES;   // of keys in a block
constexpr int BLOCK_ROWS = 192;        // most rows in a block of queries: what fits beside the keys in the L2 cache
constexpr int64_t PARALLEL = 1 << 14;  // numbers below which another thread costs more than it saves

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

// Memory of one thread for numbers in between, in whole cache lines.
struct alignas(64) Line {
    uint32_t words[16];
};
using Scratch = std::vector<Line>;

uint32_t* room(Scratch& scratch, int64_t words) {
    if (const size_t lines = words / 16 + 1; scratch.size() < lines) scratch.resize(lines);
    return scratch.data()->words;
}

template <typename V>
V load_as(const void* from) {
    V vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

Floats splat(float x) { return x - Floats{}; }

Floats load(const float* from) { return load_as<Floats>(from); }
void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

Words widened(const void* halves) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu16_epi32(load_as<__m256i>(halves));  // GCC 12 makes four instructions of it
#else
    return __builtin_convertvector(load_as<Halves>(halves), Words);
#endif
}
Floats load(const bf16* from) { return (Floats)(widened(from) << 16); }
void store(bf16* to, Floats x) {
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
#else  // to the nearest, ties to even; what is no number stays none
    Words bits = (Words)x;
    bits += 0x7fff + (bits >> 16 & 1);
    Halves rounded = __builtin_convertvector((x == x ? bits : (Words)x) >> 16, Halves);
#endif
    std::memcpy(to, &rounded, sizeof rounded);
}

// The first `count` lanes only, where no more may be read or written.
template <typename T>
Floats load_some(const T* from, int count) {
    T some[LANES] = {};
    std::memcpy(some, from, count * sizeof(T));
    return load(some);
}
template <typename T>
void store_some(T* to, Floats x, int count) {
    T some[LANES];
    store(some, x);
    std::memcpy(to, some, count * sizeof(T));
}

// Words of two bf16: in each lane one number of `even` and one of `odd`.
Words bf16_pairs(Floats even, Floats odd) {
#ifdef __AVX512BF16__
    typedef uint16_t Pairs __attribute__((vector_size(LANES * 4)));
    Pairs order;
    for (int i = 0; i < 2 * LANES; i++) order[i] = i / 2 + i % 2 * LANES;
    return (Words)__builtin_shuffle((Pairs)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even), order);
#else
    bf16 halves[2][LANES];
    store(halves[0], even);
    store(halves[1], odd);
    return widened(halves[0]) | widened(halves[1]) << 16;
#endif
}

// 2^x for x up to 127: the nearest power of two, times a polynomial of the rest. What is below 2^-126 is 0. To float
// precision that is the Taylor series; for bf16 one of third degree that is off by a ten-thousandth at most does.
template <typename T>
Floats exp2(Floats x) {
#ifdef __AVX512F__
    if constexpr (std::is_same<T, bf16>::value) {
        const Floats power = (Floats)_mm512_roundscale_ps((__m512)x, 0), t = x - power;
        const Floats series = 0.99992807f + t * (0.693261f + t * (0.24261112f + t * 0.0551716f));
        return (Floats)_mm512_scalef_ps((__m512)series, (__m512)power);
    }
#endif
    constexpr float LN2 = 0.6931471805599453f, ROUND = 12582912.0f;  // 1.5 * 2^23: a sum with it has no room for a
    x = x < -127.0f ? splat(-127.0f) : x;                            // fraction, its last bits are the number
    const Floats shifted = x + ROUND, t = (x - (shifted - ROUND)) * LN2;
    const Floats series = 1 / 6.f + t * (1 / 24.f + t * (1 / 120.f + t * (1 / 720.f)));
    return (Floats)((Words)(1.0f + t * (1.0f + t * (1 / 2.f + t * series))) + ((Words)shifted << 23));
}

// 1 / x to the precision of T: a division takes longer than all the rest of a softmax or a gate.
template <typename T>
Floats reciprocal(Floats x) {
#ifdef __AVX512F__
    if (std::is_same<T, bf16>::value) return (Floats)_mm512_rcp14_ps((__m512)x);
#endif
    return 1.0f / x;
}

template <typename T>
Floats sigmoid(Floats x) {
    Floats power = x * -1.4426950408889634f;
    power = power > 126.0f ? splat(126.0f) : power;
    return reciprocal<T>(1.0f + exp2<T>(power));
}

template <typename T>
Floats silu(Floats x) {
    return x * sigmoid<T>(x);
}

// x (1 + tanh y) / 2 with y = sqrt(2 / pi) (x + 0.044715 x^3), in another form: (1 + tanh y) / 2 is sigmoid(2 y).
template <typename T>
Floats gelu_tanh(Floats x) {
    return x * sigmoid<T>(x * (1.5957691216057308f + 0.07135481282553494f * x * x));
}

template <int S>
Floats swap_lanes(Floats x) {
    Ints from;
    for (int i = 0; i < LANES; i++) from[i] = i ^ S;
    return __builtin_shuffle(x, from);
}

Floats larger(Floats a, Floats b) { return a > b ? a : b; }

__attribute__((always_inline)) inline float largest_lane(Floats x) {
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

}  // namespace
