// How the CUDA step engine runs a call: a pure function of printable numbers, as choose_engine.h is
// for the CPU.
#pragma once

#include <string>

#include "choose_engine.h"

namespace rnnfast {

// The device as the choice sees it.
struct CudaDevice {
  int capability;  // 10 * major + minor: 90 for Hopper
};

// How a step's pointwise kernel follows its product: when that has ended, or launched before and
// waiting on the device (programmatic dependent launch, from compute capability 9.0 on).
enum class Launch : int { kPlain = 0, kDependent = 1 };

struct CudaWish {
  int launch = -1;  // a Launch, or -1 for the library's own choice
};

struct CudaChoice {
  Launch launch;
  int streams;          // passes that run at the same time
  int64_t chunk_steps;  // of an input projection; chained passes follow each other by so many
};

// Why the device can't run the engine, or an empty string.
std::string why_not_cuda(const CudaDevice& device);

CudaChoice choose_cuda(const Group& group, const CudaDevice& device, const CudaWish& wish);

}  // namespace rnnfast
