// Statistics over the rows of a step, as both passes of the LSTM with recurrent batch normalisation
// read them (Cooijmans et al. 2017, arXiv:1603.09025):
//   a = BN(w_ih x; gain_ih) + BN(w_hh h; gain_hh) + b;  i, f, o = sigmoid(a);  g = tanh(a)
//   c' = f*c + i*g;  h' = o * tanh(BN(c'; gain_c) + bias_c)
//   BN(v; gain) = gain * (v - mean) / sqrt(var + eps), variances biased
// Workers own units: a column's sum is one worker's, over the rows in order, so that no bit depends
// on their number.
#pragma once

#include "../core/batch_norm_args.h"
#include "share.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class V>
RNNFAST_HD V square_root(V x) {
  scalar_of<V> lanes[sizeof(V) / sizeof(scalar_of<V>)];
  __builtin_memcpy(lanes, &x, sizeof(x));
  for (auto& lane : lanes) lane = sizeof(lane) == 4 ? __builtin_sqrtf(lane) : __builtin_sqrt(lane);
  __builtin_memcpy(&x, lanes, sizeof(x));
  return x;
}

// Mean and biased variance over `rows` rows of n vectors side by side.
template <int n, class scalar_t>
RNNFAST_HD void moments(int64_t rows, const scalar_t* from, int64_t row, vector_of<scalar_t>* mean,
                        vector_of<scalar_t>* var) {
  using V = vector_of<scalar_t>;
  constexpr int64_t kLanes = lanes_of<scalar_t>;
  const V each = splat<V>(1.0 / static_cast<double>(rows));
  V sum[n] = {}, squares[n] = {};
  for (int64_t r = 0; r < rows; ++r) {
    RNNFAST_UNROLL
    for (int k = 0; k < n; ++k) sum[k] += load(from + r * row + k * kLanes);
  }
  RNNFAST_UNROLL
  for (int k = 0; k < n; ++k) sum[k] *= each;
  for (int64_t r = 0; r < rows; ++r) {
    RNNFAST_UNROLL
    for (int k = 0; k < n; ++k) {
      const V apart = load(from + r * row + k * kLanes) - sum[k];
      squares[k] += apart * apart;
    }
  }
  RNNFAST_UNROLL
  for (int k = 0; k < n; ++k) {
    mean[k] = sum[k];
    var[k] = squares[k] * each;
  }
}

// One vector of units' statistics of a step: products with w_ih, with w_hh, and c.
template <class scalar_t>
struct Statistics {
  using V = vector_of<scalar_t>;
  static constexpr int kInput = 0, kHidden = 4, kC = 8;
  V mean[kBatchNormStatistics], var[kBatchNormStatistics];

  RNNFAST_HD void load(const scalar_t* means, const scalar_t* vars, int64_t hidden_size,
                       int64_t left) {
    for (int k = 0; k < kBatchNormStatistics; ++k) {
      mean[k] = load_part(means + k * hidden_size, left);
      var[k] = load_part(vars + k * hidden_size, left);
    }
  }
  RNNFAST_HD void store(scalar_t* means, scalar_t* vars, int64_t hidden_size, int64_t left) const {
    for (int k = 0; k < kBatchNormStatistics; ++k) {
      store_part(means + k * hidden_size, mean[k], left);
      store_part(vars + k * hidden_size, var[k], left);
    }
  }
  // 1 / sqrt(var + eps)
  RNNFAST_HD V inverse(int k, double eps) const {
    return splat<V>(1.0) / square_root(var[k] + splat<V>(eps));
  }
};

// Whether a step is normalised by what its own rows give. One row has no variance.
template <class scalar_t>
RNNFAST_HD bool of_batch(const LayerArgs<scalar_t>& args, const BatchNorm<scalar_t>& norm,
                         int64_t t) {
  return norm.training && active(args, t) > 1;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
