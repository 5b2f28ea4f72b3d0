// The operators of layer_ops.cpp with masks inside the recurrence: zoneout, and dropout of h where
// it enters the product with w_hh. Masks are the caller's, and have no gradient.
#include "cpu_calls.h"

namespace rnnfast {
namespace {

ForwardResult forward_masked(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                             Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                             OptionalTensor w_hr, OptionalTensor batch_sizes, OptionalTensor reset,
                             OptionalTensor zone, OptionalTensor h_kept, OptionalTensor packed,
                             double keep_h, double keep_c, double h_scale, int64_t cell,
                             bool reverse, bool save) {
  const MaskTensors masks{zone, h_kept, keep_h, keep_c, h_scale};
  return cpu_forward(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset, masks}, batch_sizes, packed,
                     cell, reverse, save);
}

BackwardResult backward_masked(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                               Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                               Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                               OptionalTensor w_hr, OptionalTensor batch_sizes,
                               OptionalTensor reset, OptionalTensor zone, OptionalTensor h_kept,
                               Tensor y, Tensor saved, double keep_h, double keep_c, double h_scale,
                               int64_t cell, bool reverse, int64_t needs) {
  const MaskTensors masks{zone, h_kept, keep_h, keep_c, h_scale};
  return cpu_backward(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset, masks}, batch_sizes,
                      {dy, dh_n, dc_n, y, saved, needs}, cell, reverse);
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def(
      "forward_masked(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor? reset, Tensor? zone, Tensor? "
      "h_kept, Tensor? packed, float keep_h, float keep_c, float h_scale, int cell, bool reverse, "
      "bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward_masked(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, "
      "Tensor? reset, Tensor? zone, Tensor? h_kept, Tensor y, Tensor saved, float keep_h, float "
      "keep_c, float h_scale, int cell, bool reverse, int needs) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("forward_masked", TORCH_BOX(&rnnfast::forward_masked));
  m.impl("backward_masked", TORCH_BOX(&rnnfast::backward_masked));
}
