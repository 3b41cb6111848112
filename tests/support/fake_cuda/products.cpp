// The functions of cuBLAS and cuBLASLt that torch calls: products are written down.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"

namespace fake {
namespace {

struct Blas {
    cudaStream_t stream;
    int mode;
};

struct Layout {
    uint64_t rows, columns;
};

int product(cudaStream_t stream, const char* function, long m, long n, long k, long batch = 1) {
    GUARD;
    const cudaError_t error = sticky() != cudaSuccess ? sticky() : fault(Fault::launch);
    if (error != cudaSuccess) return 13;  // CUBLAS_STATUS_EXECUTION_FAILED
    char text[160];
    std::snprintf(text, sizeof text, "product %s %ld x %ld x %ld, %ld of it", function, m, n, k, batch);
    queue(stream, text);
    forget_contents();
    return 0;
}

cudaStream_t stream_of_blas(void* handle) { return static_cast<Blas*>(handle)->stream; }

}  // namespace
}  // namespace fake

using namespace fake;

extern "C" {

int cublasCreate_v2(void** out) {
    *out = new Blas{};
    return 0;
}

int cublasDestroy_v2(void*) { return 0; }

int cublasSetStream_v2(void* handle, cudaStream_t stream) {
    static_cast<Blas*>(handle)->stream = stream;
    return 0;
}

int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }

int cublasGetMathMode(void* handle, int* mode) {
    *mode = static_cast<Blas*>(handle)->mode;
    return 0;
}

int cublasSetMathMode(void* handle, int mode) {
    static_cast<Blas*>(handle)->mode = mode;
    return 0;
}

int cublasGetPointerMode_v2(void*, int* mode) {
    *mode = 0;
    return 0;
}

int cublasSetPointerMode_v2(void*, int) { return 0; }
int cublasSetSmCountTarget(void*, int) { return 0; }

int cublasGemmEx(
    void* handle, int, int, int m, int n, int k, const void*, const void*, int, int, const void*, int, int, const void*, void*, int, int,
    int, int) {
    return product(stream_of_blas(handle), "GemmEx", m, n, k);
}

int cublasGemmStridedBatchedEx(
    void* handle, int, int, int m, int n, int k, const void*, const void*, int, int, long long, const void*, int, int, long long,
    const void*, void*, int, int, long long, int batch, int, int) {
    return product(stream_of_blas(handle), "GemmStridedBatchedEx", m, n, k, batch);
}

int cublasSgemm_v2(
    void* handle, int, int, int m, int n, int k, const float*, const float*, int, const float*, int, const float*, float*, int) {
    return product(stream_of_blas(handle), "Sgemm", m, n, k);
}

int cublasSgemmStridedBatched(
    void* handle, int, int, int m, int n, int k, const float*, const float*, int, long long, const float*, int, long long, const float*,
    float*, int, long long, int batch) {
    return product(stream_of_blas(handle), "SgemmStridedBatched", m, n, k, batch);
}

int cublasSgemv_v2(void* handle, int, int m, int n, const float*, const float*, int, const float*, int, const float*, float*, int) {
    return product(stream_of_blas(handle), "Sgemv", m, n, 1);
}

size_t cublasLtGetVersion() { return 130000; }

int cublasLtMatmulDescCreate(void** out, int, int) {
    *out = std::calloc(1, 1024);
    return 0;
}

int cublasLtMatmulDescDestroy(void* description) {
    std::free(description);
    return 0;
}

int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return 0; }

int cublasLtMatmulPreferenceCreate(void** out) {
    *out = std::calloc(1, 1024);
    return 0;
}

int cublasLtMatmulPreferenceDestroy(void* preference) {
    std::free(preference);
    return 0;
}

int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }

int cublasLtMatrixLayoutCreate(void** out, int, uint64_t rows, uint64_t columns, int64_t) {
    *out = new Layout{rows, columns};
    return 0;
}

int cublasLtMatrixLayoutDestroy(void* layout) {
    delete static_cast<Layout*>(layout);
    return 0;
}

int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t) { return 0; }

int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* count) {
    std::memset(results, 0, 64);
    *count = 1;
    return 0;
}

int cublasLtMatmul(
    void*, void*, const void*, const void*, void* a, const void*, void*, const void*, const void*, void*, void*, void* d, const void*,
    void*, size_t, cudaStream_t stream) {
    const auto *left = static_cast<Layout*>(a), *out = static_cast<Layout*>(d);
    const long m = out->rows, n = out->columns, k = left->rows == out->rows ? left->columns : left->rows;
    return product(stream, "LtMatmul", m, n, k);
}
}
