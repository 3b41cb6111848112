// Streams, events, and graphs as lists of names.

#include "device.h"

namespace fake {
namespace {

int next_stream = 1;
unsigned long long next_capture = 1;

Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

Graph& graph_of(cudaGraph_t handle) { return *reinterpret_cast<Graph*>(handle); }

}  // namespace
}  // namespace fake

using namespace fake;

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int) {
    GUARD;
    LIVES;
    auto* stream = new Stream;
    stream->id = next_stream++;
    *out = reinterpret_cast<cudaStream_t>(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) { return cudaStreamCreateWithPriority(out, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    GUARD;
    LIVES;
    if (forbidden("cudaStreamSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
    Stream& stream = stream_of(handle);
    write_down('S', "cudaStreamSynchronize", stream.clock);
    host_knows(stream.clock);
    return cudaSuccess;
}

// Never says that there is still something to do: only waiting tells how late the device is.
cudaError_t cudaStreamQuery(cudaStream_t handle) {
    GUARD;
    LIVES;
    if (forbidden("cudaStreamQuery")) return fail(cudaErrorStreamCaptureUnsupported);
    host_knows(stream_of(handle).clock);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    GUARD;
    LIVES;
    if (stream_of(stream).capturing) problem("a stream whose work is recorded waits for an event");
    merge(stream_of(stream).clock, event_of(event).clock);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    GUARD;
    LIVES;
    if (queue(stream, "host function")) function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
    GUARD;
    LIVES;
    if (queue(stream, "host function")) function(stream, cudaSuccess, data);
    return cudaSuccess;
}

// Events.

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
    *out = reinterpret_cast<cudaEvent_t>(new Event);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete &event_of(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
    GUARD;
    LIVES;
    Stream& stream = stream_of(handle);
    if (stream.capturing) problem("an event is recorded into a graph");
    event_of(event) = {stream.clock};
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }

cudaError_t cudaEventQuery(cudaEvent_t event) {
    GUARD;
    LIVES;
    if (forbidden("cudaEventQuery")) return fail(cudaErrorStreamCaptureUnsupported);
    if (!host_has(event_of(event).clock) && event_of(event).asked++ < PATIENCE) return cudaErrorNotReady;
    host_knows(event_of(event).clock);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    GUARD;
    LIVES;
    if (forbidden("cudaEventSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
    write_down('S', "cudaEventSynchronize", event_of(event).clock);
    host_knows(event_of(event).clock);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 0.01f;
    return cudaSuccess;
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* out, cudaEvent_t) {
    *out = {};
    return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* out, cudaIpcEventHandle_t) { return cudaEventCreate(out); }

// Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    GUARD;
    LIVES;
    Stream& stream = stream_of(handle);
    if (stream.id == 0) {
        problem("the default stream cannot be recorded");
        return fail(cudaErrorStreamCaptureUnsupported);
    }
    stream.capturing = true;
    stream.invalid = false;
    stream.mode = mode;
    stream.owner = std::this_thread::get_id();
    stream.capture = next_capture++;
    stream.nodes.clear();
    captures.push_back(&stream);
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* out) {
    GUARD;
    Stream& stream = stream_of(handle);
    stream.capturing = false;
    std::erase(captures, &stream);
    *out = nullptr;
    if (stream.invalid) return fail(cudaErrorStreamCaptureInvalidated);
    *out = reinterpret_cast<cudaGraph_t>(new Graph{stream.nodes});
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = stream_of(stream).capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* count) {
    cudaStreamIsCapturing(handle, status);
    if (id) *id = stream_of(handle).capture;
    if (graph) *graph = nullptr;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
    *out = reinterpret_cast<cudaGraphExec_t>(new Graph(graph_of(graph)));
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(out, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    GUARD;
    LIVES;
    if (cudaError_t error = fault(Fault::launch)) return fail(error);
    queue(stream, "graph of " + std::to_string(reinterpret_cast<Graph*>(graph)->nodes.size()));
    forget_contents();
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    *count = graph_of(graph).nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
    *count = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete &graph_of(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    delete reinterpret_cast<Graph*>(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
}
