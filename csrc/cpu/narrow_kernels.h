// One instruction set's kernels of fewer than 32 bits, a translation unit of their own.
#pragma once

#include "dispatch.h"

namespace rnnfast::RNNFAST_TARGET {

struct NarrowKernels {
  const ForwardKernels<BFloat16>*bfloat16, *dot_bfloat16;
  const ForwardKernels<Float16>* float16;
  const Int8Kernels* int8;
};
extern const NarrowKernels kNarrow;

}  // namespace rnnfast::RNNFAST_TARGET
