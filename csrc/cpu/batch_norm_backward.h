// Backward of the LSTM with recurrent batch normalisation. Of the loop only the step is its own: a
// normalised column's gradient needs two sums over the rows first,
//   dv = gain / sqrt(var + eps) * (d - mean(d) - v' * mean(d * v'))    v' = (v - mean) / sqrt(...)
// of which sum(d) and sum(d * v') are also the gradients of bias and gain. Everything around it is
// that of every cell (backward_base.h, gradients.h).
#pragma once

#include "batch_norm.h"
#include "gradients.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// What the loop around the steps asks of a cell.
struct BatchNormLstm {
  static constexpr int kGates = 4, kStates = 2, kSaved = kBatchNormPlanes - 1;
  static constexpr Recurrence kRecurrence = Recurrence::kDense;
  static constexpr bool kSplitGates = true, kReadsH = false;
};

inline Choice batch_norm_choice(int workers) {
  return {workers, Split::kUnits, Kernel::kPacked, Kernel::kPacked};
}

// What each worker has besides: 4 vectors of each row, and a cache line between it and the next.
template <class scalar_t>
int64_t batch_norm_own_size(const BatchNormBackwardArgs<scalar_t>& args) {
  return args.batch * 4 * lanes_of<scalar_t> + 64;
}

template <class scalar_t>
class BatchNormBackward : public BackwardPass<BatchNormLstm, scalar_t> {
  using Base = BackwardPass<BatchNormLstm, scalar_t>;
  using Base::s_, Base::worker_, Base::units_, Base::kLanes;
  using V = vector_of<scalar_t>;

 public:
  BatchNormBackward(const BatchNormBackwardArgs<scalar_t>& args,
                    const BackwardScratch<scalar_t>& scratch, scalar_t* own, const Worker& worker)
      : Base(args, batch_norm_choice(worker.count), scratch, worker),
        args_(args),
        norm_(args.norm),
        own_(own),
        columns_(columns_of(units_, this->mine_.panels)) {}

  void start() {
    const int64_t H = args_.hidden_size;
    for (int64_t u = columns_.begin; u < columns_.end; ++u) {
      for (int g = 0; g < 4; ++g)
        args_.dgain_ih[g * H + u] = args_.dgain_hh[g * H + u] = args_.dbias[g * H + u] = 0;
      args_.dgain_c[u] = args_.dbias_c[u] = 0;
    }
    Base::start();
  }

  // As BackwardPass has it.
  void step(int64_t t, int64_t base, bool carry) {
    const int64_t rows = active(args_, t), row = first_row(args_, t) - base;  // of the chunk
    for (int64_t u = columns_.begin; u < columns_.end; u += kLanes) cell(t, u, row);
    barrier(worker_);
    if (carry) this->carry_back(row, rows);
  }

 private:
  using S = Statistics<scalar_t>;
  static constexpr int64_t kOwnRow = 4 * kLanes;
  enum Kept { kI, kF, kG, kO, kGx, kGh = 8, kState = 12 };  // planes

  RNNFAST_HD static void add(scalar_t* to, V value, int64_t left) {
    store_part(to, load_part(to, left) + value, left);
  }

  // The units from `unit` on, one vector, of all rows of step t; `row`: the chunk's row where the
  // step begins.
  void cell(int64_t t, int64_t unit, int64_t row) {
    const int64_t H = args_.hidden_size, rows = active(args_, t), base = first_row(args_, t);
    const int64_t left = columns_.end - unit;
    S s;
    const int64_t at = t * kBatchNormStatistics * H + unit;
    s.load(args_.mean + at, args_.var + at, H, left);
    V inverse[kBatchNormStatistics];
    for (int k = 0; k < kBatchNormStatistics; ++k) inverse[k] = s.inverse(k, norm_.eps);
    // zero where the statistics were no function of the rows
    const V each = splat<V>(of_batch(args_, norm_, t) ? 1.0 / static_cast<double>(rows) : 0.0);

    // h = o * tanh(z), z = gain_c * c' + bias_c
    const V gain_c = load_part(norm_.gain_c + unit, left),
            bias_c = load_part(norm_.bias_c + unit, left);
    V sum_z{}, sum_zc{};
    for (int64_t r = 0; r < rows; ++r) {
      const scalar_t* kept = this->saved_plane(base + r, 0) + unit;
      scalar_t* carried = s_.dh + r * H + unit;
      V dh = load_part(carried, left);
      if (args_.dy.data) dh += load_part(dy_row(t, r) + unit, left);
      store_part(carried, V{}, left);  // carry_back adds
      const V c = (load_part(kept + kState * H, left) - s.mean[S::kC]) * inverse[S::kC];
      const V o = load_part(kept + kO * H, left), squashed = tanh(gain_c * c + bias_c);
      const V dz = dh * o * (splat<V>(1.0) - squashed * squashed);
      scalar_t* own = own_ + r * kOwnRow;
      store(own, dz);
      store(own + kLanes, c);
      store(own + 3 * kLanes, dh * squashed * o * (splat<V>(1.0) - o));
      sum_z += dz;
      sum_zc += dz * c;
    }
    add(args_.dbias_c + unit, sum_z, left);
    add(args_.dgain_c + unit, sum_zc, left);

    const V c_scale = gain_c * inverse[S::kC], one = splat<V>(1.0);
    const V mean_z = sum_z * each, mean_zc = sum_zc * each;
    V sum[4] = {}, sum_x[4] = {}, sum_h[4] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const scalar_t* kept = this->saved_plane(base + r, 0) + unit;
      const scalar_t* before = this->state_before(1, t, r);
      scalar_t *own = own_ + r * kOwnRow, *carried = s_.dc + r * H + unit;
      const V dc =
          load_part(carried, left) + c_scale * (load(own) - mean_z - load(own + kLanes) * mean_zc);
      const V i = load_part(kept + kI * H, left), f = load_part(kept + kF * H, left),
              g = load_part(kept + kG * H, left);
      const V d[4] = {dc * g * i * (one - i), dc * load_part(before + unit, left) * f * (one - f),
                      dc * i * (one - g * g), load(own + 3 * kLanes)};
      store_part(carried, dc * f, left);
      RNNFAST_UNROLL
      for (int k = 0; k < 4; ++k) {
        store(own + k * kLanes, d[k]);
        sum[k] += d[k];
        sum_x[k] += d[k] * normal(kept, kGx, S::kInput, k, s, inverse, left);
        sum_h[k] += d[k] * normal(kept, kGh, S::kHidden, k, s, inverse, left);
      }
    }
    V x_scale[4], h_scale[4];
    for (int k = 0; k < 4; ++k) {
      add(args_.dbias + k * H + unit, sum[k], left);
      add(args_.dgain_ih + k * H + unit, sum_x[k], left);
      add(args_.dgain_hh + k * H + unit, sum_h[k], left);
      x_scale[k] = load_part(norm_.gain_ih + k * H + unit, left) * inverse[S::kInput + k];
      h_scale[k] = load_part(norm_.gain_hh + k * H + unit, left) * inverse[S::kHidden + k];
      sum[k] *= each;
      sum_x[k] *= each;
      sum_h[k] *= each;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const scalar_t *kept = this->saved_plane(base + r, 0) + unit, *own = own_ + r * kOwnRow;
      const int64_t to = (row + r) * s_.gate_row + unit;
      RNNFAST_UNROLL
      for (int k = 0; k < 4; ++k) {
        const V apart = load(own + k * kLanes) - sum[k];
        const V x = normal(kept, kGx, S::kInput, k, s, inverse, left),
                h = normal(kept, kGh, S::kHidden, k, s, inverse, left);
        store_part(s_.dgx + to + k * H, x_scale[k] * (apart - x * sum_x[k]), left);
        store_part(s_.dgh + to + k * H, h_scale[k] * (apart - h * sum_h[k]), left);
      }
    }
  }

  RNNFAST_HD const scalar_t* dy_row(int64_t t, int64_t b) const {
    return step_of(args_, args_.dy, t) + b * args_.dy.row_stride;
  }
  // Gate k of a product, normalised.
  RNNFAST_HD V normal(const scalar_t* kept, int plane, int of, int k, const S& s, const V* inverse,
                      int64_t left) const {
    return (load_part(kept + (plane + k) * args_.hidden_size, left) - s.mean[of + k]) *
           inverse[of + k];
  }

  const BatchNormBackwardArgs<scalar_t>& args_;
  const BatchNorm<scalar_t>& norm_;
  scalar_t* const own_;  // (B, 4 vectors), this worker's
  const Range columns_;
};

// The whole backward of one worker.
template <class scalar_t>
void run_batch_norm_backward(const BatchNormBackwardArgs<scalar_t>& args, char* memory,
                             const Worker& worker) {
  Arena arena{memory, 0};
  const auto scratch =
      backward_scratch(shape_of<BatchNormLstm>(), args, batch_norm_choice(worker.count), arena);
  const int64_t own = batch_norm_own_size(args);
  scalar_t* const all = arena.take<scalar_t>(own * worker.count);
  BatchNormBackward<scalar_t> loop(args, scratch, all + own * worker.index, worker);
  run_loop<BatchNormLstm, scalar_t>(args, scratch, worker, loop);
}

template <class scalar_t>
int64_t batch_norm_backward_bytes(const BatchNormBackwardArgs<scalar_t>& args, int workers) {
  Arena arena;
  backward_scratch(shape_of<BatchNormLstm>(), args, batch_norm_choice(workers), arena);
  arena.take<scalar_t>(batch_norm_own_size(args) * workers);
  return arena.used;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
