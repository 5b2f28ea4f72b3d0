// GRU with the reset gate before the product, as Cho et al. 2014 (arXiv:1406.1078) have it, Keras'
// reset_after=False, ONNX' linear_before_reset=0.
//   r, z = gate(gx + gh);  n = act(gx_n + U_n (r*h) + b_n);  h' = (1 - z)*n + z*h
// with the activations of the call.
#pragma once

#include "activation.h"
#include "stages.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct GruBeforeCell : ChosenActivations {
  using ChosenActivations::ChosenActivations;
  static constexpr int kGates = 3;  // r z n
  static constexpr int kStates = 1;
  static constexpr int kSaved = 3;  // r z n
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = true;
  static constexpr Link kLink = Link::kProduct;
  static constexpr int kLinkedGates = 1;  // n

  template <class V>
  RNNFAST_HD void begin(const V (&gx)[3], V (&gh)[3], V (&state)[1], V& link) const {
    V gates[2] = {gx[0] + gh[0], gx[1] + gh[1]}, kept[2];
    this->gate.forward(gates, kept);
    link = gates[0] * state[0];
    gh[0] = kept[0];
    gh[1] = kept[1];
  }

  template <class V>
  RNNFAST_HD void finish(const V (&gx)[3], const V (&gh)[3], V, V (&state)[1],
                         V (&saved)[3]) const {
    const V kept_z[1] = {gh[1]};
    V z[1], unused[1], n[1] = {gx[2] + gh[2]}, kept_n[1];
    this->gate.backward(kept_z, z, unused);
    this->state.forward(n, kept_n);
    state[0] = n[0] + z[0] * (state[0] - n[0]);
    saved[0] = gh[0];
    saved[1] = gh[1];
    saved[2] = kept_n[0];
  }

  template <class V>
  RNNFAST_HD void finish_backward(const V (&saved)[3], V, const V (&prev)[1], const V (&)[1],
                                  V (&dstate)[1], V (&dgates)[3], V&) const {
    const V kept_z[1] = {saved[1]}, kept_n[1] = {saved[2]};
    V z[1], z_slope[1], n[1], n_slope[1];
    this->gate.backward(kept_z, z, z_slope);
    this->state.backward(kept_n, n, n_slope);
    const V dh = dstate[0];
    dgates[2] = dh * (splat<V>(1.0) - z[0]) * n_slope[0];
    dgates[1] = dh * (prev[0] - n[0]) * z_slope[0];
    dstate[0] = dh * z[0];
  }

  template <class V>
  RNNFAST_HD void begin_backward(const V (&saved)[3], const V (&prev)[1], const V (&)[1], V dlink,
                                 V (&dstate)[1], V (&dgates)[3], V& link) const {
    const V kept_r[1] = {saved[0]};
    V r[1], r_slope[1];
    this->gate.backward(kept_r, r, r_slope);
    dgates[0] = dlink * prev[0] * r_slope[0];
    dstate[0] += dlink * r[0];
    link = r[0] * prev[0];
  }
};
static_assert(is_staged_cell<GruBeforeCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
