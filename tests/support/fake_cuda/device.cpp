// The log, the clocks, what must not happen while a graph is recorded, and faults that a test asks for.

#include "device.h"

#include <execinfo.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace fake {

std::recursive_mutex mutex;
std::vector<Stream*> captures;

namespace {

struct Failing {
    long from = 0, times = 0;  // the next calls: so many succeed, then so many fail, or all if it is negative
};

const char* const FAULTS[] = {"alloc", "host", "launch", "ipc"};

Stream standard;
Clock host, given;
std::vector<std::string> lines;
bool logging = false;
long problems = 0, refused = 0;
Failing failing[int(Fault::count)];
cudaError_t broken = cudaSuccess;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

std::string text(const Clock& clock) {
    std::string out;
    for (auto& [stream, count] : clock) out += (out.empty() ? "" : ",") + std::to_string(stream) + ":" + std::to_string(count);
    return out;
}

// $FAKE_CUDA_FAULT names a file. What it says, as in "launch 3 1", the first process to make such a call takes, and deletes it;
// "ipc 0 -1" is for all of them, and stays.
void read_faults(Fault kind) {
    static const char* path = std::getenv("FAKE_CUDA_FAULT");
    if (!path || failing[int(kind)].times || access(path, R_OK)) return;
    FILE* file = std::fopen(path, "r");
    if (!file) return;
    char what[16] = "";
    long from = 0, times = 0;
    const bool found = std::fscanf(file, "%15s %ld %ld", what, &from, &times) == 3 && !std::strcmp(what, FAULTS[int(kind)]);
    std::fclose(file);
    if (found && (times < 0 || !unlink(path))) failing[int(kind)] = {from, times};
}

}  // namespace

Stream& stream_of(cudaStream_t handle) {
    return reinterpret_cast<size_t>(handle) <= 2 ? standard : *reinterpret_cast<Stream*>(handle);
}

void merge(Clock& into, const Clock& other) {
    for (auto& [stream, count] : other) into[stream] = std::max(into[stream], count);
}

Clock everything() { return given; }

void write_down(char kind, const std::string& what, const Clock& done) {
    if (logging) lines.push_back(std::string(1, kind) + "\t0\t0\t" + text(done) + "\t" + what);
}

uint64_t queue(cudaStream_t handle, const std::string& what) {
    Stream& stream = stream_of(handle);
    if (stream.capturing) {
        stream.nodes.push_back(what);
        if (logging) lines.push_back("C\t" + std::to_string(stream.id) + "\t0\t\t" + what);
        return 0;
    }
    for (Stream* other : captures)
        if (other->owner == std::this_thread::get_id() && thread_mode != cudaStreamCaptureModeRelaxed)
            problem("while a graph is recorded, on another stream: " + what);
    merge(stream.clock, host);
    const uint64_t number = given[stream.id] = ++stream.clock[stream.id];
    if (logging) {
        const std::string where = std::to_string(stream.id) + "\t" + std::to_string(number);
        lines.push_back("L\t" + where + "\t" + text(stream.clock) + "\t" + what);
    }
    return number;
}

void host_knows(const Clock& clock) {
    merge(host, clock);
    arrive(host);
}

bool host_has(const Clock& clock) {
    return std::all_of(clock.begin(), clock.end(), [](auto& part) { return host[part.first] >= part.second; });
}

void problem(const std::string& what) {
    problems++;
    std::fprintf(stderr, "FAKE CUDA: %s\n", what.c_str());
    if (std::getenv("FAKE_CUDA_TRACE")) {
        void* frames[40];
        backtrace_symbols_fd(frames, backtrace(frames, 40), 2);
    }
}

bool forbidden(const std::string& what) {
    for (Stream* stream : captures) {
        const bool ours = stream->owner == std::this_thread::get_id();
        const bool strict = stream->mode == cudaStreamCaptureModeGlobal || (ours && stream->mode != cudaStreamCaptureModeRelaxed);
        if (strict && thread_mode != cudaStreamCaptureModeRelaxed) {
            problem("while a graph is recorded: " + what);
            stream->invalid = true;
            return true;
        }
    }
    return false;
}

cudaError_t fault(Fault kind) {
    read_faults(kind);
    Failing& next = failing[int(kind)];
    if (!next.times || next.from-- > 0) return cudaSuccess;
    next.from = 0;
    next.times--;
    refused++;
    if (kind == Fault::launch) return broken = cudaErrorLaunchFailure;
    return kind == Fault::ipc ? cudaErrorMapBufferObjectFailed : cudaErrorMemoryAllocation;
}

cudaError_t fail(cudaError_t error) {
    if (error != cudaSuccess) last = error;
    return error;
}

cudaError_t sticky() { return broken; }

}  // namespace fake

using namespace fake;

extern "C" {

// What a test calls.

void fake_log(int on) {
    GUARD;
    logging = on;
    if (on) lines.clear();
}

void fake_dump(const char* path) {
    GUARD;
    FILE* file = std::fopen(path, "w");
    for (auto& line : lines) std::fprintf(file, "%s\n", line.c_str());
    std::fclose(file);
}

long fake_problems() {
    GUARD;
    return problems;
}

// How many calls were let fail.
long fake_refused() {
    GUARD;
    return refused;
}

// `from` calls of a kind succeed from now on, then `times` fail.
void fake_fail(const char* what, long from, long times) {
    GUARD;
    for (int i = 0; i < int(Fault::count); i++)
        if (!std::strcmp(FAULTS[i], what)) failing[i] = {from, times};
}

// An operation that is only its name, on a stream.
void fake_note(cudaStream_t stream, const char* what) {
    GUARD;
    queue(stream, std::string("note ") + what);
}

// Errors.

cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = broken;
    return error;
}

cudaError_t cudaPeekAtLastError() { return last; }

const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
        case cudaErrorMapBufferObjectFailed: return "cudaErrorMapBufferObjectFailed";
        default: {
            static thread_local char name[32];
            std::snprintf(name, sizeof name, "cudaError %d", error);
            return name;
        }
    }
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// Graphs are recorded.

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}
}
