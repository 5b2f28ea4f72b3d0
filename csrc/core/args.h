// What the bindings hand to an engine: raw pointers,
// strides in elements, and sizes. No torch, no ownership.
//
// One call is one direction of one layer. Sizes: seq_len T, batch B, input_size I, hidden_size H,
// output_size P (the projection's size, else H). Rows: step t has active(t) rows, and row b of step
// t is row first_row(t) + b of every tensor of N rows; without batch_sizes that is t*B + b.
#pragma once

#include <cstdint>

#include "cell_code.h"
#include "numbers.h"

namespace rnnfast {

// A product of panels whose lanes hold groups of small numbers: cpu/dot.h.
struct DotOperands;
using DotProduct = void (*)(int64_t rows, int vectors, const DotOperands&);

// How far a layer is that another one follows: cpu/team.h.
struct StepsDone;

// A tensor of rows that may be a view: (T, B, features) by two strides, or packed rows (N,
// features) by one.
template <class scalar_t>
struct Rows {
  scalar_t* data = nullptr;
  int64_t step_stride = 0;  // between steps; unused when packed
  int64_t row_stride = 0;   // between rows of a step
};

// What a call drew, or what it expects of drawing.
struct Masks {
  const uint8_t* zone = nullptr;    // (N, S, H) not 0: this state stays as it was; null: none
  double keep[2] = {0, 0};          // what part of h, and of the other states, stays elsewhere
  const uint8_t* h_kept = nullptr;  // (B, P) not 0: h enters the product with w_hh; null: all of it
  double h_scale = 1;               // the factor of what enters, with h_kept
};

template <class scalar_t>
struct LayerArgs {
  int64_t seq_len, batch, input_size, hidden_size, output_size;
  int64_t rows;  // N
  CellOptions options;
  const int64_t* batch_sizes;  // (T) rows of each step, never growing with t; null: always B
  const int64_t* offsets;      // (T + 1) first row of each step; null with batch_sizes
  bool reverse;
  const uint8_t* reset;  // (N) not 0: zeros enter this row's step, not the step before; null: none
  Masks masks;
  Rows<const scalar_t> x;
  const scalar_t *h0, *c0;  // (B, P), (S-1, B, H); null: zeros
  // PyTorch's layouts; biases and w_hr may be null.
  const scalar_t *w_ih, *w_hh, *b_ih, *b_hh, *w_hr;
  // Of the layer whose results this one reads while they are made, and its own; null: neither.
  const StepsDone* leader;
  StepsDone* done;
};

template <class scalar_t>
struct ForwardArgs : LayerArgs<scalar_t> {
  const char* packed;  // panels from pack(), or null: then the weights above are not read
  // For weights in groups, or null; the same whatever the number of threads.
  DotProduct dot_ih, dot_hh;
  scalar_t* y;          // (N, P); null: only the last step is asked for
  scalar_t *h_n, *c_n;  // (B, P), (S-1, B, H)
  // (N, planes, H) or null: K gate planes, S-1 states, then (with w_hr) h before the projection.
  accumulator_of<scalar_t>* saved;
};

template <class scalar_t>
struct BackwardArgs : LayerArgs<scalar_t> {
  Rows<const scalar_t> dy;      // data may be null: no gradient came
  const scalar_t *dh_n, *dc_n;  // null likewise
  const scalar_t* y;            // as forward left them
  const accumulator_of<scalar_t>* saved;
  scalar_t *dx, *dh0, *dc0;  // (N, I), (B, P), (S-1, B, H); null: not asked for
  scalar_t *dw_ih, *dw_hh, *db_ih, *db_hh, *dw_hr;  // weights' shapes; null: not asked for
  // Gradients of the pre-activations, (N, G*H), where the cell keeps one buffer the first only; and
  // with w_hr all that arrives at y, (N, P); null: not asked for.
  scalar_t *dgx, *dgh, *dm;
};

}  // namespace rnnfast
