// Zoneout (Krueger et al. 2017, arXiv:1606.01305) of a cell: a part of each state stays as it was.
//   h' = k_h*h + (1 - k_h)*h~;  c' = k_c*c + (1 - k_c)*c~
// h~ and c~ are what the cell makes of h and c. In training k is drawn, 0 or 1 for each entry, in
// inference it is the probability of a 1.
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// The inner cell must not read next[0] in backward: h~ is not kept.
template <class Inner>
struct Zoneout : Inner {
  using Inner::Inner;
  static constexpr int S = Inner::kStates, G = Inner::kGates, K = Inner::kSaved;
  static constexpr int kSaved = K + S - 1;  // the other states before the mix come behind
  static constexpr bool kReadsH = true;
  static constexpr bool kKeeps = true;

  template <class V>
  RNNFAST_HD void forward(const V (&keep)[S], const V (&gx)[G], const V (&gh)[G], V (&state)[S],
                          V (&saved)[kSaved]) const {
    V before[S], kept[at_least_one<K>];
    RNNFAST_UNROLL
    for (int s = 0; s < S; ++s) before[s] = state[s];
    Inner::forward(gx, gh, state, kept);
    RNNFAST_UNROLL
    for (int k = 0; k < K; ++k) saved[k] = kept[k];
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) saved[K + s - 1] = state[s];
    RNNFAST_UNROLL
    for (int s = 0; s < S; ++s)
      state[s] = part(keep[s], before[s]) + part(splat<V>(1.0) - keep[s], state[s]);
  }

  template <class V>
  RNNFAST_HD void backward(const V (&keep)[S], const V (&saved)[kSaved], const V (&prev)[S],
                           const V (&)[S], V (&dstate)[S], V (&dgx)[G], V (&dgh)[G]) const {
    V kept[at_least_one<K>], next[S], stays[S];
    RNNFAST_UNROLL
    for (int k = 0; k < K; ++k) kept[k] = saved[k];
    next[0] = V{};
    RNNFAST_UNROLL
    for (int s = 1; s < S; ++s) next[s] = saved[K + s - 1];
    RNNFAST_UNROLL
    for (int s = 0; s < S; ++s) {
      stays[s] = part(keep[s], dstate[s]);
      dstate[s] = part(splat<V>(1.0) - keep[s], dstate[s]);
    }
    Inner::backward(kept, prev, next, dstate, dgx, dgh);
    RNNFAST_UNROLL
    for (int s = 0; s < S; ++s) dstate[s] += stays[s];
  }

  // The same with nothing that stays.
  template <class V>
  RNNFAST_HD void forward(const V (&gx)[G], const V (&gh)[G], V (&state)[S],
                          V (&saved)[kSaved]) const {
    const V keep[S] = {};
    forward(keep, gx, gh, state, saved);
  }
  template <class V>
  RNNFAST_HD void backward(const V (&saved)[kSaved], const V (&prev)[S], const V (&next)[S],
                           V (&dstate)[S], V (&dgx)[G], V (&dgh)[G]) const {
    const V keep[S] = {};
    backward(keep, saved, prev, next, dstate, dgx, dgh);
  }

 private:
  // Nothing of an infinity is zero: what is dropped leaves no trace.
  template <class V>
  RNNFAST_HD static V part(V k, V x) {
    return k <= V{} ? V{} : k * x;
  }
};

using LstmZoneoutCell = Zoneout<LstmAnyCell>;
using GruZoneoutCell = Zoneout<GruAnyCell>;
using RnnZoneoutCell = Zoneout<RnnAnyCell>;
static_assert(is_cell<LstmZoneoutCell>() && is_cell<GruZoneoutCell>() && is_cell<RnnZoneoutCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
