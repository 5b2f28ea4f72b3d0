// IndRNN (Li et al. 2018, arXiv:1803.04831): the simple cell with a diagonal recurrence,
// gh = u*h + b_hh.
#pragma once

#include "rnn.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

using IndRnnTanhCell = RnnCell<Tanh, Recurrence::kDiagonal>;
using IndRnnReluCell = RnnCell<Relu, Recurrence::kDiagonal>;
using IndRnnAnyCell = RnnAnyCellOf<Recurrence::kDiagonal>;
static_assert(is_cell<IndRnnTanhCell>() && is_cell<IndRnnReluCell>() && is_cell<IndRnnAnyCell>());

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
