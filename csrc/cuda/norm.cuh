// Layer normalisation of the groups of a row (cells/stages.h), forward and backward: a block a row,
// sums in an order of their own, so that bits depend on nothing but the row.
#pragma once

#include <math.h>

#include "../cells/stages.h"
#include "block_sums.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

constexpr int kNormThreads = 128;

template <class acc_t>
constexpr int kNormShared = kBlockSumsShared<kNormThreads, 1, acc_t>;

template <class acc_t>
RNNFAST_DEVICE acc_t block_sum(acc_t value) {
  acc_t values[1] = {value};
  block_sums<kNormThreads, 1>(values);
  return values[0];
}

// The columns of a thread.
template <class Use>
RNNFAST_DEVICE void for_columns(int64_t begin, int64_t count, const Use& use) {
  for (int64_t column = begin + threadIdx.x; column < begin + count; column += kNormThreads)
    use(column);
}

template <class acc_t>
struct NormMoments {
  acc_t mean, scale;
  // x(column)
  template <class Read>
  RNNFAST_DEVICE NormMoments(int64_t begin, int64_t count, const Read& x) {
    const acc_t over = acc_t(1) / static_cast<acc_t>(count);
    acc_t sum{};
    for_columns(begin, count, [&](int64_t column) { sum += x(column); });
    mean = block_sum(sum) * over;
    sum = acc_t{};
    for_columns(begin, count, [&](int64_t column) {
      const acc_t far = x(column) - mean;
      sum += far * far;
    });
    scale = acc_t(1) / sqrt(block_sum(sum) * over + acc_t(kNormEps));
  }
};

template <class scalar_t>
struct NormRows {
  using acc_t = accumulator_of<scalar_t>;
  int64_t groups[2];     // columns of each
  int64_t valid;         // rows from there on, and those of `reset`, are zeros
  const uint8_t* reset;  // or null
  const acc_t* from;
  int64_t from_row;  // between rows
  acc_t* to;         // (rows, columns); may be `from`
  acc_t* kept;       // as it was; or null
  int64_t kept_row;
  const scalar_t *gain, *bias;  // null: 1, 0
};

template <class scalar_t>
__global__ void __launch_bounds__(kNormThreads) norm_rows(const NormRows<scalar_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  const int64_t row = blockIdx.x, columns = p.groups[0] + p.groups[1];
  wait_for_launch_before();
  const bool zero = row >= p.valid || (p.reset && p.reset[row]);
  const acc_t* const from = p.from + row * p.from_row;
  const auto x = [&](int64_t column) { return zero ? acc_t{} : from[column]; };
  RNNFAST_UNROLL
  for (int group = 0; group < 2; ++group) {
    const int64_t begin = group ? p.groups[0] : 0, count = group ? p.groups[1] : p.groups[0];
    if (count == 0) continue;
    const NormMoments<acc_t> m(begin, count, x);
    for_columns(begin, count, [&](int64_t column) {
      const acc_t value = x(column);
      acc_t y = (value - m.mean) * m.scale;
      if (p.gain) y *= widen(p.gain[column]);
      if (p.bias) y += widen(p.bias[column]);
      if (p.kept) p.kept[row * p.kept_row + column] = value;
      p.to[row * columns + column] = y;
    });
  }
}

// value_t: of the gradients.
template <class scalar_t, class value_t>
struct NormBackwardRows {
  using acc_t = accumulator_of<scalar_t>;
  int64_t groups[2];
  const acc_t* x;  // as it was
  int64_t x_row;
  const scalar_t* gain;     // null: 1
  const value_t* dy;        // (rows, columns)
  value_t* dx;              // may be dy
  scalar_t *dgain, *dbias;  // (rows, columns): of each row; the second may be null
};

template <class scalar_t, class value_t>
__global__ void __launch_bounds__(kNormThreads)
    norm_backward_rows(const NormBackwardRows<scalar_t, value_t> p) {
  using acc_t = accumulator_of<scalar_t>;
  const int64_t row = blockIdx.x, columns = p.groups[0] + p.groups[1];
  wait_for_launch_before();
  const acc_t* const from = p.x + row * p.x_row;
  RNNFAST_UNROLL
  for (int group = 0; group < 2; ++group) {
    const int64_t begin = group ? p.groups[0] : 0, count = group ? p.groups[1] : p.groups[0];
    if (count == 0) continue;
    const NormMoments<acc_t> m(begin, count, [&](int64_t column) { return from[column]; });
    const auto xhat = [&](int64_t column) { return (from[column] - m.mean) * m.scale; };
    const auto dxhat = [&](int64_t column) {
      const acc_t dy = widen(p.dy[row * columns + column]);
      return p.gain ? dy * widen(p.gain[column]) : dy;
    };
    acc_t sum{}, sum_x{};
    for_columns(begin, count, [&](int64_t column) {
      const acc_t dy = widen(p.dy[row * columns + column]);
      narrow(dy * xhat(column), p.dgain[row * columns + column]);
      if (p.dbias) narrow(dy, p.dbias[row * columns + column]);
      sum += dxhat(column);
      sum_x += dxhat(column) * xhat(column);
    });
    const acc_t over = acc_t(1) / static_cast<acc_t>(count);
    const acc_t mean = block_sum(sum) * over, mean_x = block_sum(sum_x) * over;
    for_columns(begin, count, [&](int64_t column) {
      narrow(m.scale * (dxhat(column) - mean - xhat(column) * mean_x),
             p.dx[row * columns + column]);
    });
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
