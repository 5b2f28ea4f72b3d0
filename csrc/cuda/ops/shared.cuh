// The shared memory that a launch asked for.
#pragma once

#include <cuda_runtime.h>

#include "../../core/target.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

__device__ inline char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) char shared[];
  return shared;
#else
  return on_host::shared_memory();
#endif
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
