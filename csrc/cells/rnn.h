// The simple recurrent cell (Elman 1990), as torch.nn.RNN: h' = act(gx + gh), act = tanh or relu.
// Both derivatives follow from h' itself, so nothing besides y is kept for backward; of the
// activation of a call it is one plane.
#pragma once

#include "activation.h"
#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

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
    V unused[1];
    state[0] = gx[0] + gh[0];
    Activation::forward(state, unused);
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&)[1], const V (&)[1], const V (&next)[1],
                                  V (&dstate)[1], V (&dgx)[1], V (&dgh)[1]) {
    V value[1], slope[1];
    Activation::backward(next, value, slope);
    dgx[0] = dstate[0] * slope[0];
    dgh[0] = dgx[0];
    dstate[0] = V{};
  }
};

template <Recurrence recurrence>
struct RnnAnyCellOf : ChosenActivations {
  using ChosenActivations::ChosenActivations;
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;
  static constexpr int kSaved = 1;
  static constexpr Recurrence kRecurrence = recurrence;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD void forward(const V (&gx)[1], const V (&gh)[1], V (&state)[1], V (&saved)[1]) const {
    state[0] = gx[0] + gh[0];
    this->state.forward(state, saved);
  }

  template <class V>
  RNNFAST_HD void backward(const V (&saved)[1], const V (&)[1], const V (&)[1], V (&dstate)[1],
                           V (&dgx)[1], V (&dgh)[1]) const {
    V value[1], slope[1];
    this->state.backward(saved, value, slope);
    dgx[0] = dstate[0] * slope[0];
    dgh[0] = dgx[0];
    dstate[0] = V{};
  }
};

using RnnTanhCell = RnnCell<Tanh>;
using RnnReluCell = RnnCell<Relu>;
using RnnAnyCell = RnnAnyCellOf<Recurrence::kDense>;
static_assert(is_cell<RnnTanhCell>() && is_cell<RnnReluCell>() && is_cell<RnnAnyCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
