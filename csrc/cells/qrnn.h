// The pooling of a quasi-recurrent network (Bradbury et al. 2017, arXiv:1611.01576); the gates are
// convolutions over time, which reach the cell as gx.
//   z = tanh(gx_z);  f, o, i = sigmoid(gx)
//   f-pooling    h' = f*h + (1 - f)*z
//   fo-pooling   c' = f*c + (1 - f)*z;  h' = o*c'
//   ifo-pooling  c' = f*c + i*z;        h' = o*c'
#pragma once

#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct QrnnFCell {
  static constexpr int kGates = 2;  // z f
  static constexpr int kStates = 1;
  static constexpr int kSaved = 2;
  static constexpr Recurrence kRecurrence = Recurrence::kNone;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = true;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[2], const V (&gh)[2], V (&state)[1], V (&saved)[2]) {
    const V z = tanh(gx[0] + gh[0]);
    const V f = sigmoid(gx[1] + gh[1]);
    state[0] = z + f * (state[0] - z);
    saved[0] = z;
    saved[1] = f;
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&saved)[2], const V (&prev)[1], const V (&)[1],
                                  V (&dstate)[1], V (&dgx)[2], V (&dgh)[2]) {
    const V one = splat<V>(1.0);
    const V z = saved[0], f = saved[1], dh = dstate[0];
    dgh[0] = dgx[0] = dh * (one - f) * (one - z * z);
    dgh[1] = dgx[1] = dh * (prev[0] - z) * f * (one - f);
    dstate[0] = dh * f;
  }
};

// fo- and, with a gate of its own for the input, ifo-pooling.
template <bool kInputGate>
struct QrnnCell {
  static constexpr int kGates = kInputGate ? 4 : 3;  // z f o i
  static constexpr int kStates = 2;
  static constexpr int kSaved = kGates;
  static constexpr Recurrence kRecurrence = Recurrence::kNone;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = false;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[kGates], const V (&gh)[kGates], V (&state)[2],
                                 V (&saved)[kGates]) {
    const V z = tanh(gx[0] + gh[0]);
    const V f = sigmoid(gx[1] + gh[1]);
    const V o = sigmoid(gx[2] + gh[2]);
    saved[0] = z;
    saved[1] = f;
    saved[2] = o;
    if constexpr (kInputGate) {
      const V i = sigmoid(gx[3] + gh[3]);
      saved[3] = i;
      state[1] = f * state[1] + i * z;
    } else {
      state[1] = z + f * (state[1] - z);
    }
    state[0] = o * state[1];
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&saved)[kGates], const V (&prev)[2], const V (&next)[2],
                                  V (&dstate)[2], V (&dgx)[kGates], V (&dgh)[kGates]) {
    const V one = splat<V>(1.0);
    const V z = saved[0], f = saved[1], o = saved[2];
    const V dh = dstate[0], dc = dstate[1] + dh * o;
    V input, through = prev[1];
    if constexpr (kInputGate) {
      input = saved[3];
      dgx[3] = dc * z * input * (one - input);
    } else {
      input = one - f;
      through = prev[1] - z;
    }
    dgx[0] = dc * input * (one - z * z);
    dgx[1] = dc * through * f * (one - f);
    dgx[2] = dh * next[1] * o * (one - o);
    for (int k = 0; k < kGates; ++k) dgh[k] = dgx[k];
    dstate[0] = V{};
    dstate[1] = dc * f;
  }
};

using QrnnFoCell = QrnnCell<false>;
using QrnnIfoCell = QrnnCell<true>;
static_assert(is_cell<QrnnFCell>() && is_cell<QrnnFoCell>() && is_cell<QrnnIfoCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
