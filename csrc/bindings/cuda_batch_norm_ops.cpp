// The operators of the LSTM with recurrent batch normalisation, on CUDA tensors.
#include "cuda_ops.h"
#include "cuda_run.h"

namespace rnnfast {
namespace {

template <class scalar_t>
bool is_backward(const BatchNormArgs<scalar_t>&) {
  return false;
}
template <class scalar_t>
bool is_backward(const BatchNormBackwardArgs<scalar_t>&) {
  return true;
}

}  // namespace

template <class Args>
void OnCuda::run(const CheckedLayer& layer, const Args& args) {
  CudaPasses passes{{cuda_shape(layer, kBatchNormCell, sizeof(*args.y))}, layer.dtype, layer.place};
  passes.backward = is_backward(args);
  passes.why_only_step = "the on-chip engine has no batch normalisation";
  run_on_cuda(
      passes, [&](const CudaChoice& choice) { return batch_norm_room(choice, args); },
      [&](const CudaCall& call) { cuda_batch_norm(call, args); });
}

template void OnCuda::run(const CheckedLayer&, const BatchNormArgs<float>&);
template void OnCuda::run(const CheckedLayer&, const BatchNormArgs<double>&);
template void OnCuda::run(const CheckedLayer&, const BatchNormBackwardArgs<float>&);
template void OnCuda::run(const CheckedLayer&, const BatchNormBackwardArgs<double>&);

}  // namespace rnnfast
