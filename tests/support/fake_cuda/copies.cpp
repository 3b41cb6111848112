// Copies: what the host gets of the device's memory, and pinned memory while a copy may still use it.

#include <cstring>
#include <list>

#include "device.h"

namespace fake {
namespace {

const char* const KINDS[] = {"pageable", "pinned", "device"};
constexpr size_t MOST_COPIED = 64 << 20, MOST_SET = 16 << 20, MOST_REMEMBERED = 4 << 20;

struct Copy {  // between the device and pinned memory `at`, until the host knows that it has been made
    int stream;
    uint64_t number;
    bool arrives;
    char* at;
    std::string content;
};

std::list<Copy> copies;
std::map<char*, size_t> known;  // of the device: what was copied or set there since the last kernel

// What the host gets of the device's memory: zeros, where a kernel would have written.
std::string content_of(const char* source, size_t bytes) {
    auto after = known.upper_bound(const_cast<char*>(source));
    const bool is = after != known.begin() && source + bytes <= std::prev(after)->first + std::prev(after)->second;
    return is ? std::string(source, bytes) : std::string(bytes, 0);
}

void know(char* at, size_t bytes) { known[at] = bytes; }

void move(void* to, const void* from, size_t bytes, Kind target, Kind source) {
    if (source == Kind::device && target != Kind::device) {
        const std::string content = content_of(static_cast<const char*>(from), bytes);
        std::memcpy(to, content.data(), bytes);
    } else if (bytes <= MOST_COPIED) {
        std::memcpy(to, from, bytes);
        if (source != Kind::device) know(static_cast<char*>(to), bytes);
    }
}

// The copy has been made: what it brings is there, or what it took has not been changed since it was asked for.
void finish(const Copy& copy) {
    if (copy.arrives) std::memcpy(copy.at, copy.content.data(), copy.content.size());
    else if (std::memcmp(copy.at, copy.content.data(), copy.content.size()))
        problem("pinned memory was written before the copy of " + std::to_string(copy.content.size()) + " bytes from it was made");
}

bool covers(const Clock& clock, const Copy& copy) {
    auto found = clock.find(copy.stream);
    return found != clock.end() && found->second >= copy.number;
}

// Another copy, after what is in `clock`, comes to pinned memory that earlier ones may still use.
void come_to(const char* at, size_t bytes, bool writes, const Clock& clock) {
    copies.remove_if([&](const Copy& copy) {
        if (at >= copy.at + copy.content.size() || copy.at >= at + bytes) return false;
        if (covers(clock, copy)) {
            finish(copy);
            return true;
        }
        if (writes || copy.arrives) problem("two streams use the same pinned memory, in no order");
        return false;
    });
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t handle, bool async) {
    LIVES;
    const Kind source = kind_of(from), target = kind_of(to);
    const bool pageable = source == Kind::pageable || target == Kind::pageable;
    const std::string what = std::string(async ? pageable ? "PAGEABLE " : "" : "WAITING ") + "copy " + KINDS[int(source)] + " > " +
                             KINDS[int(target)] + " " + std::to_string(bytes);
    if (!async && forbidden(what)) return fail(cudaErrorStreamCaptureImplicit);
    const uint64_t number = queue(handle, what);
    Stream& stream = stream_of(handle);
    char* pinned = target == Kind::pinned ? static_cast<char*>(to) : static_cast<char*>(const_cast<void*>(from));
    const bool brings = source == Kind::device && target == Kind::pinned, takes = source == Kind::pinned && target == Kind::device;
    if (number && (brings || takes)) come_to(pinned, bytes, brings, stream.clock);
    if (!async || (source == Kind::device && target == Kind::pageable)) {
        write_down('S', "cudaMemcpy", stream.clock);
        host_knows(stream.clock);
    }
    if (brings && async && number) {
        copies.push_back({stream.id, number, true, pinned, content_of(static_cast<const char*>(from), bytes)});
        std::memset(to, 0xFF, bytes);
        return cudaSuccess;
    }
    move(to, from, bytes, target, source);
    if (takes && async && number && bytes <= MOST_REMEMBERED)
        copies.push_back({stream.id, number, false, pinned, std::string(pinned, bytes)});
    return cudaSuccess;
}

}  // namespace

void arrive(const Clock& known) {
    copies.remove_if([&](const Copy& copy) {
        if (!covers(known, copy)) return false;
        finish(copy);
        return true;
    });
}

void forget_contents() { known.clear(); }

void forget_copies(const char* at, size_t bytes) {
    copies.remove_if([&](const Copy& copy) { return copy.at >= at && copy.at < at + bytes; });
}

}  // namespace fake

using namespace fake;

extern "C" {

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    GUARD;
    return copy(to, from, bytes, nullptr, false);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    GUARD;
    return copy(to, from, bytes, stream, true);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    GUARD;
    return copy(to, from, bytes, stream, true);
}

cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
    GUARD;
    char* target = static_cast<char*>(to);
    const char* source = static_cast<const char*>(from);
    for (size_t row = 0; row < height; row++)
        if (cudaError_t error = copy(target + row * to_pitch, source + row * from_pitch, width, stream, true)) return error;
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
    GUARD;
    LIVES;
    queue(stream, "set " + std::to_string(bytes));
    if (bytes > MOST_SET) return cudaSuccess;
    std::memset(at, value, bytes);
    know(static_cast<char*>(at), bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* at, int value, size_t bytes) { return cudaMemsetAsync(at, value, bytes, nullptr); }

cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
}
