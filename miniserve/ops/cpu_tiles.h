// Tiles: matrix registers of 16 rows x 64 bytes, and one instruction that multiplies two of them (AMX). A tile of bf16 on
// the left is [row, 32 numbers of the inner dimension]. On the right it is what `pack` and the pages make of weights, keys
// and values anyway: [word, 16 columns], where a word is two numbers that are neighbours along the inner dimension.
//
//        left: 16 rows                right: 16 words                sum: 16 rows
//      k 0 1 2 ...  31            column 0        1                column 0 1 ... 15
//     +---------------+          +--------+--------+--            +---------------+
//   r | x x x  ...  x |   word 0 | k0  k1 | k0  k1 |       +=   r | f f f  ...  f |
//     +---------------+        1 | k2  k3 | k2  k3 |              +---------------+
//
// Below is the type `Tile`, twice: the hardware's, and a twin in plain C++ that does the same with the same arguments, so
// that every index of the kernels is tested on any CPU (MINISERVE_CPU_ISA=tiles-emulated).

#pragma once

#include "cpu_vectors.h"
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && !defined(TILES_EMULATED)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;
constexpr int TILE_WORDS = TILE_BYTES / 4;

// What the eight registers hold: four sums, and two tiles each of the left and the right matrix. Only the number of rows on
// the left, and so of sums, changes.
enum Register { SUM0, SUM1, SUM2, SUM3, LEFT, LEFT_OTHER, RIGHT, RIGHT_OTHER };
constexpr int SUMS = 4;

constexpr int tile_rows(int name, int rows) { return name < RIGHT ? rows : TILE_ROWS; }

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && !defined(TILES_EMULATED)

constexpr bool TILES = true;

// Linux gives a process these large registers when it asks for them (feature 18 is their data).
bool tiles_allowed() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023;
    static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, 18) == 0;
    return allowed;
}

thread_local int shaped_rows = 0;

// Each thread says what its registers hold before it uses them, and lets go of them at the end: the kernel then has less to
// save when it switches threads.
void shape_tiles(int rows) {
    if (shaped_rows == rows) return;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    for (int name = 0; name < 8; name++) {
        shape.bytes[name] = TILE_BYTES;
        shape.rows[name] = tile_rows(name, rows);
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
    shaped_rows = rows;
}
void release_tiles() {
    if (shaped_rows) asm volatile("tilerelease");
    shaped_rows = 0;
}

template <int NAME>
struct Tile {
    static void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(NAME)); }
    static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(NAME) : "memory");
    }
    static void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(NAME) : "memory");
    }
    template <int A, int B>
    static void add_product(Tile<A>, Tile<B>) {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(NAME), "i"(A), "i"(B));
    }
};

#else

#ifdef TILES_EMULATED
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif
bool tiles_allowed() { return TILES; }

struct Registers {
    int rows;
    alignas(64) uint8_t bytes[8][TILE_ROWS * TILE_BYTES];
};
thread_local Registers registers;

void shape_tiles(int rows) {
    if (registers.rows != rows) std::memset(&registers, 0, sizeof registers);
    registers.rows = rows;
}
void release_tiles() { registers.rows = 0; }

template <int NAME>
struct Tile {
    static uint8_t* row(int r) { return registers.bytes[NAME] + r * TILE_BYTES; }
    static void zero() { std::memset(row(0), 0, TILE_ROWS * TILE_BYTES); }
    static void load(const void* from, int64_t stride) {
        for (int r = 0; r < tile_rows(NAME, registers.rows); r++)
            std::memcpy(row(r), static_cast<const uint8_t*>(from) + r * stride, TILE_BYTES);
    }
    static void store(void* to, int64_t stride) {
        for (int r = 0; r < tile_rows(NAME, registers.rows); r++)
            std::memcpy(static_cast<uint8_t*>(to) + r * stride, row(r), TILE_BYTES);
    }
    template <int A, int B>
    static void add_product(Tile<A>, Tile<B>) {
        for (int r = 0; r < registers.rows; r++)
            for (int column = 0; column < TILE_WORDS; column++) {
                float sum;
                std::memcpy(&sum, row(r) + column * 4, sizeof sum);
                for (int word = 0; word < TILE_WORDS; word++)
                    for (int half = 0; half < 4; half += 2)
                        sum += number(Tile<A>::row(r) + word * 4 + half) * number(Tile<B>::row(word) + column * 4 + half);
                std::memcpy(row(r) + column * 4, &sum, sizeof sum);
            }
    }
    static float number(const uint8_t* half) {
        uint32_t bits = (half[0] | half[1] << 8) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
};

#endif

}  // namespace
