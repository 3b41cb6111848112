// A CUDA device that is not there: what the parts of the stand-in for libcudart, cuBLAS and libcuda share.
//
// Memory is host memory and copies are made; kernels and matrix products are only written down. The device is as late as CUDA
// allows: what is copied to pinned memory arrives when the host has waited for it, and what is copied from there must not have
// changed by then. Each stream counts its operations, and a clock says how many of each stream have ended before: so the order
// of streams is what events and waits make of it, and nothing else.

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace fake {

constexpr size_t MEMORY = 143771ull << 20;  // of an H200, as are the limits below
constexpr size_t SHARED = 48 << 10;  // bytes of shared memory that a block gets unasked
constexpr size_t MOST_SHARED = 227 << 10;
constexpr int PROCESSORS = 132;
constexpr int PATIENCE = 3;  // so often the device is still busy when the host asks whether an event is over

using Clock = std::map<int, uint64_t>;  // by stream: so many of its operations come before

struct Stream {
    int id = 0;
    Clock clock;
    bool capturing = false;
    bool invalid = false;  // what must not happen has happened since the capture began
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    std::thread::id owner;
    unsigned long long capture = 0;
    std::vector<std::string> nodes;
};

struct Event {
    Clock clock;
    int asked = 0;
};

struct Graph {
    std::vector<std::string> nodes;
};

// What a test may let fail: the names of `fake_fail`.
enum class Fault { alloc, host, launch, ipc, count };

extern std::recursive_mutex mutex;
extern std::vector<Stream*> captures;  // that are under way

// The default stream for the handles that stand for it.
Stream& stream_of(cudaStream_t handle);

void merge(Clock& into, const Clock& other);

Clock everything();  // that all streams were given so far

// A line of the log, if it is on: what the host did, and what it knows to be done by that.
void write_down(char kind, const std::string& what, const Clock& done = {});

// The next operation of a stream, or the next node of its graph. Returns its number, 0 if it was recorded.
uint64_t queue(cudaStream_t handle, const std::string& what);

// The host has learnt that all this is done.
void host_knows(const Clock& clock);
bool host_has(const Clock& clock);  // whether it has

// What no test may cause: written to stderr and counted.
void problem(const std::string& what);

// Whether a call must not be made now by this thread, since a graph is being recorded: that is a problem.
bool forbidden(const std::string& what);

// The error of the next call that is to fail in this way, or success.
cudaError_t fault(Fault kind);

// Remembers an error for cudaGetLastError, and returns it.
cudaError_t fail(cudaError_t error);

cudaError_t sticky();  // the error that everything fails with after a launch has failed, or success

// Of memory.cpp: what an address is of.
enum class Kind { pageable, pinned, device };
Kind kind_of(const void* address);

// Of copies.cpp. Copies that ended before `known` arrive, and are looked at.
void arrive(const Clock& known);
// Pinned memory goes, and with it the copies that use it.
void forget_copies(const char* at, size_t bytes);
// A kernel may have written anywhere: what was copied to the device is no longer known to be there.
void forget_contents();

// Of launches.cpp.
std::string kernel_name(const void* function);

}  // namespace fake

#define GUARD std::lock_guard<std::recursive_mutex> guard(fake::mutex)
#define LIVES                                                  \
    if (fake::sticky() != cudaSuccess) return fake::fail(fake::sticky())
