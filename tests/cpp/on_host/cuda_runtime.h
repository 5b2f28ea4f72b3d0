// The part of the CUDA runtime that the engine uses, on the host: its sources compile against this
// header unchanged and run without a GPU, for tests of everything but speed and hardware.
//
// A stream is a queue that nothing runs until on_host::run_all(), which takes from the queues in a
// random order that streams and events allow: what a device might do. Threads of a launch run one
// after the other; those of one that asks for shared memory take turns, and may cooperate
// (block.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "block.h"

#define __global__
#define __device__
#define __launch_bounds__(...)

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorUnknown = 999
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum { cudaEventDisableTiming = 2 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };

namespace on_host {

struct Queue;
struct EventState;

void enqueue(Queue* queue, std::function<void()> work);
// How many of the next launches succeed before one fails; -1: all do.
extern int launches_until_failure;
extern int64_t launches, dependent_launches;

}  // namespace on_host

using cudaStream_t = on_host::Queue*;
using cudaEvent_t = std::shared_ptr<on_host::EventState>*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t status);
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaGetLastError();
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
inline void cudaGridDependencySynchronize() {}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  const bool allowed = on_host::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
  return allowed ? cudaSuccess : cudaErrorInvalidValue;
}

template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args),
                               const Args& args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || block.x * block.y == 0 ||
      block.x * block.y > 1024)
    return cudaErrorInvalidConfiguration;
  const size_t shared_bytes = config->dynamicSmemBytes;
  if (!on_host::may_have_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes))
    return cudaErrorInvalidValue;
  if (on_host::launches_until_failure == 0) return cudaErrorUnknown;
  if (on_host::launches_until_failure > 0) --on_host::launches_until_failure;
  ++on_host::launches;
  if (config->numAttrs > 0) ++on_host::dependent_launches;
  on_host::enqueue(config->stream, [=] {
    if (shared_bytes > 0)
      return on_host::run_blocks(grid, block, shared_bytes, [&] { kernel(args); });
    gridDim = grid;
    blockDim = block;
    // The last block first: nothing may count on another order.
    for (unsigned y = grid.y; y-- > 0;)
      for (unsigned x = grid.x; x-- > 0;)
        for (unsigned ty = 0; ty < block.y; ++ty)
          for (unsigned tx = 0; tx < block.x; ++tx) {
            blockIdx = dim3(x, y);
            threadIdx = dim3(tx, ty);
            kernel(args);
          }
  });
  return cudaSuccess;
}
