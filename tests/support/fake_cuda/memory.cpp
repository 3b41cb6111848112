// Memory of the device, its parts that other processes map, and pinned memory of the host.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "device.h"

namespace fake {
namespace {

constexpr size_t UNIT = 2 << 20;

struct Range {
    size_t bytes;
    Kind kind;
};

struct Handle {  // of CUDA IPC: the file that is the memory of a device, and where in it
    pid_t process;
    int file;
    size_t offset, bytes;
};

// The device's memory is a sparse file, so that another process can map a part of it as by CUDA IPC.
int file = -1;
char* base = nullptr;
std::map<size_t, size_t> holes;  // offset -> bytes
std::map<char*, Range> ranges;
size_t used = 0;

size_t whole(size_t bytes) { return (bytes + UNIT - 1) / UNIT * UNIT; }

void open_device() {
    if (base) return;
    file = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (ftruncate(file, 2 * MEMORY)) std::abort();
    void* mapped = mmap(nullptr, 2 * MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (mapped == MAP_FAILED) std::abort();
    base = static_cast<char*>(mapped);
    holes[0] = 2 * MEMORY;  // twice, so that what lies between is never the reason why something does not fit
}

cudaError_t allocate(void** out, size_t bytes) {
    if (cudaError_t error = fault(Fault::alloc)) return fail(error);
    open_device();
    const size_t size = whole(bytes);
    if (used + size > MEMORY) return fail(cudaErrorMemoryAllocation);
    for (auto [offset, room] : holes) {
        if (room < size) continue;
        holes.erase(offset);
        if (room > size) holes[offset + size] = room - size;
        used += size;
        *out = base + offset;
        ranges[base + offset] = {bytes, Kind::device};
        return cudaSuccess;
    }
    return fail(cudaErrorMemoryAllocation);
}

cudaError_t release(void* address) {
    if (!address) return cudaSuccess;
    auto found = ranges.find(static_cast<char*>(address));
    if (found == ranges.end()) return fail(cudaErrorInvalidValue);
    size_t offset = found->first - base, size = whole(found->second.bytes);
    used -= size;
    fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
    ranges.erase(found);
    auto next = holes.lower_bound(offset);
    if (next != holes.end() && next->first == offset + size) {
        size += next->second;
        next = holes.erase(next);
    }
    if (next != holes.begin() && std::prev(next)->first + std::prev(next)->second == offset) std::prev(next)->second += size;
    else holes[offset] = size;
    return cudaSuccess;
}

// Pinned memory goes: CUDA waits for what still uses it.
void unpin(char* at) {
    auto found = ranges.find(at);
    if (found == ranges.end()) return;
    forget_copies(at, found->second.bytes);
    ranges.erase(found);
}

}  // namespace

Kind kind_of(const void* address) {
    char* at = static_cast<char*>(const_cast<void*>(address));
    auto after = ranges.upper_bound(at);
    if (after == ranges.begin()) return Kind::pageable;
    auto& [begin, range] = *std::prev(after);
    return at < begin + range.bytes ? range.kind : Kind::pageable;
}

}  // namespace fake

using namespace fake;

extern "C" {

cudaError_t cudaMalloc(void** out, size_t bytes) {
    GUARD;
    LIVES;
    if (forbidden("cudaMalloc")) return fail(cudaErrorStreamCaptureUnsupported);
    write_down('M', "cudaMalloc " + std::to_string(bytes));
    return allocate(out, bytes);
}

cudaError_t cudaFree(void* address) {
    GUARD;
    if (address && forbidden("cudaFree")) return fail(cudaErrorStreamCaptureUnsupported);
    write_down('M', "cudaFree");
    return release(address);
}

cudaError_t cudaMallocAsync(void** out, size_t bytes, cudaStream_t) {
    GUARD;
    LIVES;
    return allocate(out, bytes);
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t) {
    GUARD;
    return release(address);
}

cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
    GUARD;
    LIVES;
    if (cudaError_t error = fault(Fault::host)) return fail(error);
    write_down('M', "cudaHostAlloc " + std::to_string(bytes));
    if (posix_memalign(out, 4096, bytes ? bytes : 1)) return fail(cudaErrorMemoryAllocation);
    ranges[static_cast<char*>(*out)] = {bytes, Kind::pinned};
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
    GUARD;
    unpin(static_cast<char*>(address));
    std::free(address);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
    GUARD;
    LIVES;
    if (cudaError_t error = fault(Fault::host)) return fail(error);
    ranges[static_cast<char*>(address)] = {bytes, Kind::pinned};
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* address) {
    GUARD;
    unpin(static_cast<char*>(address));
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    GUARD;
    const size_t context = 600 << 20;
    *total = MEMORY;
    *free = used + context < MEMORY ? MEMORY - used - context : 0;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* address) {
    GUARD;
    *out = {};
    const Kind kind = kind_of(address);
    out->type = kind == Kind::device ? cudaMemoryTypeDevice : kind == Kind::pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    if (kind != Kind::pageable) out->devicePointer = const_cast<void*>(address);
    if (kind == Kind::pinned) out->hostPointer = const_cast<void*>(address);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    *pool = reinterpret_cast<cudaMemPool_t>(16);
    return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
    *static_cast<uint64_t*>(value) = 0;
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

// CUDA IPC.

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* out, void* address) {
    GUARD;
    LIVES;
    auto found = ranges.find(static_cast<char*>(address));
    if (found == ranges.end() || found->second.kind != Kind::device) {
        problem("an IPC handle of what is not the beginning of an allocation");
        return fail(cudaErrorInvalidValue);
    }
    const Handle handle{getpid(), file, size_t(found->first - base), whole(found->second.bytes)};
    std::memset(out, 0, sizeof *out);
    std::memcpy(out, &handle, sizeof handle);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void** out, cudaIpcMemHandle_t given, unsigned) {
    GUARD;
    LIVES;
    if (cudaError_t error = fault(Fault::ipc)) return fail(error);
    Handle handle;
    std::memcpy(&handle, &given, sizeof handle);
    if (handle.process == getpid()) {
        problem("an IPC handle was opened in the process that it is of");
        return fail(cudaErrorDeviceUninitialized);
    }
    const std::string path = "/proc/" + std::to_string(handle.process) + "/fd/" + std::to_string(handle.file);
    const int theirs = open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (theirs < 0) return fail(cudaErrorMapBufferObjectFailed);
    void* mapped = mmap(nullptr, handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, theirs, handle.offset);
    close(theirs);
    if (mapped == MAP_FAILED) return fail(cudaErrorMapBufferObjectFailed);
    ranges[static_cast<char*>(mapped)] = {handle.bytes, Kind::device};
    *out = mapped;
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void* address) {
    GUARD;
    auto found = ranges.find(static_cast<char*>(address));
    if (found == ranges.end()) return fail(cudaErrorInvalidValue);
    munmap(address, found->second.bytes);
    ranges.erase(found);
    return cudaSuccess;
}
}
