// GRU with the reset gate after the product (cuDNN's variant), as torch.nn.GRU; Cho et al. 2014.
//   r, z = sigmoid(gx + gh);  n = tanh(gx_n + r*gh_n);  h' = (1 - z)*n + z*h
#pragma once

#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct GruCell {
  static constexpr int kGates = 3;  // r z n
  static constexpr int kStates = 1;
  static constexpr int kSaved = 4;  // r z n gh_n
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = true;
  static constexpr bool kReadsH = true;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[3], const V (&gh)[3], V (&state)[1], V (&saved)[4]) {
    const V r = sigmoid(gx[0] + gh[0]);
    const V z = sigmoid(gx[1] + gh[1]);
    const V n = tanh(gx[2] + r * gh[2]);
    state[0] = n + z * (state[0] - n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = gh[2];
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&saved)[4], const V (&prev)[1], const V (&)[1],
                                  V (&dstate)[1], V (&dgx)[3], V (&dgh)[3]) {
    const V one = splat<V>(1.0);
    const V r = saved[0], z = saved[1], n = saved[2], gh_n = saved[3];
    const V dh = dstate[0];
    dgx[2] = dh * (one - z) * (one - n * n);
    dgx[0] = dgx[2] * gh_n * r * (one - r);
    dgx[1] = dh * (prev[0] - n) * z * (one - z);
    dgh[0] = dgx[0];
    dgh[1] = dgx[1];
    dgh[2] = dgx[2] * r;
    dstate[0] = dh * z;
  }
};
static_assert(is_cell<GruCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
