// The LSTM with recurrent batch normalisation as passes that run_passes.h takes: products as
// forward_pass.h and backward_pass.h have them, and one kernel a step (batch_norm.cuh).
#pragma once

#include "batch_norm.cuh"
#include "schedule.h"
#include "stage.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Of one row there is no variance.
template <class scalar_t>
bool of_batch(const BatchNorm<scalar_t>& norm, const StepRows& rows) {
  return norm.training && rows.rows > 1;
}

inline int64_t tiles_of(int64_t hidden) { return (hidden + kTileUnits - 1) / kTileUnits; }

template <class scalar_t>
class BatchNormForwardPass {
 public:
  using Args = BatchNormArgs<scalar_t>;

  BatchNormForwardPass(const Args& args, const CudaChoice& choice, Arena& arena)
      : args_(args),
        schedule_(args, choice.chunk_steps),
        gx_(arena.take<scalar_t>(std::min(args.rows, choice.chunk_steps * args.batch) * 4 *
                                 args.hidden_size)),
        gh_(arena.take<scalar_t>(args.batch * 4 * args.hidden_size)) {}

  const Schedule& schedule() const { return schedule_; }
  void begin_chunk(Stage& stage, int64_t chunk) {
    const int64_t I = args_.input_size;
    if (chunk == 0)
      stage.copy(args_.c_n, args_.c0,
                 args_.batch * args_.hidden_size * static_cast<int64_t>(sizeof(scalar_t)));
    const StepRows rows = schedule_.all(schedule_.first_of(chunk), schedule_.end_of(chunk));
    chunk_row_ = rows.first_row;
    stage.rows_by_rows(rows.rows, 4 * args_.hidden_size, I, args_.x.data + rows.first_row * I, I,
                       args_.w_ih, gx_);
  }

  int64_t step(Stage& stage, int64_t t, int64_t) {
    const int64_t H = args_.hidden_size, numbers = kBatchNormStatistics * H;
    const StepRows rows = schedule_.at(t);
    const scalar_t* h = t > 0 ? args_.y + schedule_.at(t - 1).first_row * H : args_.h0;
    stage.rows_by_rows(rows.rows, 4 * H, H, h, H, args_.w_hh, gh_);

    BatchNormForwardStep<scalar_t> p{};
    p.norm = args_.norm;
    p.hidden = H;
    p.rows = rows.rows;
    p.ends_from = rows.after;
    p.of_batch = of_batch(args_.norm, rows);
    p.gx = gx_ + (rows.first_row - chunk_row_) * 4 * H;
    p.gh = gh_;
    p.bias = args_.b_ih;
    p.running_mean = args_.running_mean + std::min(t, args_.max_steps - 1) * numbers;
    p.running_var = args_.running_var + std::min(t, args_.max_steps - 1) * numbers;
    p.c = args_.c_n;
    p.y = args_.y + rows.first_row * H;
    p.h_n = args_.h_n;
    p.saved = args_.saved ? args_.saved + rows.first_row * kBatchNormPlanes * H : nullptr;
    p.mean = args_.mean ? args_.mean + t * numbers : nullptr;
    p.var = args_.var ? args_.var + t * numbers : nullptr;
    stage.launch_blocks("batch_norm_forward", batch_norm_forward<scalar_t>, p, tiles_of(H),
                        kThreads, kForwardShared<scalar_t>);
    return 1;
  }

  void end_chunk(Stage&, int64_t) {}
  void end(Stage&) {}

 private:
  Args args_;
  Schedule schedule_;
  scalar_t *gx_, *gh_;
  int64_t chunk_row_ = 0;
};

template <class scalar_t>
class BatchNormBackwardPass {
 public:
  using Args = BatchNormBackwardArgs<scalar_t>;

  BatchNormBackwardPass(const Args& args, const CudaChoice& choice, Arena& arena)
      : args_(args),
        schedule_(args, choice.chunk_steps),
        dgx_(arena.take<scalar_t>(args.rows * 4 * args.hidden_size)),
        dgh_(arena.take<scalar_t>(args.rows * 4 * args.hidden_size)),
        h_entered_(arena.take<scalar_t>(args.rows * args.hidden_size)) {}

  const Schedule& schedule() const { return schedule_; }
  void begin_chunk(Stage& stage, int64_t chunk) {
    if (chunk > 0) return;
    const int64_t bytes = args_.hidden_size * static_cast<int64_t>(sizeof(scalar_t));
    stage.zero(args_.dgain_ih, 4 * bytes);
    stage.zero(args_.dgain_hh, 4 * bytes);
    stage.zero(args_.dbias, 4 * bytes);
    stage.zero(args_.dgain_c, bytes);
    stage.zero(args_.dbias_c, bytes);
  }

  // `index` counts from the last step down.
  int64_t step(Stage& stage, int64_t index, int64_t) {
    const int64_t t = schedule_.steps() - 1 - index, H = args_.hidden_size,
                  numbers = kBatchNormStatistics * H;
    const StepRows rows = schedule_.at(t);
    const int64_t row_before = t > 0 ? schedule_.at(t - 1).first_row : 0;

    BatchNormBackwardStep<scalar_t> p{};
    p.norm = args_.norm;
    p.hidden = H;
    p.rows = rows.rows;
    p.goes_on = rows.after;
    p.of_batch = of_batch(args_.norm, rows);
    p.dy = args_.dy.data ? args_.dy.data + rows.first_row * H : nullptr;
    p.dh_n = args_.dh_n;
    p.dc_n = args_.dc_n;
    p.saved = args_.saved + rows.first_row * kBatchNormPlanes * H;
    p.mean = args_.mean + t * numbers;
    p.var = args_.var + t * numbers;
    p.c_before = t > 0 ? args_.saved + (row_before * kBatchNormPlanes + kKeptC) * H : args_.c0;
    p.c_before_row = t > 0 ? kBatchNormPlanes * H : H;
    p.h_before = t > 0 ? args_.y + row_before * H : args_.h0;
    // All rows have a first step, whose gradients are those of the initial states.
    p.dh = args_.dh0;
    p.dc = args_.dc0;
    p.dgx = dgx_ + rows.first_row * 4 * H;
    p.dgh = dgh_ + rows.first_row * 4 * H;
    p.h_entered = h_entered_ + rows.first_row * H;
    p.dgain_ih = args_.dgain_ih;
    p.dgain_hh = args_.dgain_hh;
    p.dbias = args_.dbias;
    p.dgain_c = args_.dgain_c;
    p.dbias_c = args_.dbias_c;
    stage.launch_blocks("batch_norm_backward", batch_norm_backward<scalar_t>, p, tiles_of(H),
                        kThreads, kBackwardShared<scalar_t>);
    stage.rows_by_columns(rows.rows, H, 4 * H, p.dgh, 4 * H, args_.w_hh, args_.dh0);
    return 1;
  }

  // dx of a chunk whose steps are done.
  void end_chunk(Stage& stage, int64_t chunk) {
    if (!args_.dx) return;
    const int64_t last = schedule_.steps() - 1, columns = 4 * args_.hidden_size;
    const StepRows rows =
        schedule_.all(last - (schedule_.end_of(chunk) - 1), last - schedule_.first_of(chunk) + 1);
    stage.rows_by_columns(rows.rows, args_.input_size, columns, dgx_ + rows.first_row * columns,
                          columns, args_.w_ih, args_.dx + rows.first_row * args_.input_size);
  }

  void end(Stage& stage) {
    const int64_t N = args_.rows, I = args_.input_size, H = args_.hidden_size;
    stage.columns_by_columns(4 * H, I, N, dgx_, 4 * H, args_.x.data, I, args_.dw_ih);
    stage.columns_by_columns(4 * H, H, N, dgh_, 4 * H, h_entered_, H, args_.dw_hh);
  }

 private:
  Args args_;
  Schedule schedule_;
  scalar_t *dgx_, *dgh_, *h_entered_;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
