// Sums over the ranks of a worker, which are processes of one host (ops/group.py). All map the same memory:
//
//   | rank 0: the round it has come to | rank 1 | ... |  even rounds: PIECE bytes of rank 0 | rank 1 | ... |  odd rounds ... |
//
// In a round each rank writes its numbers to its own place, says so, waits until all have, and reads those of all. It writes
// there again two rounds later: all have come to the round between then, and so read what was there. Every rank adds in the
// order of ranks, in float: all get the same bits, in any run.

#pragma once

#include <sched.h>

#include "cpu_vectors.h"

namespace {

constexpr int64_t PIECE = 1 << 19;  // PIECE in ops/group.py: what a rank gives in a round stays in the caches
constexpr int64_t FEW_NUMBERS = 1 << 15;  // so few are added up by one thread while the others wait
constexpr int SPINS = 2000;  // looks at a rank that is not there yet, about 50 us, before its core may be another's

struct Group {
    int32_t rank, ranks;
    uint32_t round;
    char* memory;

    uint32_t* came(int r) const { return reinterpret_cast<uint32_t*>(memory + 64 * r); }
    char* place(int r) const { return memory + 64 * ranks + ((round & 1) * ranks + r) * PIECE; }
};

// Ends when what every rank has written to its place can be read: to be called by one thread of each.
void meet(Group& group) {
    __atomic_store_n(group.came(group.rank), group.round + 1, __ATOMIC_RELEASE);
    for (int r = 0; r < group.ranks; r++)
        for (int spins = 0; int32_t(__atomic_load_n(group.came(r), __ATOMIC_ACQUIRE) - group.round - 1) < 0; spins++) {
            if (spins >= SPINS) sched_yield();
#ifdef __x86_64__
            else __builtin_ia32_pause();
#endif
        }
}

// to = the sum of the numbers from `first` to `end` of all places.
template <typename T>
void add_places(const Group& group, int64_t first, int64_t end, T* to) {
    for (int64_t i = first; i < end; i += LANES) {
        const int rest = std::min<int64_t>(LANES, end - i);
        Floats sum{};
        for (int r = 0; r < group.ranks; r++) {
            const T* from = reinterpret_cast<const T*>(group.place(r)) + i;
            sum += rest == LANES ? load(from) : load_some(from, rest);
        }
        rest == LANES ? store(to + i, sum) : store_some(to + i, sum, rest);
    }
}

// x [count] becomes the sum of all ranks' x, which are equally long.
template <typename T>
void sum(Group& group, T* x, int64_t count) {
    constexpr int64_t most = PIECE / sizeof(T), part = 4096;
    for (int64_t begin = 0; begin < count; begin += most) {
        const int64_t size = std::min(most, count - begin);
        T *to = x + begin, *own = reinterpret_cast<T*>(group.place(group.rank));
        if (size <= FEW_NUMBERS) {
#pragma omp single
            {
                std::memcpy(own, to, size * sizeof(T));
                meet(group);
                add_places(group, 0, size, to);
                group.round++;
            }
            continue;
        }
#pragma omp for
        for (int64_t i = 0; i < size; i += part) std::memcpy(own + i, to + i, std::min(part, size - i) * sizeof(T));
#pragma omp single
        meet(group);
#pragma omp for
        for (int64_t i = 0; i < size; i += part) add_places(group, i, std::min(i + part, size), to);
#pragma omp single
        group.round++;
    }
}

// On rank 0 `out` [rows, ranks * width] gets x [rows, width] of all ranks side by side, in bytes; it is null elsewhere. Without
// any rows the ranks only wait for each other.
void gather(Group& group, const char* x, int64_t rows, int64_t width, char* out) {
    const int64_t total = rows * width;
    int64_t first = 0;
    do {
        const int64_t size = std::min(PIECE, total - first);
        std::memcpy(group.place(group.rank), x + first, size);
        meet(group);
        for (int r = 0; out && r < group.ranks; r++)
            for (int64_t at = first, next; at < first + size; at = next) {
                next = std::min((at / width + 1) * width, first + size);
                std::memcpy(out + (at / width * group.ranks + r) * width + at % width, group.place(r) + at - first, next - at);
            }
        group.round++;
        first += size;
    } while (first < total);
}

}  // namespace
