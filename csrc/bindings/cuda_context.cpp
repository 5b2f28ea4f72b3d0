#include "cuda_context.h"

#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>

namespace rnnfast {
namespace {

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

// Torch's functions for CUDA, from the library that is loaded: there is nothing to link, and this
// one builds, and loads, beside a torch without CUDA.
struct TorchCuda {
  decltype(&aoti_torch_create_cuda_guard) create_guard;
  decltype(&aoti_torch_delete_cuda_guard) delete_guard;
  decltype(&aoti_torch_get_current_cuda_stream) current_stream;
  decltype(&torch_get_cuda_stream_from_pool) pool_stream;
  decltype(&torch_get_current_cuda_blas_handle) blas_handle;

  static const TorchCuda& loaded() {
    static const TorchCuda functions = load();
    return functions;
  }

 private:
  static TorchCuda load() {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) library = RTLD_DEFAULT;
    TorchCuda torch{};
    if (!(find(library, "aoti_torch_create_cuda_guard", torch.create_guard) &&
          find(library, "aoti_torch_delete_cuda_guard", torch.delete_guard) &&
          find(library, "aoti_torch_get_current_cuda_stream", torch.current_stream) &&
          find(library, "torch_get_cuda_stream_from_pool", torch.pool_stream) &&
          find(library, "torch_get_current_cuda_blas_handle", torch.blas_handle)))
      fail("this torch has no CUDA, or is older than 2.10");
    return torch;
  }
};

// The cuBLAS of torch's handle, as libtorch_cuda finds it: another copy, which another package may
// have loaded, would not know the handle.
Blas load_blas() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library && !dlsym(library, "cublasGemmEx_64")) library = nullptr;
  for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.14"})
    if (!library) library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) fail("torch has loaded no cuBLAS of version 12, 13 or 14");
  Blas blas;
  if (!(find(library, "cublasGemmEx_64", blas.gemm_ex) &&
        find(library, "cublasSetStream_v2", blas.set_stream) &&
        find(library, "cublasSetWorkspace_v2", blas.set_workspace) &&
        find(library, "cublasGetMathMode", blas.get_math_mode) &&
        find(library, "cublasSetMathMode", blas.set_math_mode)))
    fail("torch's cuBLAS is older than version 12");
  return blas;
}

// A driver that is older than the CUDA that this library was built with is seen here.
[[noreturn]] void fail_cuda(const char* what, cudaError_t status) {
  fail(std::string("the CUDA runtime can't ") + what + " the device: " + cudaGetErrorName(status) +
       ", " + cudaGetErrorString(status));
}

void check(AOTITorchError status, const char* what) {
  if (status != AOTI_TORCH_SUCCESS) fail(std::string("torch can't give ") + what);
}

// The handle with the current stream, and torch's workspace for it.
void* torch_handle() {
  void* handle = nullptr;
  check(TorchCuda::loaded().blas_handle(&handle), "its cuBLAS handle");
  return handle;
}

// What cuBLAS recommends: its fast kernels for Hopper and later divide products into more parts.
constexpr int64_t kWorkspace = int64_t{8} << 20, kWorkspaceHopper = int64_t{32} << 20;

}  // namespace

bool ask_torch_for_tf32() {
  StableIValue answer{};
  // Without Python (a compiled model alone) nobody knows: then full precision.
  if (torch_call_dispatcher("rnnfast::tf32_allowed", "", &answer, TORCH_ABI_VERSION) !=
      AOTI_TORCH_SUCCESS)
    return false;
  return torch::stable::detail::to<bool>(answer);
}

CudaContext::CudaContext(Place place) : place_(place) {
  // Lengths may be on another device than x, and bring a call here.
  if (!place.is_cuda()) fail("x must be on a CUDA device where lengths are, got one on the CPU");
  CUDAGuardHandle guard = nullptr;
  check(TorchCuda::loaded().create_guard(place.index, &guard), "a guard of the device");
  guard_ = guard;
  // In a thread that has not used CUDA yet (autograd's), the guard of the device that is current
  // anyway leaves it so, and cuBLAS would complain.
  const cudaError_t status = cudaSetDevice(place.index);
  if (status == cudaSuccess) return;
  TorchCuda::loaded().delete_guard(guard);
  fail_cuda("use", status);
}

CudaContext::~CudaContext() {
  const TorchCuda& torch = TorchCuda::loaded();
  // With several streams, the handle has whichever came last. An error may be on its way: no throw.
  if (streams_.size() > 1) torch.blas_handle(&handle_);
  torch.delete_guard(static_cast<CUDAGuardHandle>(guard_));
}

CudaDevice CudaContext::device() const {
  int major = 0, minor = 0;
  CudaDevice device{};
  for (const auto& [attribute, number] :
       {std::pair{cudaDevAttrComputeCapabilityMajor, &major},
        std::pair{cudaDevAttrComputeCapabilityMinor, &minor},
        std::pair{cudaDevAttrMultiProcessorCount, &device.multiprocessors},
        std::pair{cudaDevAttrMaxSharedMemoryPerBlockOptin, &device.shared_bytes}})
    if (const cudaError_t status = cudaDeviceGetAttribute(number, attribute, place_.index);
        status != cudaSuccess)
      fail_cuda("tell the attributes of", status);
  device.capability = 10 * major + minor;
  return device;
}

const CudaStream* CudaContext::streams(int count) {
  const TorchCuda& torch = TorchCuda::loaded();
  void* stream = nullptr;
  check(torch.current_stream(place_.index, &stream), "the current stream");
  handle_ = torch_handle();
  streams_.push_back({static_cast<cudaStream_t>(stream)});
  if (count == 1) return streams_.data();
  for (int i = 1; i < count; ++i) {
    check(torch.pool_stream(false, place_.index, &stream), "a stream of its pool");
    streams_.push_back({static_cast<cudaStream_t>(stream)});
  }
  // A handle that changes its stream loses its workspace, and streams must not share one.
  const int64_t bytes = device().capability >= 90 ? kWorkspaceHopper : kWorkspace;
  for (CudaStream& each : streams_) {
    workspaces_.push_back(empty({bytes}, ScalarType::Byte, place_));
    each.workspace = workspaces_.back().mutable_data_ptr();
    each.workspace_bytes = static_cast<size_t>(bytes);
  }
  return streams_.data();
}

Blas CudaContext::blas(bool tf32) const {
  static const Blas loaded = load_blas();
  Blas blas = loaded;
  blas.handle = handle_;
  blas.tf32 = tf32;
  return blas;
}

void CudaContext::finish() {}

}  // namespace rnnfast
