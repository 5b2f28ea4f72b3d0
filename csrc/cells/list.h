// THE list of cells: RNNFAST_CELLS(use) calls use(id, name, Type). The id is the `cell` argument of
// the operators and must never change its meaning; rnnfast/cells.py names the same ids (held
// together by tests/test_core.py).
#pragma once

#include "gru.h"
#include "indrnn.h"
#include "lstm.h"
#include "min_lstm.h"
#include "qrnn.h"
#include "rnn.h"

// clang-format off
#define RNNFAST_CELLS(use)                     \
  use(0, lstm, LstmCell)                       \
  use(1, gru, GruCell)                         \
  use(2, rnn_tanh, RnnTanhCell)                \
  use(3, rnn_relu, RnnReluCell)                \
  use(4, indrnn_tanh, IndRnnTanhCell)          \
  use(5, indrnn_relu, IndRnnReluCell)          \
  use(6, min_gru, MinGruPositiveCell)          \
  use(7, min_gru_linear, MinGruLinearCell)     \
  use(8, min_lstm, MinLstmPositiveCell)        \
  use(9, min_lstm_linear, MinLstmLinearCell)   \
  use(10, qrnn_f, QrnnFCell)                   \
  use(11, qrnn_fo, QrnnFoCell)                 \
  use(12, qrnn_ifo, QrnnIfoCell)
// clang-format on
