// GRU with the reset gate after the product (cuDNN's variant), as torch.nn.GRU; Cho et al. 2014.
//   r, z = sigmoid(gx + gh);  n = tanh(gx_n + r*gh_n);  h' = (1 - z)*n + z*h
// The other instance has the activations of the call.
#pragma once

#include "activation.h"
#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Activations>
struct GruCellOf : Activations {
  using Activations::Activations;
  static constexpr int kGates = 3;  // r z n
  static constexpr int kStates = 1;
  static constexpr int kSaved = 4;  // r z n gh_n
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = true;
  static constexpr bool kReadsH = true;

  template <class V>
  RNNFAST_HD void forward(const V (&gx)[3], const V (&gh)[3], V (&state)[1], V (&saved)[4]) const {
    V gates[2] = {gx[0] + gh[0], gx[1] + gh[1]}, kept_gates[2];
    this->gate.forward(gates, kept_gates);
    V n[1] = {gx[2] + gates[0] * gh[2]}, kept_n[1];
    this->state.forward(n, kept_n);
    state[0] = n[0] + gates[1] * (state[0] - n[0]);
    saved[0] = kept_gates[0];
    saved[1] = kept_gates[1];
    saved[2] = kept_n[0];
    saved[3] = gh[2];
  }

  template <class V>
  RNNFAST_HD void backward(const V (&saved)[4], const V (&prev)[1], const V (&)[1], V (&dstate)[1],
                           V (&dgx)[3], V (&dgh)[3]) const {
    const V kept_gates[2] = {saved[0], saved[1]}, kept_n[1] = {saved[2]};
    V gates[2], gate_slopes[2], n[1], n_slope[1];
    this->gate.backward(kept_gates, gates, gate_slopes);
    this->state.backward(kept_n, n, n_slope);
    const V r = gates[0], z = gates[1], gh_n = saved[3];
    const V dh = dstate[0];
    dgx[2] = dh * (splat<V>(1.0) - z) * n_slope[0];
    dgx[0] = dgx[2] * gh_n * gate_slopes[0];
    dgx[1] = dh * (prev[0] - n[0]) * gate_slopes[1];
    dgh[0] = dgx[0];
    dgh[1] = dgx[1];
    dgh[2] = dgx[2] * r;
    dstate[0] = dh * z;
  }
};

using GruCell = GruCellOf<StandardActivations>;
using GruAnyCell = GruCellOf<ChosenActivations>;
static_assert(is_cell<GruCell>() && is_cell<GruAnyCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
