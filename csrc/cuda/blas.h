// Matrix products of the cuBLAS that torch has loaded, by pointers that the bindings fill: there is
// nothing to link, and the numbers of its interface are those of its documentation.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../core/numbers.h"

namespace rnnfast {

struct Blas {
  // cublasGemmEx_64: column-major C (m, n) = alpha * op(A) op(B) + beta * C.
  using GemmEx = int (*)(void* handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k,
                         const void* alpha, const void* a, int type_a, int64_t lda, const void* b,
                         int type_b, int64_t ldb, const void* beta, void* c, int type_c,
                         int64_t ldc, int compute_type, int algorithm);
  using SetStream = int (*)(void* handle, cudaStream_t stream);
  using SetWorkspace = int (*)(void* handle, void* workspace, size_t bytes);
  using GetMathMode = int (*)(void* handle, int* mode);
  using SetMathMode = int (*)(void* handle, int mode);

  void* handle = nullptr;
  GemmEx gemm_ex = nullptr;
  SetStream set_stream = nullptr;
  SetWorkspace set_workspace = nullptr;
  GetMathMode get_math_mode = nullptr;
  SetMathMode set_math_mode = nullptr;
  bool tf32 = false;  // float32 products may round their operands to TF32
};

// cudaDataType_t and cublasComputeType_t of a product, and the type of alpha and beta.
template <class scalar_t>
struct BlasType;
template <>
struct BlasType<float> {
  static constexpr int kData = 0, kCompute = 68, kComputeTf32 = 77;  // CUDA_R_32F, 32F, FAST_TF32
};
template <>
struct BlasType<double> {
  static constexpr int kData = 1, kCompute = 70, kComputeTf32 = 70;  // CUDA_R_64F, 64F
};
template <>
struct BlasType<Float16> {
  static constexpr int kData = 2, kCompute = 68, kComputeTf32 = 68;  // CUDA_R_16F, sums in 32F
};
template <>
struct BlasType<BFloat16> {
  static constexpr int kData = 14, kCompute = 68, kComputeTf32 = 68;  // CUDA_R_16BF, likewise
};

constexpr int kBlasPlain = 0, kBlasTransposed = 1, kBlasDefaultAlgorithm = -1;
// CUBLAS_DEFAULT_MATH (so that the handle's own TF32 mode says nothing) and
// CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION.
constexpr int kBlasMathMode = 0 | 16;

}  // namespace rnnfast
