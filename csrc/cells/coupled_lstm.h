// LSTM whose input gate is what the forget gate leaves (Greff et al. 2017, arXiv:1503.04069,
// "CIFG").
//   f, o = sigmoid(gx + gh);  g = tanh(gx + gh);  c' = f*c + (1 - f)*g;  h' = o*tanh(c')
// with the activations, and the bound of c, of the call.
#pragma once

#include "activation.h"
#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct CoupledLstmCell : ChosenActivations {
  using ChosenActivations::ChosenActivations;
  static constexpr int kGates = 3;  // f g o
  static constexpr int kStates = 2;
  static constexpr int kSaved = 3;
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD void forward(const V (&gx)[3], const V (&gh)[3], V (&state)[2], V (&saved)[3]) const {
    V gates[2] = {gx[0] + gh[0], gx[2] + gh[2]}, kept_gates[2];
    V g[1] = {gx[1] + gh[1]}, kept_g[1];
    this->gate.forward(gates, kept_gates);
    this->state.forward(g, kept_g);
    state[1] = this->bounded(g[0] + gates[0] * (state[1] - g[0]));
    V c[1] = {state[1]}, unused[1];
    this->state.forward(c, unused);
    state[0] = gates[1] * c[0];
    saved[0] = kept_gates[0];
    saved[1] = kept_g[0];
    saved[2] = kept_gates[1];
  }

  template <class V>
  RNNFAST_HD void backward(const V (&saved)[3], const V (&prev)[2], const V (&next)[2],
                           V (&dstate)[2], V (&dgx)[3], V (&dgh)[3]) const {
    const V kept_gates[2] = {saved[0], saved[2]}, kept_g[1] = {saved[1]}, at_c[1] = {next[1]};
    V gates[2], gate_slopes[2], g[1], g_slope[1], c[1], c_slope[1];
    this->gate.backward(kept_gates, gates, gate_slopes);
    this->state.backward(kept_g, g, g_slope);
    this->state.slope_at(at_c, c, c_slope);
    const V f = gates[0], o = gates[1], without_g = prev[1] - g[0];
    const V dh = dstate[0];
    const V dc = this->bounded_gradient(g[0] + f * without_g, dstate[1] + dh * o * c_slope[0]);
    dgx[0] = dc * without_g * gate_slopes[0];
    dgx[1] = dc * (splat<V>(1.0) - f) * g_slope[0];
    dgx[2] = dh * c[0] * gate_slopes[1];
    for (int k = 0; k < 3; ++k) dgh[k] = dgx[k];
    dstate[0] = V{};
    dstate[1] = dc * f;
  }
};

static_assert(is_cell<CoupledLstmCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
