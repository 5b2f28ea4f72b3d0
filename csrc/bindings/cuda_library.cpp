// Registers the CUDA kernels of the operators whose schemas are _C's, and what only _C_cuda has.
#include "cuda_context.h"
#include "cuda_ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("cuda_set_launch(int launch) -> int");
  m.def("cuda_set_kernel(int kernel) -> int");
  m.def("cuda_last_run(int field) -> int");
  m.def("cuda_ask_for_tf32() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("cuda_set_launch", TORCH_BOX(&rnnfast::cuda_set_launch));
  m.impl("cuda_set_kernel", TORCH_BOX(&rnnfast::cuda_set_kernel));
  m.impl("cuda_last_run", TORCH_BOX(&rnnfast::cuda_last_run));
  m.impl("cuda_ask_for_tf32", TORCH_BOX(&rnnfast::ask_torch_for_tf32));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CUDA, m) {
  m.impl("forward", TORCH_BOX(&rnnfast::cuda_forward_op));
  m.impl("backward", TORCH_BOX(&rnnfast::cuda_backward_op));
  m.impl("forward_lengths", TORCH_BOX(&rnnfast::cuda_forward_lengths_op));
  m.impl("backward_lengths", TORCH_BOX(&rnnfast::cuda_backward_lengths_op));
  m.impl("forward_masked", TORCH_BOX(&rnnfast::cuda_forward_masked_op));
  m.impl("backward_masked", TORCH_BOX(&rnnfast::cuda_backward_masked_op));
  m.impl("gate_gradients", TORCH_BOX(&rnnfast::cuda_gate_gradients_op));
  m.impl("forward_group", TORCH_BOX(&rnnfast::cuda_forward_group_op));
  m.impl("backward_group", TORCH_BOX(&rnnfast::cuda_backward_group_op));
  m.impl("scan", TORCH_BOX(&rnnfast::cuda_scan_op));
  m.impl("scan_backward", TORCH_BOX(&rnnfast::cuda_scan_backward_op));
  m.impl("batch_norm_forward", TORCH_BOX(&rnnfast::CudaBatchNormOps::forward));
  m.impl("batch_norm_backward", TORCH_BOX(&rnnfast::CudaBatchNormOps::backward));
}
