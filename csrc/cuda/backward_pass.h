// Backward of one direction of one layer: for each step, from the last to the first, the pointwise
// kernel and a product with w_hh; dx a chunk at a time; the weights' gradients in one product each
// after the loop.
#pragma once

#include "norm.cuh"
#include "onchip_launch.h"
#include "rows.cuh"
#include "schedule.h"
#include "stage.h"
#include "staged_backward.cuh"
#include "step_backward.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class scalar_t>
class BackwardPass {
 public:
  using Args = BackwardArgs<scalar_t>;
  using acc_t = accumulator_of<scalar_t>;

  BackwardPass(const Args& args, const CudaChoice& choice, Arena& arena)
      : args_(args),
        schedule_(args, choice.chunk_steps),
        onchip_(args, choice.tile, arena),
        gate_rows_(Cell::kGates * args.hidden_size),
        planes_(Cell::kSaved + Cell::kStates - 1 + kNormPlanes<Cell> + (args.w_hr ? 1 : 0)),
        plain_(!args.reset && !args.h0 && !args.batch_sizes && !args.masks.h_kept),
        keeps_h_(kHasHidden && args.dw_hh && !plain_) {
    const int64_t N = args.rows, H = args.hidden_size, P = args.output_size, B = args.batch;
    dgx_ = args.dgx ? args.dgx : arena.take<scalar_t>(N * gate_rows_);
    if (!Cell::kSplitGates)
      dgh_ = dgx_;
    else
      dgh_ = args.dgh ? args.dgh : arena.take<scalar_t>(N * gate_rows_);
    dp_ = arena.take<scalar_t>(N * kParametersOf<Cell> * H);
    dh_ = arena.take<acc_t>(B * P);
    dc_ = arena.take<acc_t>((Cell::kStates - 1) * B * H);
    dh_entered_ = arena.take<acc_t>(args.masks.h_kept ? B * P : 0);
    h_entered_ = keeps_h_ ? arena.take<scalar_t>(N * P) : nullptr;
    if (args.w_hr) {
      dm_ = args.dm ? args.dm : arena.take<scalar_t>(N * P);
      dh_whole_ = arena.take<acc_t>(B * H);
      if (args.dw_hr) m_ = arena.take<scalar_t>(N * H);
    }
    if constexpr (kLinkOf<Cell> != Link::kNone) dlink_ = arena.take<acc_t>(B * H);
    if (kLinkOf<Cell> == Link::kProduct && args.dw_hh) links_ = arena.take<scalar_t>(N * H);
    if constexpr (kLinkOf<Cell> == Link::kNorm) {
      linked_ = arena.take<acc_t>(B * H);
      for (auto*& of_link : dnorm_link_) of_link = arena.take<scalar_t>(N * H);
    }
    if constexpr (kNormsGates<Cell>) {
      seen_x_ = arena.take<scalar_t>(N * gate_rows_);
      dgain_x_ = arena.take<scalar_t>(N * gate_rows_);
    }
    if constexpr (kNormsHidden<Cell>) {
      seen_h_ = kLinkOf<Cell> == Link::kNone ? arena.take<scalar_t>(N * gate_rows_) : seen_x_;
      dgain_h_ = arena.take<scalar_t>(N * gate_rows_);
    }
    slice_ = std::max<int64_t>(64, (N + kMostSlices - 1) / kMostSlices);
    parts_ = arena.take<acc_t>((N + slice_ - 1) / slice_ *
                               std::max(gate_rows_, kParametersOf<Cell> * H));
  }

  const Schedule& schedule() const { return schedule_; }
  void begin_chunk(Stage& stage, int64_t chunk) {
    if (chunk == 0) onchip_.begin(stage);
  }

  // `index` counts from the last step down. The number of steps taken, below `end`.
  int64_t step(Stage& stage, int64_t index, int64_t end) {
    if (onchip_) return on_chip(stage, index, end);
    const int64_t last = schedule_.steps() - 1;
    int64_t count = 1;
    if (!kDense)
      while (index + count < end &&
             schedule_.at(last - index - count).rows == schedule_.at(last - index).rows)
        ++count;
    const int64_t order = last - index, earliest = order - count + 1;
    const StepRows rows = schedule_.at(order), entry = schedule_.at(earliest);
    const int64_t H = args_.hidden_size, P = args_.output_size;
    const uint8_t* reset = args_.reset ? args_.reset + rows.first_row : nullptr;
    const uint8_t* reset_after =
        args_.reset && order < last ? args_.reset + schedule_.at(order + 1).first_row : nullptr;
    const int64_t row_before = earliest > 0 ? schedule_.at(earliest - 1).first_row : 0;

    if (args_.w_hr) gather(stage, order, rows, reset, reset_after);
    BackwardSteps<scalar_t> p{};
    p.options = args_.options;
    p.hidden = H;
    p.rows = rows.rows;
    p.steps = count;
    p.goes_on = rows.after;
    p.carried = entry.before;
    p.row_step = count > 1 ? schedule_.at(order - 1).first_row - rows.first_row : 0;
    p.carry_plane = args_.batch * H;
    if (args_.w_hr) {
      p.dh_whole = dh_whole_;
    } else {
      p.dy = dy_of(order);
      if (count > 1 && args_.dy.data) p.dy.step_stride = dy_of(order - 1).data - p.dy.data;
      p.dh_n = args_.dh_n;
      p.y = args_.y + rows.first_row * H;
      p.y_before = args_.y + row_before * H;
      p.h0 = args_.h0;
    }
    p.dc_n = args_.dc_n;
    p.reset = reset;
    p.reset_after = reset_after;
    if (args_.masks.zone) p.zone = args_.masks.zone + rows.first_row * Cell::kStates * H;
    for (int k = 0; k < 2; ++k) p.keep[k] = static_cast<acc_t>(args_.masks.keep[k]);
    p.dh = dh_;
    p.dc = dc_;
    p.planes = planes_;
    p.saved = args_.saved + rows.first_row * planes_ * H;
    p.saved_before = args_.saved + row_before * planes_ * H;
    p.c0 = args_.c0;
    p.u = args_.w_hh;
    if (kParametersOf<Cell> > 0 && args_.b_hh) p.parameters = args_.b_hh + gate_rows_;
    p.dp = dp_ + rows.first_row * kParametersOf<Cell> * H;
    p.dgx = (kNormsGates<Cell> ? seen_x_ : dgx_) + rows.first_row * gate_rows_;
    p.dgh = (kNormsHidden<Cell> ? seen_h_ : dgh_) + rows.first_row * gate_rows_;
    p.h_entered = keeps_h_ && !args_.w_hr ? h_entered_ + rows.first_row * P : nullptr;
    if constexpr (kLinkOf<Cell> != Link::kNone)
      staged_step(stage, p, rows, index > 0);
    else
      stage.launch("backward_steps", backward_steps<Cell, scalar_t>, p, rows.rows, H, index > 0);
    if constexpr (kNormsGates<Cell>) {
      const StepRows all = schedule_.all(earliest, order + 1);
      norm_gates(stage, all, 0, seen_x_, dgx_, dgain_x_);
      if constexpr (kNormsHidden<Cell>) norm_gates(stage, all, 1, seen_h_, dgh_, dgain_h_);
    }

    // The way back through w_hh, for the step before and for h0.
    if (kDense && args_.masks.h_kept)
      carry_dropped(stage, rows, entry);
    else if (kDense)
      stage.rows_by_columns(args_.dh0 ? entry.rows : entry.before, P, kFreeGatesOf<Cell> * H,
                            dgh_ + entry.first_row * gate_rows_, gate_rows_, args_.w_hh, dh_,
                            Cell::kReadsH);
    finish(stage, entry);
    return count;
  }

  // dx of a chunk whose steps are done.
  void end_chunk(Stage& stage, int64_t chunk) {
    if (!args_.dx) return;
    const int64_t last = schedule_.steps() - 1;
    const StepRows rows =
        schedule_.all(last - (schedule_.end_of(chunk) - 1), last - schedule_.first_of(chunk) + 1);
    stage.rows_by_columns(rows.rows, args_.input_size, gate_rows_,
                          dgx_ + rows.first_row * gate_rows_, gate_rows_, args_.w_ih,
                          args_.dx + rows.first_row * args_.input_size);
  }

  void end(Stage& stage) {
    const int64_t N = args_.rows, I = args_.input_size, H = args_.hidden_size,
                  P = args_.output_size;
    if (args_.dw_ih)
      stage.columns_by_columns(gate_rows_, I, N, dgx_, gate_rows_, args_.x.data, args_.x.row_stride,
                               args_.dw_ih);
    if (kHasHidden && args_.dw_hh) {
      // Pairs of a step and what entered it: rows of y one step away, or those that were kept.
      const scalar_t *dgh = dgh_, *h = h_entered_;
      int64_t pairs = N;
      if (plain_) {
        pairs = N - args_.batch;
        dgh = dgh_ + (args_.reverse ? 0 : args_.batch * gate_rows_);
        h = args_.y + (args_.reverse ? args_.batch * P : 0);
      }
      if (!kDense)
        sum_columns(stage, pairs, gate_rows_, dgh, h, args_.dw_hh, nullptr);
      else
        stage.columns_by_columns(kFreeGatesOf<Cell> * H, P, pairs, dgh, gate_rows_, h, P,
                                 args_.dw_hh);
      if (links_)
        stage.columns_by_columns(kLinkedGatesOf<Cell> * H, P, N, dgh_ + kFreeGatesOf<Cell> * H,
                                 gate_rows_, links_, P, args_.dw_hh + kFreeGatesOf<Cell> * H * P);
    }
    if (args_.dw_hr) {
      const CopyRows<acc_t, scalar_t> p{N, H,      args_.saved + (planes_ - 1) * H, planes_ * H, m_,
                                        H, nullptr};
      stage.launch("copy_rows", copy_rows<acc_t, scalar_t>, p, N, H);
      stage.columns_by_columns(P, H, N, dm_, P, m_, H, args_.dw_hr);
    }
    if constexpr (kNormsGates<Cell>) {
      sum_norms(stage);
    } else if (Cell::kSplitGates) {
      if (args_.db_ih) sum_columns(stage, N, gate_rows_, dgx_, nullptr, args_.db_ih, nullptr);
      if (args_.db_hh) sum_columns(stage, N, gate_rows_, dgh_, nullptr, args_.db_hh, nullptr);
    } else if (args_.db_ih || args_.db_hh) {
      sum_columns(stage, N, gate_rows_, dgx_, nullptr, args_.db_ih ? args_.db_ih : args_.db_hh,
                  args_.db_ih ? args_.db_hh : nullptr);
    }
    if (kParametersOf<Cell> > 0 && args_.db_hh)
      sum_columns(stage, N, kParametersOf<Cell> * H, dp_, nullptr, args_.db_hh + gate_rows_,
                  nullptr);
  }

 private:
  static constexpr bool kHasHidden = Cell::kRecurrence != Recurrence::kNone;
  static constexpr bool kDense = Cell::kRecurrence == Recurrence::kDense;
  static constexpr int64_t kMostSlices = 512;

  // The k-th of those behind the bias, each of a number a unit.
  const scalar_t* norm_parameter(int k) const {
    return args_.b_hh ? args_.b_hh + (Cell::kGates + k) * args_.hidden_size : nullptr;
  }
  // From the gradients of what the cell saw to those of the products, and to those of gains.
  void norm_gates(Stage& stage, const StepRows& rows, int side, const scalar_t* seen,
                  scalar_t* gates, scalar_t* dgain) const {
    const int64_t H = args_.hidden_size, at = rows.first_row * gate_rows_;
    NormBackwardRows<scalar_t, scalar_t> p{};
    p.groups[0] = Cell::kNormGroups.first * H;
    p.groups[1] = Cell::kNormGroups.second * H;
    p.x_row = planes_ * H;
    p.x = args_.saved + rows.first_row * p.x_row +
          (planes_ - kNormPlanes<Cell> + side * Cell::kGates) * H;
    p.gain = norm_parameter(side * Cell::kGates);
    p.dy = seen + at;
    p.dx = gates + at;
    p.dgain = dgain + at;
    stage.launch_blocks("norm_backward_rows", norm_backward_rows<scalar_t, scalar_t>, p, rows.rows,
                        kNormThreads, kNormShared<acc_t>);
  }
  // The biases, and what stands behind them.
  void sum_norms(Stage& stage) {
    const int64_t N = args_.rows, H = args_.hidden_size;
    if (args_.db_ih) sum_columns(stage, N, gate_rows_, seen_x_, nullptr, args_.db_ih, nullptr);
    scalar_t* to = args_.db_hh;
    if (!to) return;
    const auto sum = [&](const scalar_t* from, int64_t columns) {
      sum_columns(stage, N, columns, from, nullptr, to, nullptr);
      to += columns;
    };
    sum(kNormsHidden<Cell> ? seen_h_ : dgh_, gate_rows_);
    sum(dgain_x_, gate_rows_);
    if constexpr (kNormsHidden<Cell>) sum(dgain_h_, gate_rows_);
    if constexpr (kLinkOf<Cell> == Link::kNorm)
      for (const scalar_t* of_link : dnorm_link_) sum(of_link, H);
  }

  // The halves of a cell with stages, the second one first.
  void staged_step(Stage& stage, const BackwardSteps<scalar_t>& steps, const StepRows& rows,
                   bool after_product) {
    const int64_t H = args_.hidden_size, free = kFreeGatesOf<Cell> * H;
    StagedBackward<scalar_t> p{steps, dlink_, linked_,
                               links_ ? links_ + rows.first_row * H : nullptr};
    // The link is the last state.
    const acc_t* link = steps.saved + (Cell::kSaved + Cell::kStates - 2) * H;
    const scalar_t* gain = norm_parameter(kNormPlanes<Cell>);
    if constexpr (kLinkOf<Cell> == Link::kNorm)
      stage.launch_blocks("norm_rows", norm_rows<scalar_t>,
                          NormRows<scalar_t>{{H, 0},
                                             rows.rows,
                                             nullptr,
                                             link,
                                             planes_ * H,
                                             linked_,
                                             nullptr,
                                             0,
                                             gain,
                                             norm_parameter(kNormPlanes<Cell> + 1)},
                          rows.rows, kNormThreads, kNormShared<acc_t>);
    stage.launch("finish_backward", finish_backward<Cell, scalar_t>, p, rows.rows, H,
                 after_product);
    if constexpr (kLinkOf<Cell> == Link::kProduct)
      stage.rows_by_columns(rows.rows, H, kLinkedGatesOf<Cell> * H, steps.dgx + free, gate_rows_,
                            args_.w_hh + free * H, dlink_);
    else
      stage.launch_blocks("norm_backward_rows", norm_backward_rows<scalar_t, acc_t>,
                          NormBackwardRows<scalar_t, acc_t>{{H, 0},
                                                            link,
                                                            planes_ * H,
                                                            gain,
                                                            dlink_,
                                                            dlink_,
                                                            dnorm_link_[0] + rows.first_row * H,
                                                            dnorm_link_[1] + rows.first_row * H},
                          rows.rows, kNormThreads, kNormShared<acc_t>);
    stage.launch("begin_backward", begin_backward<Cell, scalar_t>, p, rows.rows, H, true);
  }

  // All steps [index, end), counted from the last one down, in one launch.
  int64_t on_chip(Stage& stage, int64_t index, int64_t end) {
    if constexpr (has_tiles<Cell, scalar_t>()) {
      const int64_t order = schedule_.steps() - 1 - index, earliest = schedule_.steps() - end;
      const StepRows rows = schedule_.at(order), entry = schedule_.at(earliest);
      OnchipBackward<scalar_t> p{};
      p.steps = onchip_.steps(schedule_, args_.batch, order, end - index, false);
      p.has_before = earliest > 0;
      p.hidden = args_.hidden_size;
      p.carried = rows.after;
      p.taken = std::max(rows.rows, entry.rows);
      p.goes_on = entry.before;
      p.dy = args_.dy;
      p.dh_n = args_.dh_n;
      p.dc_n = args_.dc_n;
      p.reset = args_.reset;
      p.w_hh = args_.w_hh;
      p.y = args_.y;
      p.h0 = args_.h0;
      p.c0 = args_.c0;
      p.saved = args_.saved;
      p.dh = dh_;
      p.dc = dc_;
      p.dgx = dgx_;
      p.dgh = dgh_;
      p.h_entered = h_entered_;
      p.dh0 = args_.dh0;
      p.dc0 = args_.dc0;
      with_onchip_kernel<Cell, scalar_t, true>(onchip_.tile(), [&](auto kernel) {
        onchip_.launch(stage, "onchip_backward", kernel, p);
      });
    }
    return end - index;
  }

  // dy of a step.
  Rows<const scalar_t> dy_of(int64_t order) const {
    Rows<const scalar_t> dy = args_.dy;
    if (!dy.data) return dy;
    const StepRows rows = schedule_.at(order);
    dy.data += schedule_.packed() ? rows.first_row * dy.row_stride
                                  : rows.first_row / args_.batch * dy.step_stride;
    return dy;
  }

  // All of dL/dy of a step, and from it dL/dh before the projection.
  void gather(Stage& stage, int64_t order, const StepRows& rows, const uint8_t* reset,
              const uint8_t* reset_after) {
    const int64_t P = args_.output_size;
    ProjectedStep<scalar_t> p{};
    p.outputs = P;
    p.rows = rows.rows;
    p.goes_on = rows.after;
    p.carried = rows.before;
    p.dy = dy_of(order);
    p.dh_n = args_.dh_n;
    p.reset = reset;
    p.reset_after = reset_after;
    p.dh = dh_;
    p.y_before = args_.y + (order > 0 ? schedule_.at(order - 1).first_row * P : 0);
    p.h0 = args_.h0;
    p.dm = dm_ + rows.first_row * P;
    p.h_entered = keeps_h_ ? h_entered_ + rows.first_row * P : nullptr;
    stage.launch("gather_projected", gather_projected<scalar_t>, p, rows.rows, P);
    stage.rows_by_columns(rows.rows, args_.hidden_size, P, p.dm, P, args_.w_hr, dh_whole_);
  }

  // The way back through w_hh and the mask of h, and h as it entered, for the weights' gradients.
  void carry_dropped(Stage& stage, const StepRows& rows, const StepRows& entry) {
    const int64_t P = args_.output_size, count = args_.dh0 ? entry.rows : entry.before;
    const uint8_t* kept = args_.masks.h_kept;
    const auto scale = static_cast<acc_t>(args_.masks.h_scale);
    if (keeps_h_) {
      scalar_t* h = h_entered_ + rows.first_row * P;
      const DropRows<scalar_t> p{rows.rows, P, rows.rows, h, nullptr, kept, scale, h};
      stage.launch("drop_rows", drop_rows<scalar_t>, p, rows.rows, P);
    }
    stage.rows_by_columns(count, P, gate_rows_, dgh_ + entry.first_row * gate_rows_, gate_rows_,
                          args_.w_hh, dh_entered_);
    const AddDropped<acc_t> p{count, P, dh_entered_, kept, scale, Cell::kReadsH, dh_};
    stage.launch("add_dropped", add_dropped<acc_t>, p, count, P);
  }

  // Gradients of the initial states, of rows that have no step before.
  void finish(Stage& stage, const StepRows& rows) {
    const int64_t from = rows.before, count = rows.rows - rows.before;
    const uint8_t* reset = args_.reset ? args_.reset + rows.first_row + from : nullptr;
    const auto copy = [&](const acc_t* carry, scalar_t* to, int64_t columns) {
      const CopyRows<acc_t, scalar_t> p{
          count, columns, carry + from * columns, columns, to + from * columns, columns, reset};
      stage.launch("copy_rows", copy_rows<acc_t, scalar_t>, p, count, columns);
    };
    if (args_.dh0) copy(dh_, args_.dh0, args_.output_size);
    const int64_t H = args_.hidden_size, plane = args_.batch * H;
    for (int s = 0; s < Cell::kStates - 1 && args_.dc0; ++s)
      copy(dc_ + s * plane, args_.dc0 + s * plane, H);
  }

  void sum_columns(Stage& stage, int64_t rows, int64_t columns, const scalar_t* a,
                   const scalar_t* b, scalar_t* to, scalar_t* also_to) {
    const SumRows<scalar_t> p{rows, columns, slice_, a, b, parts_, to, also_to};
    stage.launch("sum_slices", sum_slices<scalar_t>, p, (rows + slice_ - 1) / slice_, columns);
    stage.launch("sum_parts", sum_parts<scalar_t>, p, 1, columns);
  }

  Args args_;
  Schedule schedule_;
  OnchipRun onchip_;
  int64_t gate_rows_, planes_, slice_;
  bool plain_, keeps_h_;  // whether h as it entered is y of the step before; whether it is kept
  scalar_t *dgx_, *dgh_, *dp_, *h_entered_, *dm_ = nullptr, *m_ = nullptr, *links_ = nullptr;
  // Of gates that are normalised: the gradients of what the cell saw, and of gains, row by row; of
  // a link gain and bias.
  scalar_t *seen_x_ = nullptr, *seen_h_ = nullptr, *dgain_x_ = nullptr, *dgain_h_ = nullptr;
  scalar_t* dnorm_link_[2] = {};
  acc_t *dh_, *dc_, *dh_entered_, *dh_whole_ = nullptr, *parts_, *dlink_ = nullptr,
                                  *linked_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
