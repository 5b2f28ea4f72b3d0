// The simple recurrent cell (Elman 1990), as torch.nn.RNN: h' = act(gx + gh), act = tanh or relu.
// Both derivatives follow from h' itself, so nothing besides y is kept for backward.
#pragma once

#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct Tanh {
  template <class V>
  RNNFAST_HD static V value(V x) {
    return tanh(x);
  }
  template <class V>
  RNNFAST_HD static V slope(V y) {  // as a function of the value
    return splat<V>(1.0) - y * y;
  }
};

struct Relu {
  template <class V>
  RNNFAST_HD static V value(V x) {
    return relu(x);
  }
  template <class V>
  RNNFAST_HD static V slope(V y) {
    return y <= V{} ? V{} : splat<V>(1.0);  // NaN passes, as in torch
  }
};

template <class Activation, Recurrence recurrence = Recurrence::kDense>
struct RnnCell {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 0;
  static constexpr Recurrence kRecurrence = recurrence;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[1], const V (&gh)[1], V (&state)[1], V (&)[1]) {
    state[0] = Activation::value(gx[0] + gh[0]);
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&)[1], const V (&)[1], const V (&next)[1],
                                  V (&dstate)[1], V (&dgx)[1], V (&dgh)[1]) {
    dgx[0] = dstate[0] * Activation::slope(next[0]);
    dgh[0] = dgx[0];
    dstate[0] = V{};
  }
};

using RnnTanhCell = RnnCell<Tanh>;
using RnnReluCell = RnnCell<Relu>;
static_assert(is_cell<RnnTanhCell>() && is_cell<RnnReluCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
