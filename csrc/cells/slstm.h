// sLSTM (Beck et al. 2024, arXiv:2405.04517): exponential input gate, a normaliser n and a
// stabiliser m of its logarithms.
//   i, f, g, o from gx + gh;  o = sigmoid, g = tanh;  F = log of the forget gate
//   m' = max(F + m, i);  i' = exp(i - m');  f' = exp(F + m - m')
//   c' = f'*c + i'*g;  n' = f'*n + i';  h' = o * c'/n'
// with F = log(sigmoid(f)), or F = f where that gate is exponential, too. Where c and n are zeros,
// nothing is carried on: m' = i there, so that n' = 1 however small i is.
#pragma once

#include "../core/activations.h"
#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// The logarithm of the forget gate and its derivative; backward needs so many planes of it.
struct SigmoidForget {
  static constexpr int kSaved = 1;

  template <class V>
  RNNFAST_HD static V log(V f, V& slope) {
    const V u = exp(-magnitude(f)), one = splat<V>(1.0);
    slope = Lanes<V>::quotient(f < V{} ? one : u, one + u);
    return (f < V{} ? f : V{}) - log1p_of_fraction(u);
  }
};

struct ExponentialForget {
  static constexpr int kSaved = 0;

  template <class V>
  RNNFAST_HD static V log(V f, V& slope) {
    slope = splat<V>(1.0);
    return f;
  }
};

template <class Forget>
struct SlstmCellOf {
  static constexpr int kGates = 4;   // i f g o
  static constexpr int kStates = 4;  // h c n m
  static constexpr int kSaved = 4 + Forget::kSaved;
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[4], const V (&gh)[4], V (&state)[4],
                                 V (&saved)[kSaved]) {
    const V log_i = gx[0] + gh[0];
    V slope;
    const V carried = Forget::log(gx[1] + gh[1], slope) + state[3];
    const V g = tanh(gx[2] + gh[2]), o = sigmoid(gx[3] + gh[3]);
    const V larger = carried > log_i ? carried : log_i;
    const V without_n = state[1] == V{} ? log_i : larger;
    const V m = state[2] == V{} ? without_n : larger;
    const V i = exp(log_i - m), f = exp(carried - m);
    state[1] = f * state[1] + i * g;
    state[2] = f * state[2] + i;
    state[3] = m;
    state[0] = o * Lanes<V>::quotient(state[1], state[2]);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
    if constexpr (Forget::kSaved) saved[4] = slope;
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&saved)[kSaved], const V (&prev)[4], const V (&next)[4],
                                  V (&dstate)[4], V (&dgx)[4], V (&dgh)[4]) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], one = splat<V>(1.0);
    const V scale = Lanes<V>::quotient(one, next[2]), ratio = next[1] * scale;
    const V dratio = dstate[0] * o * scale;
    const V dc = dstate[1] + dratio, dn = dstate[2] - dratio * ratio;
    V dlog_i = (dc * g + dn) * i, dcarried = (dc * prev[1] + dn * prev[2]) * f;
    // m is the larger one, whose exponential is 1. To h it is a common factor of c and n: where
    // only h is looked at, this sum is zero but for rounding.
    const V dm = dstate[3] - dlog_i - dcarried;
    const V of_i = i == one ? dm : V{};
    dlog_i += of_i;
    dcarried += dm - of_i;
    dgx[0] = dlog_i;
    if constexpr (Forget::kSaved)
      dgx[1] = dcarried * saved[4];
    else
      dgx[1] = dcarried;
    dgx[2] = dc * i * (one - g * g);
    dgx[3] = dstate[0] * ratio * o * (one - o);
    for (int k = 0; k < 4; ++k) dgh[k] = dgx[k];
    dstate[0] = V{};
    dstate[1] = dc * f;
    dstate[2] = dn * f;
    dstate[3] = dcarried;
  }
};

using SlstmCell = SlstmCellOf<SigmoidForget>;
using SlstmExpCell = SlstmCellOf<ExponentialForget>;
static_assert(is_cell<SlstmCell>() && is_cell<SlstmExpCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
