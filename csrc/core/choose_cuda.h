// How the CUDA engine runs a call: a pure function of printable numbers, as choose_engine.h is
// for the CPU.
#pragma once

#include <string>

#include "choose_engine.h"
#include "onchip.h"

namespace rnnfast {

// The device as the choice sees it.
struct CudaDevice {
  int capability;  // 10 * major + minor: 90 for Hopper
  int multiprocessors = 0;
  int shared_bytes = 0;  // of a block that asks for them
};

// How a step's pointwise kernel follows its product: when that has ended, or launched before and
// waiting on the device (programmatic dependent launch, from compute capability 9.0 on).
enum class Launch : int { kPlain = 0, kDependent = 1 };

// What takes the steps of a dense recurrence: a product and a kernel each, or one launch with w_hh
// on chip.
enum class CudaKernel : int { kStep = 0, kOnchip = 1 };

// What is wished: -1 for the library's own choice. `tf32`: float32 products may use it.
struct CudaWish {
  int launch = -1, kernel = -1;
  bool tf32 = false;
};

struct CudaChoice {
  Launch launch;
  int streams;          // passes that run at the same time
  int64_t chunk_steps;  // of an input projection; chained passes follow each other by so many
  const OnchipTile* tile = nullptr;  // null: the step engine
};

// Why the device can't run the engine, or an empty string.
std::string why_not_cuda(const CudaDevice& device);

// Why no kernel can keep w_hh of the passes on chip, or an empty string.
std::string why_not_onchip(const Group& group, const CudaDevice& device, bool tf32);

CudaChoice choose_cuda(const Group& group, const CudaDevice& device, const CudaWish& wish);

}  // namespace rnnfast
