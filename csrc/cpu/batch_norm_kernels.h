// One instruction set's kernels of the LSTM with batch normalisation, a translation unit of their
// own.
#pragma once

#include "dispatch.h"

namespace rnnfast::RNNFAST_TARGET {

extern const BatchNormKernels<float> kBatchNorm32;
extern const BatchNormKernels<double> kBatchNorm64;

}  // namespace rnnfast::RNNFAST_TARGET
