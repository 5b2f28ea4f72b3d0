// What a call needs of its CUDA device: which it is, streams and cuBLAS, all of them torch's.
#pragma once

#include <vector>

#include "../cuda/engine.h"
#include "checks.h"

namespace rnnfast {

// Whether torch allows TF32 in recurrent layers now. Its flag has no place in the stable ABI: an
// operator that is written in Python tells it.
bool ask_torch_for_tf32();

// Makes the device current while it lives.
class CudaContext {
 public:
  explicit CudaContext(Place place);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  CudaDevice device() const;
  // The caller's current stream, and count - 1 of torch's pool.
  const CudaStream* streams(int count);
  Blas blas(bool tf32) const;
  // Called when all work of the call is launched: the device on the host does it here.
  void finish();

 private:
  Place place_;
  void* guard_ = nullptr;
  void* handle_ = nullptr;
  std::vector<CudaStream> streams_;
  std::vector<Tensor> workspaces_;
};

}  // namespace rnnfast
