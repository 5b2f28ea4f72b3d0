// What the bindings hand to the LSTM with recurrent batch normalisation (cpu/batch_norm.h), beside
// what every layer has: h0, c0 and y are given, b_hh and w_hr never, and steps go upwards.
//
// Statistics of a step are 9*H numbers: of the products with w_ih (i f g o), of those with w_hh
// (i f g o), and of c.
#pragma once

#include "args.h"

namespace rnnfast {

// Numbers of each unit: in statistics, and planes of what forward keeps (the gates, both products,
// c).
constexpr int kBatchNormStatistics = 9, kBatchNormPlanes = 13;

template <class scalar_t>
struct BatchNorm {
  const scalar_t *gain_ih, *gain_hh;  // (4*H)
  const scalar_t *gain_c, *bias_c;    // (H)
  bool training;                      // statistics of the batch, where a step has more than one row
  double eps;
};

template <class scalar_t>
struct BatchNormArgs : ForwardArgs<scalar_t> {
  BatchNorm<scalar_t> norm;
  // (max_steps, 9*H); later steps share the last. Read where the batch's are not.
  const scalar_t *running_mean, *running_var;
  int64_t max_steps;
  scalar_t *mean, *var;  // (T, 9*H) those that were used; null: nobody asks
};

template <class scalar_t>
struct BatchNormBackwardArgs : BackwardArgs<scalar_t> {
  BatchNorm<scalar_t> norm;
  const scalar_t *mean, *var;  // as forward used them
  scalar_t *dgain_ih, *dgain_hh, *dbias, *dgain_c, *dbias_c;
};

}  // namespace rnnfast
