// Compiled once an instruction set, as kernels.cpp.
#include "batch_norm_kernels.h"

#include "batch_norm_backward.h"
#include "batch_norm_forward.h"

namespace rnnfast::RNNFAST_TARGET {

// constant-initialised: other translation units read them before main
constinit const BatchNormKernels<float> kBatchNorm32 = {
    batch_norm_forward_bytes<float>, run_batch_norm_forward<float>,
    batch_norm_backward_bytes<float>, run_batch_norm_backward<float>};
constinit const BatchNormKernels<double> kBatchNorm64 = {
    batch_norm_forward_bytes<double>, run_batch_norm_forward<double>,
    batch_norm_backward_bytes<double>, run_batch_norm_backward<double>};

}  // namespace rnnfast::RNNFAST_TARGET
