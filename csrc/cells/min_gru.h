// minGRU (Feng et al. 2024, arXiv:2410.01201): gates that see the input alone.
//   z = sigmoid(gx_z);  n = g(gx_n);  h' = (1 - z)*h + z*n
// with g(x) = x + 0.5 for x >= 0, else sigmoid(x), of the paper's log-space form; or g(x) = x.
#pragma once

#include "cell.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Positive, continuous with its derivative's value from the left and the right 1 and 0.25.
struct Positive {
  template <class V>
  RNNFAST_HD static V value(V x) {
    return x >= V{} ? x + splat<V>(0.5) : sigmoid(x);  // a NaN takes the second, and stays
  }
  template <class V>
  RNNFAST_HD static V slope(V y) {  // as a function of the value
    return y >= splat<V>(0.5) ? splat<V>(1.0) : y * (splat<V>(1.0) - y);
  }
};

struct Identity {
  template <class V>
  RNNFAST_HD static V value(V x) {
    return x;
  }
  template <class V>
  RNNFAST_HD static V slope(V) {
    return splat<V>(1.0);
  }
};

template <class Candidate>
struct MinGruCell {
  static constexpr int kGates = 2;  // z n
  static constexpr int kStates = 1;
  static constexpr int kSaved = 2;
  static constexpr Recurrence kRecurrence = Recurrence::kNone;
  static constexpr bool kSplitGates = false;
  static constexpr bool kReadsH = true;

  template <class V>
  RNNFAST_HD static void forward(const V (&gx)[2], const V (&gh)[2], V (&state)[1], V (&saved)[2]) {
    const V z = sigmoid(gx[0] + gh[0]);
    const V n = Candidate::value(gx[1] + gh[1]);
    state[0] = state[0] + z * (n - state[0]);
    saved[0] = z;
    saved[1] = n;
  }

  template <class V>
  RNNFAST_HD static void backward(const V (&saved)[2], const V (&prev)[1], const V (&)[1],
                                  V (&dstate)[1], V (&dgx)[2], V (&dgh)[2]) {
    const V one = splat<V>(1.0);
    const V z = saved[0], n = saved[1], dh = dstate[0];
    dgh[0] = dgx[0] = dh * (n - prev[0]) * z * (one - z);
    dgh[1] = dgx[1] = dh * z * Candidate::slope(n);
    dstate[0] = dh * (one - z);
  }
};

using MinGruPositiveCell = MinGruCell<Positive>;
using MinGruLinearCell = MinGruCell<Identity>;
static_assert(is_cell<MinGruPositiveCell>() && is_cell<MinGruLinearCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
