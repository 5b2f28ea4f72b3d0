// How a call of the CUDA operators gets to the engine, and what is remembered of it.
#pragma once

#include <functional>
#include <vector>

#include "cuda_context.h"

namespace rnnfast {

// Passes of one dtype, as the choice sees them.
struct CudaPasses {
  std::vector<Shape> shapes;
  ScalarType dtype;
  Place place;
  bool chained = false, backward = false;
  bool saves = false;                   // for a backward, which must be able to run
  const char* why_only_step = nullptr;  // kept from the on-chip kernel whatever the shapes are
};

Shape cuda_shape(const CheckedLayer& layer, int64_t cell, size_t itemsize);

// The choice, room_of(choice) bytes, the streams, then engine(call).
void run_on_cuda(const CudaPasses& passes, const std::function<int64_t(const CudaChoice&)>& room_of,
                 const std::function<void(const CudaCall&)>& engine);

}  // namespace rnnfast
