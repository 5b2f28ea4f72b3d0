// minLSTM (Feng et al. 2024, arXiv:2410.01201), with the gates normalised to a sum of one:
//   f, i = sigmoid(gx);  n = g(gx_n);  h' = f/(f + i)*h + i/(f + i)*n,  g as in min_gru.h
#pragma once

#include "min_gru.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// f/(f + i) is the sigmoid of log f - log i. Without logarithms, and without the quotient of two
// sigmoids that both vanish: (1 + e^-b) / ((1 + e^-a) + (1 + e^-b)) for gates f, i of a, b, all
// numbers divided by the largest of 1, e^-a and e^-b.
template <class V>
struct NormalisedGates {
  V forget, input;                // their sum is one
  V closed_forget, closed_input;  // 1 - f, 1 - i

  RNNFAST_HD NormalisedGates(V a, V b) {
    const auto quotient = [](V n, V d) { return Lanes<V>::quotient(n, d); };
    V most = Lanes<V>::maximum(V{}, -a);
    most = -b > most ? -b : most;
    const V one = exp(-most), of_a = exp(-a - most), of_b = exp(-b - most);
    const V sum_a = one + of_a, sum_b = one + of_b;
    const V sum = sum_a + sum_b;
    forget = quotient(sum_b, sum);
    input = quotient(sum_a, sum);
    closed_forget = quotient(of_a, sum_a);
    closed_input = quotient(of_b, sum_b);
  }
};

template <class Candidate>
struct MinLstmCell {
  static constexpr int kGates = 3;  // f i n
  static constexpr int kStates = 1;
  static constexpr int kSaved = 5;
  static constexpr Recurrence kRecurrence = Recurrence::kNone;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = true;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[3], const V (&gh)[3], V (&state)[1], V (&saved)[5]) {
    const NormalisedGates<V> gates(gx[0] + gh[0], gx[1] + gh[1]);
    const V n = Candidate::value(gx[2] + gh[2]);
    state[0] = gates.forget * state[0] + gates.input * n;
    saved[0] = gates.forget;
    saved[1] = gates.input;
    saved[2] = n;
    saved[3] = gates.closed_forget;
    saved[4] = gates.closed_input;
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&saved)[5], const V (&prev)[1], const V (&)[1],
                                  V (&dstate)[1], V (&dgx)[3], V (&dgh)[3]) {
    const V forget = saved[0], input = saved[1], n = saved[2], dh = dstate[0];
    const V dratio = dh * (prev[0] - n) * forget * input;  // of log f - log i
    dgh[0] = dgx[0] = dratio * saved[3];
    dgh[1] = dgx[1] = -dratio * saved[4];
    dgh[2] = dgx[2] = dh * input * Candidate::slope(n);
    dstate[0] = dh * forget;
  }
};

using MinLstmPositiveCell = MinLstmCell<Positive>;
using MinLstmLinearCell = MinLstmCell<Identity>;
static_assert(is_cell<MinLstmPositiveCell>() && is_cell<MinLstmLinearCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
