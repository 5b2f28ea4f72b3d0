// LSTM with forget gate (Hochreiter & Schmidhuber 1997; Gers et al. 2000), as torch.nn.LSTM.
//   i, f, o = sigmoid(gx + gh);  g = tanh(gx + gh);  c' = f*c + i*g;  h' = o*tanh(c')
#pragma once

#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct LstmCell {
  static constexpr int kGates = 4;  // i f g o
  static constexpr int kStates = 2;
  static constexpr int kSaved = 4;
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[4], const V (&gh)[4], V (&state)[2], V (&saved)[4]) {
    const V i = sigmoid(gx[0] + gh[0]);
    const V f = sigmoid(gx[1] + gh[1]);
    const V g = tanh(gx[2] + gh[2]);
    const V o = sigmoid(gx[3] + gh[3]);
    state[1] = f * state[1] + i * g;
    state[0] = o * tanh(state[1]);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&saved)[4], const V (&prev)[2], const V (&next)[2],
                                  V (&dstate)[2], V (&dgx)[4], V (&dgh)[4]) {
    const V one = splat<V>(1.0);
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(next[1]);
    const V dh = dstate[0];
    const V dc = dstate[1] + dh * o * (one - tanh_c * tanh_c);
    dgx[0] = dc * g * i * (one - i);
    dgx[1] = dc * prev[1] * f * (one - f);
    dgx[2] = dc * i * (one - g * g);
    dgx[3] = dh * tanh_c * o * (one - o);
    for (int k = 0; k < 4; ++k) dgh[k] = dgx[k];
    dstate[0] = V{};
    dstate[1] = dc * f;
  }
};
static_assert(is_cell<LstmCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
