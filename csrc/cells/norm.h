// Cells with layer normalisation (Ba et al. 2016, arXiv:1607.06450): both sides of the gates are
// normalised over the units, each by itself, where the recurrence is a product; the LSTM's c on its
// way into h, too. The engine normalises (cells/stages.h), and the maths of the gates is that of
// the cells without.
#pragma once

#include "activation.h"
#include "gru.h"
#include "indrnn.h"
#include "rnn.h"
#include "stages.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// The paper's equations 20 to 22.
//   i, f, o = gate(LN(W x) + LN(U h) + b);  g = act(likewise);  c' = f*c + i*g;  h' = o*act(LN(c'))
struct LstmNormCell : ChosenActivations {
  using ChosenActivations::ChosenActivations;
  static constexpr int kGates = 4;  // i f g o
  static constexpr int kStates = 2;
  static constexpr int kSaved = 4;
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = true;
  static constexpr bool kReadsH = false;
  static constexpr NormGroups kNormGroups{4};
  static constexpr Link kLink = Link::kNorm;

  template <class V>
  RNNFAST_HD void begin(const V (&gx)[4], V (&gh)[4], V (&state)[2], V& link) const {
    V gates[3] = {gx[0] + gh[0], gx[1] + gh[1], gx[3] + gh[3]}, kept_gates[3];
    V g[1] = {gx[2] + gh[2]}, kept_g[1];
    this->gate.forward(gates, kept_gates);
    this->state.forward(g, kept_g);
    link = state[1] = gates[1] * state[1] + gates[0] * g[0];
    gh[0] = kept_gates[0];
    gh[1] = kept_gates[1];
    gh[2] = kept_g[0];
    gh[3] = kept_gates[2];
  }

  template <class V>
  RNNFAST_HD void finish(const V (&)[4], const V (&gh)[4], V link, V (&state)[2],
                         V (&saved)[4]) const {
    const V kept_o[1] = {gh[3]};
    V o[1], unused[1], c[1] = {link};
    this->gate.backward(kept_o, o, unused);
    this->state.forward(c, unused);
    state[0] = o[0] * c[0];
    for (int k = 0; k < 4; ++k) saved[k] = gh[k];
  }

  template <class V>
  RNNFAST_HD void finish_backward(const V (&saved)[4], V link, const V (&)[2], const V (&)[2],
                                  V (&dstate)[2], V (&dgates)[4], V& dlink) const {
    const V kept_o[1] = {saved[3]}, at_c[1] = {link};
    V o[1], o_slope[1], c[1], c_slope[1];
    this->gate.backward(kept_o, o, o_slope);
    this->state.slope_at(at_c, c, c_slope);
    const V dh = dstate[0];
    dgates[3] = dh * c[0] * o_slope[0];
    dlink = dh * o[0] * c_slope[0];
    dstate[0] = V{};
  }

  template <class V>
  RNNFAST_HD void begin_backward(const V (&saved)[4], const V (&prev)[2], const V (&)[2], V dlink,
                                 V (&dstate)[2], V (&dgates)[4], V&) const {
    const V kept_gates[2] = {saved[0], saved[1]}, kept_g[1] = {saved[2]};
    V gates[2], gate_slopes[2], g[1], g_slope[1];
    this->gate.backward(kept_gates, gates, gate_slopes);
    this->state.backward(kept_g, g, g_slope);
    const V i = gates[0], f = gates[1], dc = dstate[1] + dlink;
    dgates[0] = dc * g[0] * gate_slopes[0];
    dgates[1] = dc * prev[1] * gate_slopes[1];
    dgates[2] = dc * i * g_slope[0];
    dstate[1] = dc * f;
  }
};

// The paper's equations 24 to 26, where r multiplies the normalised product.
struct GruNormCell : GruAnyCell {
  using GruAnyCell::GruAnyCell;
  static constexpr NormGroups kNormGroups{2, 1};  // r and z, n
};
struct RnnNormCell : RnnAnyCell {
  using RnnAnyCell::RnnAnyCell;
  static constexpr bool kSplitGates = true;
  static constexpr NormGroups kNormGroups{1};
};
// u * h is no product: its units do not see each other.
struct IndRnnNormCell : IndRnnAnyCell {
  using IndRnnAnyCell::IndRnnAnyCell;
  static constexpr bool kSplitGates = true;
  static constexpr NormGroups kNormGroups{1};
};
static_assert(is_staged_cell<LstmNormCell>() && is_staged_cell<GruNormCell>() &&
              is_staged_cell<RnnNormCell>() && is_staged_cell<IndRnnNormCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
