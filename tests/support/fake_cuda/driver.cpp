// libcuda.so.1, as far as Triton calls it: it loads any module, and kernels are written down by the runtime's stand-in.

#include <cstring>

using Function = const char*;  // the kernel's name

extern "C" {

struct Launch {
    unsigned grid[3], block[3], shared;
    void* stream;
};

__attribute__((weak)) int fake_triton(
    const char* name, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, void* stream);

int cuInit(unsigned) { return 0; }

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return 0;
}

int cuDeviceGet(int* device, int) {
    *device = 0;
    return 0;
}

int cuDeviceGetCount(int* count) {
    *count = 1;
    return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 10: *value = 32; break;  // threads of a warp
        case 16: *value = 132; break;  // multiprocessors
        case 75: *value = 9; break;  // compute capability
        case 97: *value = 227 << 10; break;  // shared memory of a block
        default: *value = 0;
    }
    return 0;
}

int cuCtxGetCurrent(void** context) {
    *context = reinterpret_cast<void*>(16);
    return 0;
}

int cuCtxSetCurrent(void*) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return cuCtxGetCurrent(context); }

int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return 0;
}

int cuGetErrorString(int, const char** text) {
    *text = "an error of the stand-in";
    return 0;
}

int cuModuleLoadData(void** module, const void*) {
    *module = reinterpret_cast<void*>(16);
    return 0;
}

int cuModuleUnload(void*) { return 0; }

int cuModuleGetFunction(Function* out, void*, const char* name) {
    *out = strdup(name);
    return 0;
}

int cuFuncGetAttribute(int* value, int attribute, Function) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : 0;  // threads of a block, registers
    return 0;
}

int cuFuncSetAttribute(Function, int, int) { return 0; }
int cuFuncSetCacheConfig(Function, int) { return 0; }

int cuPointerGetAttribute(void* value, int, unsigned long long address) {
    std::memcpy(value, &address, sizeof address);
    return 0;
}

int cuLaunchKernelEx(const Launch* launch, Function function, void**, void**) {
    if (!fake_triton) return 0;
    const unsigned threads = launch->block[0] * launch->block[1] * launch->block[2];
    return fake_triton(function, launch->grid[0], launch->grid[1], launch->grid[2], threads, launch->shared, launch->stream);
}

int cuOccupancyMaxActiveClusters(int* count, Function, const void*) {
    *count = 1;
    return 0;
}

// Looked up, and not called on the way that is tested here.
int cuTensorMapEncodeTiled() { return 1; }
int cuCtxGetLimit() { return 1; }
int cuCtxSetLimit() { return 1; }
int cuLaunchKernel() { return 1; }
int cuLaunchCooperativeKernel() { return 1; }
int cuLinkAddData_v2() { return 1; }
int cuLinkComplete() { return 1; }
int cuLinkCreate_v2() { return 1; }
int cuModuleLoad() { return 1; }
int cuModuleLoadDataEx() { return 1; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor() { return 1; }
}
