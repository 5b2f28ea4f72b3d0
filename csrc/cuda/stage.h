// Where a pass puts its work: a stream at a time, launches that are checked one by one, and
// products in the row-major terms of the engine.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../core/cell_info.h"
#include "engine.h"
#include "threads.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
constexpr const char* kTypeName = "float32";
template <>
constexpr const char* kTypeName<double> = "float64";
template <>
constexpr const char* kTypeName<BFloat16> = "bfloat16";
template <>
constexpr const char* kTypeName<Float16> = "float16";

// An event of this call only.
class Event {
 public:
  Event() = default;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  ~Event() {
    if (event_) cudaEventDestroy(event_);
  }
  cudaError_t record(cudaStream_t stream) {
    if (!event_) {
      const cudaError_t status = cudaEventCreateWithFlags(&event_, cudaEventDisableTiming);
      if (status != cudaSuccess) return status;
    }
    return cudaEventRecord(event_, stream);
  }
  cudaError_t wait(cudaStream_t stream) const { return cudaStreamWaitEvent(stream, event_, 0); }

 private:
  cudaEvent_t event_ = nullptr;
};

// What a call is, for its errors.
struct Subject {
  const char* cell;
  const char* dtype;
  int64_t seq_len, batch, input_size, hidden_size;

  template <class scalar_t>
  static Subject of(int cell, const LayerArgs<scalar_t>& args) {
    return {cell_info(cell).name, kTypeName<scalar_t>, args.seq_len,
            args.batch,           args.input_size,     args.hidden_size};
  }
  [[noreturn]] void fail(const char* where, const std::string& why) const {
    throw std::runtime_error(std::string("rnnfast: the CUDA engine failed in ") + where + " (" +
                             cell + ", " + dtype + ", T=" + std::to_string(seq_len) +
                             " B=" + std::to_string(batch) + " I=" + std::to_string(input_size) +
                             " H=" + std::to_string(hidden_size) + "): " + why);
  }
  void check(cudaError_t status, const char* where) const {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error of a launch is not left for the next caller
    fail(where, std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status));
  }
};

class Stage {
 public:
  Stage(const Blas& blas, const Subject& subject, Launch launch, const CudaStream& stream)
      : blas_(blas), subject_(subject), launch_(launch), stream_(stream) {
    check_blas(blas_.get_math_mode(blas_.handle, &math_mode_), "cublasGetMathMode");
    check_blas(blas_.set_math_mode(blas_.handle, kBlasMathMode), "cublasSetMathMode");
  }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;
  ~Stage() { blas_.set_math_mode(blas_.handle, math_mode_); }

  void use(const CudaStream& stream) {
    if (stream.stream == stream_.stream) return;
    stream_ = stream;
    // Setting the stream takes the handle's workspace away, so that comes second.
    check_blas(blas_.set_stream(blas_.handle, stream.stream), "cublasSetStream");
    if (stream.workspace)
      check_blas(blas_.set_workspace(blas_.handle, stream.workspace, stream.workspace_bytes),
                 "cublasSetWorkspace");
  }
  // What comes next on this stream waits for the event.
  void wait(const Event& event) {
    subject_.check(event.wait(stream_.stream), "cudaStreamWaitEvent");
    follows_event_ = true;
  }
  void record(Event& event) { subject_.check(event.record(stream_.stream), "cudaEventRecord"); }

  // One thread an element of (rows, columns). `after_product`: may be launched before the product
  // that it follows has ended.
  template <class Args>
  void launch(const char* name, void (*kernel)(Args), const Args& args, int64_t rows,
              int64_t columns, bool after_product = false) {
    if (rows == 0 || columns == 0) return;
    const Grid grid = grid_of(rows, columns);
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.stream = stream_.stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    if (after_product && launch_ == Launch::kDependent && !follows_event_) {
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
    follows_event_ = false;
    subject_.check(cudaLaunchKernelEx(&config, kernel, args), name);
  }
  // Blocks of threads that share memory.
  template <class Args>
  void launch_blocks(const char* name, void (*kernel)(Args), const Args& args, int64_t blocks,
                     int64_t threads, int shared_bytes) {
    if (blocks == 0) return;
    subject_.check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        name);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream_.stream;
    follows_event_ = false;
    subject_.check(cudaLaunchKernelEx(&config, kernel, args), name);
  }

  void zero(void* to, int64_t bytes) {
    if (bytes > 0) subject_.check(cudaMemsetAsync(to, 0, bytes, stream_.stream), "cudaMemsetAsync");
  }
  void copy(void* to, const void* from, int64_t bytes) {
    if (bytes > 0)
      subject_.check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_.stream),
                     "cudaMemcpyAsync");
  }

  // C (m, n) = A (m, k) B (n, k)^T, all by rows; `add`: to what C holds.
  template <class scalar_t, class out_t>
  void rows_by_rows(int64_t m, int64_t n, int64_t k, const scalar_t* a, int64_t a_row,
                    const scalar_t* b, out_t* c, bool add = false) {
    product<scalar_t>(kBlasTransposed, kBlasPlain, n, m, k, b, k, a, a_row, c, add);
  }
  // C (m, n) = A (m, k) B (k, n).
  template <class scalar_t, class out_t>
  void rows_by_columns(int64_t m, int64_t n, int64_t k, const scalar_t* a, int64_t a_row,
                       const scalar_t* b, out_t* c, bool add = false) {
    product<scalar_t>(kBlasPlain, kBlasPlain, n, m, k, b, n, a, a_row, c, add);
  }
  // C (m, n) = A (k, m)^T B (k, n).
  template <class scalar_t, class out_t>
  void columns_by_columns(int64_t m, int64_t n, int64_t k, const scalar_t* a, int64_t a_row,
                          const scalar_t* b, int64_t b_row, out_t* c) {
    product<scalar_t>(kBlasPlain, kBlasTransposed, n, m, k, b, b_row, a, a_row, c, false);
  }

 private:
  // In cuBLAS's terms, where matrices lie by columns: C (m, n), without gaps.
  template <class scalar_t, class out_t>
  void product(int op_a, int op_b, int64_t m, int64_t n, int64_t k, const scalar_t* a, int64_t lda,
               const scalar_t* b, int64_t ldb, out_t* c, bool add) {
    if (m == 0 || n == 0) return;
    if (k == 0) {  // cuBLAS refuses leading dimensions of zero
      if (!add) zero(c, m * n * static_cast<int64_t>(sizeof(out_t)));
      return;
    }
    follows_event_ = false;
    using acc_t = accumulator_of<scalar_t>;
    const acc_t alpha = 1, beta = add ? 1 : 0;
    using Type = BlasType<scalar_t>;
    check_blas(
        blas_.gemm_ex(blas_.handle, op_a, op_b, m, n, k, &alpha, a, Type::kData, lda, b,
                      Type::kData, ldb, &beta, c, BlasType<out_t>::kData, m,
                      blas_.tf32 ? Type::kComputeTf32 : Type::kCompute, kBlasDefaultAlgorithm),
        "cublasGemmEx");
  }
  void check_blas(int status, const char* where) const {
    if (status != 0) subject_.fail(where, "cuBLAS status " + std::to_string(status));
  }

  const Blas& blas_;
  const Subject& subject_;
  Launch launch_;
  CudaStream stream_;
  int math_mode_ = 0;
  bool follows_event_ = false;  // then a launch has no launch before it to depend on
};

// Room on the device, cut from one allocation; without one it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class number_t>
  number_t* take(int64_t count) {
    constexpr int64_t kAlign = 256;
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(number_t)) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<number_t*>(at);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
