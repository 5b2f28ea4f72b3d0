// LSTM whose gates see c (Gers & Schmidhuber 2000): i and f that of the step before, o the new one.
//   i, f = sigmoid(gx + gh + p*c);  g = tanh(gx + gh);  c' = f*c + i*g
//   o = sigmoid(gx + gh + p_o*c');  h' = o*tanh(c')
// with the activations, and the bound of c, of the call.
#pragma once

#include "activation.h"
#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct PeepholeLstmCell : ChosenActivations {
  using ChosenActivations::ChosenActivations;
  static constexpr int kGates = 4;  // i f g o
  static constexpr int kStates = 2;
  static constexpr int kSaved = 4;
  static constexpr int kParameters = 3;  // p_i p_f p_o
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD void forward(const V (&p)[3], const V (&gx)[4], const V (&gh)[4], V (&state)[2],
                          V (&saved)[4]) const {
    V gates[2] = {gx[0] + gh[0] + p[0] * state[1], gx[1] + gh[1] + p[1] * state[1]}, kept_gates[2];
    V g[1] = {gx[2] + gh[2]}, kept_g[1];
    this->gate.forward(gates, kept_gates);
    this->state.forward(g, kept_g);
    state[1] = this->bounded(gates[1] * state[1] + gates[0] * g[0]);
    V o[1] = {gx[3] + gh[3] + p[2] * state[1]}, kept_o[1], c[1] = {state[1]}, unused[1];
    this->gate.forward(o, kept_o);
    this->state.forward(c, unused);
    state[0] = o[0] * c[0];
    saved[0] = kept_gates[0];
    saved[1] = kept_gates[1];
    saved[2] = kept_g[0];
    saved[3] = kept_o[0];
  }

  template <class V>
  RNNFAST_HD void backward(const V (&p)[3], V (&dp)[3], const V (&saved)[4], const V (&prev)[2],
                           const V (&next)[2], V (&dstate)[2], V (&dgx)[4], V (&dgh)[4]) const {
    const V kept_gates[3] = {saved[0], saved[1], saved[3]}, kept_g[1] = {saved[2]};
    const V at_c[1] = {next[1]};
    V gates[3], gate_slopes[3], g[1], g_slope[1], c[1], c_slope[1];
    this->gate.backward(kept_gates, gates, gate_slopes);
    this->state.backward(kept_g, g, g_slope);
    this->state.slope_at(at_c, c, c_slope);
    const V i = gates[0], f = gates[1], o = gates[2];
    const V dh = dstate[0];
    dgx[3] = dh * c[0] * gate_slopes[2];
    const V dc = this->bounded_gradient(f * prev[1] + i * g[0],
                                        dstate[1] + dh * o * c_slope[0] + dgx[3] * p[2]);
    dgx[0] = dc * g[0] * gate_slopes[0];
    dgx[1] = dc * prev[1] * gate_slopes[1];
    dgx[2] = dc * i * g_slope[0];
    for (int k = 0; k < 4; ++k) dgh[k] = dgx[k];
    dp[0] = dgx[0] * prev[1];
    dp[1] = dgx[1] * prev[1];
    dp[2] = dgx[3] * next[1];
    dstate[0] = V{};
    dstate[1] = dc * f + dgx[0] * p[0] + dgx[1] * p[1];
  }
};

static_assert(is_cell<PeepholeLstmCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
