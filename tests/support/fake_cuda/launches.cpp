// Kernels: registered, checked against what the device can launch, and written down. The device's properties.

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace fake {
namespace {

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};

std::map<const void*, std::string> names;
std::map<const void*, size_t> variables;
std::map<const void*, void*> places;  // of variables
std::map<const void*, size_t> granted;  // shared memory that a kernel may have beyond SHARED
thread_local Configuration pushed;

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    GUARD;
    LIVES;
    char shape[128];
    std::snprintf(
        shape, sizeof shape, "kernel <%u,%u,%u|%u,%u,%u|%zu> ", grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    const std::string what = shape + kernel_name(function);
    const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
    if (!threads || threads > 1024 || block.z > 64 || !blocks || grid.x > 0x7fffffffu || grid.y > 0xffff || grid.z > 0xffff) {
        problem("no device launches " + what);
        return fail(cudaErrorInvalidConfiguration);
    }
    if (shared > SHARED && granted[function] < shared) {
        problem("too much shared memory: " + what);
        return fail(cudaErrorInvalidValue);
    }
    if (cudaError_t error = fault(Fault::launch)) return fail(error);
    queue(stream, what);
    forget_contents();
    return cudaSuccess;
}

int encode_nothing() { return 0; }

}  // namespace

std::string kernel_name(const void* function) {
    auto found = names.find(function);
    if (found == names.end()) return "?";
    int status;
    char* readable = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
    const std::string name = readable ? readable : found->second;
    std::free(readable);
    return name;
}

}  // namespace fake

using namespace fake;

extern "C" {

// Called by the driver's stand-in, for Triton.
int fake_triton(const char* name, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, cudaStream_t stream) {
    GUARD;
    if (sticky() != cudaSuccess) return sticky();
    const std::string what = "kernel of Triton " + std::string(name);
    if (!x || !y || !z || y > 0xffff || z > 0xffff || threads > 1024 || shared > MOST_SHARED) {
        problem("no device launches " + what);
        return cudaErrorInvalidConfiguration;
    }
    queue(stream, what);
    forget_contents();
    return cudaSuccess;
}

// What compiled modules call when they are loaded.

void** __cudaRegisterFatBinary(void*) {
    static void* handle[2];
    return handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    GUARD;
    names[function] = name;
}

void __cudaRegisterVar(void**, char* variable, char*, const char*, int, size_t bytes, int, int) {
    GUARD;
    variables[variable] = bytes;
}

cudaError_t cudaGetSymbolAddress(void** out, const void* variable) {
    GUARD;
    void*& place = places[variable];
    if (!place) place = std::calloc(1, variables.count(variable) ? variables[variable] : 4096);
    *out = place;
    return cudaSuccess;
}

// Launches.

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *static_cast<cudaStream_t*>(stream) = pushed.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
    *out = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(function, grid, block, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
    return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    GUARD;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (size_t(value) > MOST_SHARED) {
        problem("too much shared memory is asked for " + kernel_name(function));
        return fail(cudaErrorInvalidValue);
    }
    granted[function] = value;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
    *out = {};
    out->binaryVersion = out->ptxVersion = 90;
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 64;
    return cudaSuccess;
}

// A guess at what a kernel of 64 registers allows. FlashInfer plans with it, and with no more than 2 for prompts.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* out, const void*, int threads, size_t shared, unsigned) {
    const int by_threads = 2048 / threads, by_registers = 65536 / (threads * 64);
    const int by_shared = shared ? 233472 / int(shared + 1024) : 32;
    *out = std::max(1, std::min({by_threads, by_registers, by_shared, 32}));
    return cudaSuccess;
}

// The device.

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {
    *out = {};
    std::strcpy(out->name, "stand-in for an H200");
    out->major = 9;
    out->totalGlobalMem = MEMORY;
    out->multiProcessorCount = PROCESSORS;
    out->sharedMemPerBlock = SHARED;
    out->sharedMemPerBlockOptin = MOST_SHARED;
    out->sharedMemPerMultiprocessor = 228 << 10;
    out->regsPerBlock = out->regsPerMultiprocessor = 65536;
    out->warpSize = 32;
    out->maxThreadsPerBlock = out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
    out->maxThreadsDim[2] = 64;
    out->maxThreadsPerMultiProcessor = 2048;
    out->maxBlocksPerMultiProcessor = 32;
    out->maxGridSize[0] = 0x7fffffff;
    out->maxGridSize[1] = out->maxGridSize[2] = 0xffff;
    out->totalConstMem = 65536;
    out->l2CacheSize = 60 << 20;
    out->unifiedAddressing = out->concurrentKernels = 1;
    out->asyncEngineCount = 3;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    static const std::map<int, int> values = {
        {cudaDevAttrMultiProcessorCount, PROCESSORS},
        {cudaDevAttrComputeCapabilityMajor, 9},
        {cudaDevAttrMaxSharedMemoryPerBlock, SHARED},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, MOST_SHARED},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMaxThreadsPerBlock, 1024},
        {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
        {cudaDevAttrMaxGridDimX, 0x7fffffff},
        {cudaDevAttrMaxGridDimY, 0xffff},
        {cudaDevAttrMaxGridDimZ, 0xffff},
        {cudaDevAttrClockRate, 1980000},
        {cudaDevAttrL2CacheSize, 60 << 20},
        {cudaDevAttrMemoryPoolsSupported, 1},
        {cudaDevAttrCooperativeLaunch, 1},
    };
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    GUARD;
    LIVES;
    if (forbidden("cudaDeviceSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
    write_down('S', "cudaDeviceSynchronize", everything());
    host_knows(everything());
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }

cudaError_t cudaDeviceGetPCIBusId(char* out, int size, int) {
    std::snprintf(out, size, "0000:00:01.0");
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
    const bool found = !std::strcmp(name, "cuTensorMapEncodeTiled");  // of what a grouped product reads, and none is computed
    if (function) *function = found ? reinterpret_cast<void*>(encode_nothing) : nullptr;
    if (result) *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
}
