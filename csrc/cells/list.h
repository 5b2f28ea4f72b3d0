// THE list of cells: RNNFAST_CELLS(use) calls use(id, name, Type). The id is the low byte of the
// `cell` argument of the operators (core/cell_code.h) and must never change its meaning;
// rnnfast/cells.py names the same ids (held together by tests/test_core.py).
//
// Each class has less on the CPU than the one before. Of all formats: kernels of every type, and
// the products of bfloat16 in pairs and of int8. Of all types: bfloat16 is converted, and int8
// refused. The rest: kernels of full width only, float32 and float64; calls of 16 bits run in
// float32 (cpu/run_widened.cpp).
#pragma once

#include "coupled_lstm.h"
#include "gru.h"
#include "gru_before.h"
#include "indrnn.h"
#include "lstm.h"
#include "min_lstm.h"
#include "norm.h"
#include "peephole_lstm.h"
#include "qrnn.h"
#include "rnn.h"
#include "slstm.h"
#include "sru.h"
#include "zoneout.h"

// clang-format off
#define RNNFAST_CELLS_OF_ALL_FORMATS(use)      \
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

#define RNNFAST_CELLS_OF_ALL_TYPES(use)        \
  RNNFAST_CELLS_OF_ALL_FORMATS(use)            \
  use(13, lstm_any, LstmAnyCell)               \
  use(14, gru_any, GruAnyCell)                 \
  use(15, rnn_any, RnnAnyCell)                 \
  use(16, indrnn_any, IndRnnAnyCell)

#define RNNFAST_CELLS(use)                     \
  RNNFAST_CELLS_OF_ALL_TYPES(use)              \
  use(17, peephole_lstm, PeepholeLstmCell)     \
  use(18, sru, SruCell)                        \
  use(19, coupled_lstm, CoupledLstmCell)       \
  use(20, gru_before, GruBeforeCell)           \
  use(21, lstm_norm, LstmNormCell)             \
  use(22, gru_norm, GruNormCell)               \
  use(23, rnn_norm, RnnNormCell)               \
  use(24, indrnn_norm, IndRnnNormCell)         \
  use(25, lstm_zoneout, LstmZoneoutCell)       \
  use(26, gru_zoneout, GruZoneoutCell)         \
  use(27, rnn_zoneout, RnnZoneoutCell)         \
  use(28, slstm, SlstmCell)                    \
  use(29, slstm_exp, SlstmExpCell)
// clang-format on
