// What the bindings hand to a scan, h_t = a_t * h_{t-1} + b_t by elements: pointers, strides,
// sizes. Steps T, rows B, columns H; features have a unit stride, results no gaps.
#pragma once

#include "args.h"

namespace rnnfast {

template <class scalar_t_>
struct ScanArgs {
  using scalar_t = scalar_t_;
  int64_t seq_len, rows, columns;
  bool reverse;
  Rows<const scalar_t> a, b;
  const scalar_t* h0;  // (B, H); null: zeros
  scalar_t* h;         // (T, B, H)
};

template <class scalar_t_>
struct ScanBackwardArgs {
  using scalar_t = scalar_t_;
  int64_t seq_len, rows, columns;
  bool reverse;
  Rows<const scalar_t> a, dh;
  const scalar_t* h0;
  const scalar_t* h;        // as forward left it; read for da only
  scalar_t *da, *db, *dh0;  // (T, B, H), (T, B, H), (B, H); null: not asked for
};

// Long sequences of few columns are cut into chunks of steps, which workers take at the same time.
// How they are cut depends on sizes alone, so that no bit depends on the number of threads.
struct ScanChunks {
  int64_t count;  // of a block; 1: not cut, and a block is everything
  int64_t steps;  // of a block
};

}  // namespace rnnfast
