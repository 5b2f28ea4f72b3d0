// A step of the LSTM with recurrent batch normalisation between two products, forward and backward
// (core/batch_norm_args.h; the formulas: cpu/batch_norm.h, cpu/batch_norm_backward.h). A block owns
// some units and all rows of the step: sums over the rows stay within it.
#pragma once

#include <math.h>

#include "../core/batch_norm_args.h"
#include "../core/math.h"
#include "block_sums.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Few units, so that there are blocks for the whole device; of float32 as many as memory gives at a
// time. A multiprocessor seldom gets more than one block: registers may be many.
constexpr int kTileUnits = 8, kTileRows = kThreads / kTileUnits;
template <class scalar_t>
constexpr int kTileBlocks = sizeof(scalar_t) > 4 ? 1 : 2;

// Where the means and variances of both products and of c begin, and planes of what forward keeps.
enum : int { kOfInput = 0, kOfHidden = 4, kOfC = 8 };
enum : int { kKeptGates = 0, kKeptInput = 4, kKeptHidden = 8, kKeptC = 12 };

// What a thread has of the step: one unit, and each kTileRows-th row.
struct TileThread {
  int64_t unit, first, end;
  bool leads;  // writes what the unit has once
  __device__ TileThread(int64_t hidden, int64_t rows) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kTileUnits + threadIdx.x % kTileUnits;
    first = threadIdx.x / kTileUnits;
    leads = first == 0 && at < hidden;
    // Beyond the last unit a thread has no rows, but meets the others at barriers.
    end = at < hidden ? rows : 0;
    unit = at < hidden ? at : hidden - 1;
  }
  template <class Use>
  RNNFAST_DEVICE void for_rows(const Use& use) const {
    for (int64_t row = first; row < end; row += kTileRows) use(row);
  }
};

// Over all rows of the step, for each unit.
template <int n, class scalar_t>
RNNFAST_DEVICE void tile_sums(scalar_t (&values)[n]) {
  block_sums<kThreads, kTileUnits>(values);
}

constexpr int kBackwardSums = 12;
template <class scalar_t>
constexpr int kForwardShared = kBlockSumsShared<kThreads, kOfC, scalar_t>;
template <class scalar_t>
constexpr int kBackwardShared = kBlockSumsShared<kThreads, kBackwardSums, scalar_t>;

template <class scalar_t>
RNNFAST_DEVICE scalar_t inverse_of(scalar_t var, double eps) {
  return scalar_t(1) / sqrt(var + static_cast<scalar_t>(eps));
}

// Mean and biased variance of n columns; read(row, k) gives the k-th.
template <int n, class scalar_t, class Read>
RNNFAST_DEVICE void tile_moments(const TileThread& mine, int64_t rows, const Read& read,
                                 scalar_t* mean, scalar_t* var) {
  const scalar_t each = scalar_t(1) / static_cast<scalar_t>(rows);
  scalar_t sum[n] = {};
  mine.for_rows([&](int64_t row) {
    RNNFAST_UNROLL
    for (int k = 0; k < n; ++k) sum[k] += read(row, k);
  });
  tile_sums(sum);
  RNNFAST_UNROLL
  for (int k = 0; k < n; ++k) {
    mean[k] = sum[k] * each;
    sum[k] = scalar_t(0);
  }
  mine.for_rows([&](int64_t row) {
    RNNFAST_UNROLL
    for (int k = 0; k < n; ++k) {
      const scalar_t apart = read(row, k) - mean[k];
      sum[k] += apart * apart;
    }
  });
  tile_sums(sum);
  RNNFAST_UNROLL
  for (int k = 0; k < n; ++k) var[k] = sum[k] * each;
}

// Pointers are those of the step.
template <class scalar_t>
struct BatchNormForwardStep {
  BatchNorm<scalar_t> norm;
  int64_t hidden, rows;
  int64_t ends_from;                           // rows [ends_from, rows) have no step after this one
  bool of_batch;                               // normalised by what its own rows give
  const scalar_t *gx, *gh;                     // (rows, 4*H) products
  const scalar_t* bias;                        // (4*H), or null
  const scalar_t *running_mean, *running_var;  // (9*H)
  scalar_t* c;                                 // (B, H), in place
  scalar_t *y, *h_n;                           // (rows, H); o stands in y for a while
  scalar_t* saved;                             // (rows, 13, H), or null
  scalar_t *mean, *var;                        // (9*H) those that were used, or null
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, kTileBlocks<scalar_t>)
    batch_norm_forward(const BatchNormForwardStep<scalar_t> p) {
  const int64_t H = p.hidden;
  const TileThread mine(H, p.rows);
  const int64_t unit = mine.unit;
  wait_for_launch_before();

  // The statistics of both products.
  scalar_t mean[kBatchNormStatistics], var[kBatchNormStatistics];
  if (p.of_batch) {
    const auto product = [&](int64_t row, int k) {
      const scalar_t* const from = k < kOfHidden ? p.gx : p.gh;
      return from[(row * 4 + k % 4) * H + unit];
    };
    tile_moments<kOfC>(mine, p.rows, product, mean, var);
  } else {
    RNNFAST_UNROLL
    for (int k = 0; k < kBatchNormStatistics; ++k) {
      mean[k] = p.running_mean[k * H + unit];
      var[k] = p.running_var[k * H + unit];
    }
  }
  if (p.mean && mine.leads) {
    RNNFAST_UNROLL
    for (int k = 0; k < kOfC; ++k) {
      p.mean[k * H + unit] = mean[k];
      p.var[k * H + unit] = var[k];
    }
  }

  // Gates and c.
  scalar_t scale[kOfC], start[4];
  RNNFAST_UNROLL
  for (int g = 0; g < 4; ++g) {
    const int64_t at = g * H + unit;
    scale[g] = p.norm.gain_ih[at] * inverse_of(var[g], p.norm.eps);
    scale[kOfHidden + g] = p.norm.gain_hh[at] * inverse_of(var[kOfHidden + g], p.norm.eps);
    start[g] = p.bias ? p.bias[at] : scalar_t(0);
  }
  mine.for_rows([&](int64_t row) {
    scalar_t a[4];
    scalar_t* const kept = p.saved ? p.saved + row * kBatchNormPlanes * H + unit : nullptr;
    RNNFAST_UNROLL
    for (int g = 0; g < 4; ++g) {
      const int64_t at = (row * 4 + g) * H + unit;
      const scalar_t x = p.gx[at], h = p.gh[at];
      // differences first: means may be far larger than what rows differ by
      a[g] =
          scale[g] * (x - mean[g]) + (scale[kOfHidden + g] * (h - mean[kOfHidden + g]) + start[g]);
      if (kept) {
        kept[(kKeptInput + g) * H] = x;
        kept[(kKeptHidden + g) * H] = h;
      }
    }
    const scalar_t gates[4] = {sigmoid(a[0]), sigmoid(a[1]), tanh(a[2]), sigmoid(a[3])};
    const int64_t at = row * H + unit;
    const scalar_t c = gates[1] * p.c[at] + gates[0] * gates[2];
    p.c[at] = c;
    p.y[at] = gates[3];
    if (kept) {
      RNNFAST_UNROLL
      for (int g = 0; g < 4; ++g) kept[(kKeptGates + g) * H] = gates[g];
      kept[kKeptC * H] = c;
    }
  });

  // The statistics of c, of rows that this thread wrote itself.
  if (p.of_batch)
    tile_moments<1>(
        mine, p.rows, [&](int64_t row, int) { return p.c[row * H + unit]; }, mean + kOfC,
        var + kOfC);
  if (p.mean && mine.leads) {
    p.mean[kOfC * H + unit] = mean[kOfC];
    p.var[kOfC * H + unit] = var[kOfC];
  }

  // Outputs.
  const scalar_t c_scale = p.norm.gain_c[unit] * inverse_of(var[kOfC], p.norm.eps),
                 c_start = p.norm.bias_c[unit];
  mine.for_rows([&](int64_t row) {
    const int64_t at = row * H + unit;
    const scalar_t h = p.y[at] * tanh(c_scale * (p.c[at] - mean[kOfC]) + c_start);
    p.y[at] = h;
    if (row >= p.ends_from) p.h_n[at] = h;
  });
}

template <class scalar_t>
struct BatchNormBackwardStep {
  BatchNorm<scalar_t> norm;
  int64_t hidden, rows;
  int64_t goes_on;  // rows [0, goes_on) have a step after this one
  bool of_batch;
  const scalar_t* dy;           // (rows, H), or null
  const scalar_t *dh_n, *dc_n;  // (B, H), or null
  const scalar_t* saved;        // (rows, 13, H)
  const scalar_t *mean, *var;   // (9*H)
  const scalar_t* c_before;     // of the step before, or c0
  int64_t c_before_row;         // between its rows
  const scalar_t* h_before;     // (rows, H)
  scalar_t *dh, *dc;            // (B, H) of the step after, then: room, and of this one
  scalar_t *dgx, *dgh;          // (rows, 4*H)
  scalar_t* h_entered;          // (rows, H), for the gradient of w_hh
  scalar_t *dgain_ih, *dgain_hh, *dbias, *dgain_c, *dbias_c;  // sums of all steps
};

template <class scalar_t>
__global__ void __launch_bounds__(kThreads, kTileBlocks<scalar_t>)
    batch_norm_backward(const BatchNormBackwardStep<scalar_t> p) {
  const int64_t H = p.hidden;
  const TileThread mine(H, p.rows);
  const int64_t unit = mine.unit;
  const scalar_t one(1);
  // zero where the statistics were no function of the rows
  const scalar_t each = p.of_batch ? one / static_cast<scalar_t>(p.rows) : scalar_t(0);
  const auto kept = [&](int64_t row, int plane) {
    return p.saved[(row * kBatchNormPlanes + plane) * H + unit];
  };
  wait_for_launch_before();

  // Back through h = o * tanh(z), z = gain_c * c' + bias_c with c' the normalised c.
  const scalar_t c_mean = p.mean[kOfC * H + unit],
                 c_inverse = inverse_of(p.var[kOfC * H + unit], p.norm.eps),
                 gain_c = p.norm.gain_c[unit], bias_c = p.norm.bias_c[unit];
  const auto normal_c = [&](int64_t row) { return (kept(row, kKeptC) - c_mean) * c_inverse; };
  scalar_t of_c[2] = {};  // dz, dz * c'
  mine.for_rows([&](int64_t row) {
    const int64_t at = row * H + unit;
    scalar_t dh = row < p.goes_on ? p.dh[at] : p.dh_n ? p.dh_n[at] : scalar_t(0);
    if (p.dy) dh += p.dy[at];
    const scalar_t c = normal_c(row), o = kept(row, kKeptGates + 3);
    const scalar_t squashed = tanh(gain_c * c + bias_c);
    const scalar_t dz = dh * o * (one - squashed * squashed);
    p.dh[at] = dz;
    p.dgx[(row * 4 + 3) * H + unit] = dh * squashed * o * (one - o);
    of_c[0] += dz;
    of_c[1] += dz * c;
  });
  tile_sums(of_c);
  if (mine.leads) {
    p.dbias_c[unit] += of_c[0];
    p.dgain_c[unit] += of_c[1];
  }

  // To the gates before their functions, and the sums that their statistics ask for.
  scalar_t mean[kOfC], inverse[kOfC];
  RNNFAST_UNROLL
  for (int k = 0; k < kOfC; ++k) {
    mean[k] = p.mean[k * H + unit];
    inverse[k] = inverse_of(p.var[k * H + unit], p.norm.eps);
  }
  const auto normal = [&](int64_t row, int k) {
    return (kept(row, kKeptInput + k) - mean[k]) * inverse[k];
  };
  const scalar_t c_scale = gain_c * c_inverse;
  of_c[0] *= each;
  of_c[1] *= each;
  scalar_t sum[kBackwardSums] = {};  // of d, d * x', d * h'
  mine.for_rows([&](int64_t row) {
    const int64_t at = row * H + unit;
    scalar_t dc = row < p.goes_on ? p.dc[at] : p.dc_n ? p.dc_n[at] : scalar_t(0);
    dc += c_scale * (p.dh[at] - of_c[0] - normal_c(row) * of_c[1]);
    const scalar_t i = kept(row, kKeptGates), f = kept(row, kKeptGates + 1),
                   g = kept(row, kKeptGates + 2);
    p.dc[at] = dc * f;
    scalar_t* const dgx = p.dgx + row * 4 * H + unit;
    const scalar_t before = p.c_before[row * p.c_before_row + unit];
    const scalar_t d[4] = {dc * g * i * (one - i), dc * before * f * (one - f),
                           dc * i * (one - g * g), dgx[3 * H]};
    RNNFAST_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k < 3) dgx[k * H] = d[k];
      sum[k] += d[k];
      sum[4 + k] += d[k] * normal(row, k);
      sum[8 + k] += d[k] * normal(row, kOfHidden + k);
    }
  });
  tile_sums(sum);
  if (mine.leads) {
    RNNFAST_UNROLL
    for (int k = 0; k < 4; ++k) {
      p.dbias[k * H + unit] += sum[k];
      p.dgain_ih[k * H + unit] += sum[4 + k];
      p.dgain_hh[k * H + unit] += sum[8 + k];
    }
  }

  // Through the statistics of both products.
  scalar_t scale[kOfC];
  RNNFAST_UNROLL
  for (int k = 0; k < 4; ++k) {
    scale[k] = p.norm.gain_ih[k * H + unit] * inverse[k];
    scale[kOfHidden + k] = p.norm.gain_hh[k * H + unit] * inverse[kOfHidden + k];
  }
  RNNFAST_UNROLL
  for (int k = 0; k < kBackwardSums; ++k) sum[k] *= each;
  mine.for_rows([&](int64_t row) {
    RNNFAST_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int64_t at = (row * 4 + k) * H + unit;
      const scalar_t apart = p.dgx[at] - sum[k];
      p.dgx[at] = scale[k] * (apart - normal(row, k) * sum[4 + k]);
      p.dgh[at] = scale[kOfHidden + k] * (apart - normal(row, kOfHidden + k) * sum[8 + k]);
    }
    p.h_entered[row * H + unit] = p.h_before[row * H + unit];
  });
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
