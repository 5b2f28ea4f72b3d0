// Registers the CUDA kernels of the operators whose schemas are _C's, and what only _C_cuda has.
#include "cuda_ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("cuda_set(int field, int value) -> int");
  m.def("cuda_last_run(int field) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("cuda_set", TORCH_BOX(&rnnfast::cuda_set));
  m.impl("cuda_last_run", TORCH_BOX(&rnnfast::cuda_last_run));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CUDA, m) {
  m.impl("forward", TORCH_BOX(&rnnfast::cuda_forward_op));
  m.impl("backward", TORCH_BOX(&rnnfast::cuda_backward_op));
  m.impl("forward_group", TORCH_BOX(&rnnfast::cuda_forward_group_op));
  m.impl("backward_group", TORCH_BOX(&rnnfast::cuda_backward_group_op));
}
