// Simple recurrent unit (Lei et al. 2018, arXiv:1709.02755): the gates see c through a vector, so
// nothing is multiplied between the steps.
//   f, r = sigmoid(gx + gh + v*c);  c' = f*c + (1 - f)*gx_x;  h' = r*c' + (1 - r)*gx_skip
#pragma once

#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct SruCell {
  static constexpr int kGates = 4;  // x f r skip
  static constexpr int kStates = 2;
  static constexpr int kSaved = 4;
  static constexpr int kParameters = 2;  // v_f v_r
  static constexpr Recurrence kRecurrence = Recurrence::kNone;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD static void forward(const V (&v)[2], const V (&gx)[4], const V (&gh)[4], V (&state)[2],
                                 V (&saved)[4]) {
    const V x = gx[0] + gh[0], skip = gx[3] + gh[3];
    const V f = sigmoid(gx[1] + gh[1] + v[0] * state[1]);
    const V r = sigmoid(gx[2] + gh[2] + v[1] * state[1]);
    state[1] = x + f * (state[1] - x);
    state[0] = skip + r * (state[1] - skip);
    saved[0] = x;
    saved[1] = f;
    saved[2] = r;
    saved[3] = skip;
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&v)[2], V (&dv)[2], const V (&saved)[4],
                                  const V (&prev)[2], const V (&next)[2], V (&dstate)[2],
                                  V (&dgx)[4], V (&dgh)[4]) {
    const V one = splat<V>(1.0);
    const V x = saved[0], f = saved[1], r = saved[2], skip = saved[3], dh = dstate[0];
    const V dc = dstate[1] + dh * r;
    dgx[0] = dc * (one - f);
    dgx[1] = dc * (prev[1] - x) * f * (one - f);
    dgx[2] = dh * (next[1] - skip) * r * (one - r);
    dgx[3] = dh * (one - r);
    for (int k = 0; k < 4; ++k) dgh[k] = dgx[k];
    dv[0] = dgx[1] * prev[1];
    dv[1] = dgx[2] * prev[1];
    dstate[0] = V{};
    dstate[1] = dc * f + dgx[1] * v[0] + dgx[2] * v[1];
  }
};

static_assert(is_cell<SruCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
