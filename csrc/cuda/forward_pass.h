// Forward of one direction of one layer: the input projection of a chunk of steps in one product,
// then for each step a product with w_hh and the pointwise kernel, or all of them on chip.
#pragma once

#include "norm.cuh"
#include "onchip_launch.h"
#include "rows.cuh"
#include "schedule.h"
#include "stage.h"
#include "staged_forward.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class scalar_t>
class ForwardPass {
 public:
  using Args = ForwardArgs<scalar_t>;
  using acc_t = accumulator_of<scalar_t>;

  ForwardPass(const Args& args, const CudaChoice& choice, Arena& arena)
      : args_(args),
        schedule_(args, choice.chunk_steps),
        onchip_(args, choice.tile, arena),
        gate_rows_(Cell::kGates * args.hidden_size) {
    const int64_t H = args.hidden_size, B = args.batch;
    gx_ = arena.take<acc_t>(std::min(args.rows, choice.chunk_steps * B) * gate_rows_);
    gh_ = arena.take<acc_t>(!kDense || onchip_ ? 0 : B * gate_rows_);
    if constexpr (kLinkOf<Cell> == Link::kProduct) {
      link_ = arena.take<scalar_t>(B * H);
      linked_ = gh_ + B * kFreeGatesOf<Cell> * H;
    } else if constexpr (kLinkOf<Cell> == Link::kNorm) {
      linked_ = arena.take<acc_t>(B * H);
    }
    m_ = arena.take<scalar_t>(args.w_hr ? B * H : 0);
    h_dropped_ = arena.take<scalar_t>(args.masks.h_kept ? B * args.output_size : 0);
    carry_ = arena.take<acc_t>((Cell::kStates - 1 + (kWideH || onchip_)) * B * H);
  }

  const Schedule& schedule() const { return schedule_; }
  void begin_chunk(Stage& stage, int64_t chunk) {
    if (chunk == 0) onchip_.begin(stage);
    const StepRows rows = schedule_.all(schedule_.first_of(chunk), schedule_.end_of(chunk));
    chunk_row_ = rows.first_row;
    stage.rows_by_rows(rows.rows, gate_rows_, args_.input_size,
                       args_.x.data + rows.first_row * args_.x.row_stride, args_.x.row_stride,
                       args_.w_ih, gx_);
    if constexpr (kNormsGates<Cell>) norm_gates(stage, rows, 0, rows.rows, gx_);
  }

  // The step `order` and those that one launch takes with it, below `end`; their number.
  int64_t step(Stage& stage, int64_t order, int64_t end) {
    if (onchip_) return on_chip(stage, order, end);
    const int64_t count = kDense ? 1 : schedule_.alike(order, end);
    const StepRows rows = schedule_.at(order);
    const int64_t H = args_.hidden_size, P = args_.output_size;
    const scalar_t* before = order > 0 ? args_.y + schedule_.at(order - 1).first_row * P : nullptr;
    const bool product = kDense && multiply(stage, rows, before);
    if constexpr (kNormsHidden<Cell>)
      norm_gates(stage, rows, 1, args_.h0 ? rows.rows : rows.before, gh_);

    ForwardSteps<scalar_t> p{};
    p.options = args_.options;
    p.hidden = H;
    p.rows = rows.rows;
    p.steps = count;
    p.carried = rows.before;
    p.ends_from = schedule_.at(order + count - 1).after;
    p.row_step = count > 1 ? schedule_.at(order + 1).first_row - rows.first_row : 0;
    p.carry_plane = args_.batch * H;
    p.gx = gx_ + (rows.first_row - chunk_row_) * gate_rows_;
    p.gh = gh_;
    p.products = args_.h0 ? rows.rows : rows.before;
    p.u = args_.w_hh;
    p.b_ih = args_.b_ih;
    p.b_hh = args_.b_hh;
    p.h0 = args_.w_hr ? nullptr : args_.h0;
    p.c0 = args_.c0;
    p.h_before = before;
    p.reset = args_.reset ? args_.reset + rows.first_row : nullptr;
    if (args_.masks.zone) p.zone = args_.masks.zone + rows.first_row * Cell::kStates * H;
    for (int k = 0; k < 2; ++k) p.keep[k] = static_cast<acc_t>(args_.masks.keep[k]);
    p.carry = carry_;
    p.y = args_.w_hr ? m_ : args_.y + rows.first_row * P;
    p.h_n = args_.w_hr ? nullptr : args_.h_n;
    p.c_n = args_.c_n;
    p.planes = kPlanes + (args_.w_hr ? 1 : 0);
    p.saved = args_.saved ? args_.saved + rows.first_row * p.planes * H : nullptr;
    p.projected = args_.w_hr != nullptr;
    if constexpr (kLinkOf<Cell> != Link::kNone)
      staged_step(stage, p, product);
    else
      stage.launch("forward_steps", forward_steps<Cell, scalar_t>, p, rows.rows, H, product);
    if (args_.w_hr) project(stage, rows);
    return count;
  }

  void end_chunk(Stage&, int64_t) {}
  void end(Stage&) {}

 private:
  static constexpr bool kDense = Cell::kRecurrence == Recurrence::kDense;
  static constexpr bool kWideH = ForwardUnit<Cell, scalar_t>::kWideH;
  static constexpr bool kHasTiles = has_tiles<Cell, scalar_t>();
  // Kept for backward, but for h before a projection.
  static constexpr int kPlanes = Cell::kSaved + Cell::kStates - 1 + kNormPlanes<Cell>;

  // The k-th of those behind the bias, each of a number a unit.
  const scalar_t* norm_parameter(int k) const {
    return args_.b_hh ? args_.b_hh + (Cell::kGates + k) * args_.hidden_size : nullptr;
  }
  void norm(Stage& stage, const NormRows<scalar_t>& p, int64_t rows) const {
    stage.launch_blocks("norm_rows", norm_rows<scalar_t>, p, rows, kNormThreads,
                        kNormShared<acc_t>);
  }
  // A side of the gates (0: of the input), in place; as it was, it is kept.
  void norm_gates(Stage& stage, const StepRows& rows, int side, int64_t valid, acc_t* gates) const {
    const int64_t H = args_.hidden_size, row = kPlanes * H;
    NormRows<scalar_t> p{};
    p.groups[0] = Cell::kNormGroups.first * H;
    p.groups[1] = Cell::kNormGroups.second * H;
    p.valid = valid;
    p.reset = side && args_.reset ? args_.reset + rows.first_row : nullptr;
    p.from = p.to = gates;
    p.from_row = gate_rows_;
    p.kept_row = row;
    if (args_.saved)
      p.kept = args_.saved + rows.first_row * row +
               (kPlanes - kNormPlanes<Cell> + side * Cell::kGates) * H;
    p.gain = norm_parameter(side * Cell::kGates);
    norm(stage, p, rows.rows);
  }

  // The halves of a cell with stages, and what stands between.
  void staged_step(Stage& stage, const ForwardSteps<scalar_t>& steps, bool after_product) {
    const int64_t H = args_.hidden_size, free = kFreeGatesOf<Cell> * H;
    const StagedForward<scalar_t> p{steps, gh_, link_, linked_};
    stage.launch("begin_forward", begin_forward<Cell, scalar_t>, p, steps.rows, H, after_product);
    if constexpr (kLinkOf<Cell> == Link::kProduct)
      stage.rows_by_rows(steps.rows, kLinkedGatesOf<Cell> * H, H, link_, H, args_.w_hh + free * H,
                         p.linked);
    else
      norm(stage,
           {{H, 0},
            steps.rows,
            nullptr,
            linked_,
            H,
            linked_,
            nullptr,
            0,
            norm_parameter(kNormPlanes<Cell>),
            norm_parameter(kNormPlanes<Cell> + 1)},
           steps.rows);
    stage.launch("finish_forward", finish_forward<Cell, scalar_t>, p, steps.rows, H, true);
  }

  // All steps [begin, end) in one launch.
  int64_t on_chip(Stage& stage, int64_t begin, int64_t end) {
    if constexpr (kHasTiles) {
      OnchipForward<scalar_t> p{};
      p.steps = onchip_.steps(schedule_, args_.batch, begin, end - begin, true);
      p.hidden = args_.hidden_size;
      p.carried = schedule_.at(begin).before;
      p.taken = std::max(schedule_.at(begin).rows, schedule_.at(end - 1).rows);
      p.goes_on = schedule_.at(end - 1).after;
      p.gx = gx_;
      p.gx_row = chunk_row_;
      p.w_hh = args_.w_hh;
      p.b_ih = args_.b_ih;
      p.b_hh = args_.b_hh;
      p.h0 = args_.h0;
      p.c0 = args_.c0;
      p.reset = args_.reset;
      p.carry = carry_;
      p.y = args_.y;
      p.h_n = args_.h_n;
      p.c_n = args_.c_n;
      p.saved = args_.saved;
      with_onchip_kernel<Cell, scalar_t, false>(
          onchip_.tile(), [&](auto kernel) { onchip_.launch(stage, "onchip_forward", kernel, p); });
    }
    return end - begin;
  }

  // gh = h w_hh^T of the rows that have an h: from y of the step before, and from h0.
  bool multiply(Stage& stage, const StepRows& rows, const scalar_t* before) {
    const int64_t P = args_.output_size;
    if (args_.masks.h_kept) {
      const int64_t count = args_.h0 ? rows.rows : rows.before;
      const DropRows<scalar_t> p{count,
                                 P,
                                 rows.before,
                                 before,
                                 args_.h0,
                                 args_.masks.h_kept,
                                 static_cast<acc_t>(args_.masks.h_scale),
                                 h_dropped_};
      stage.launch("drop_rows", drop_rows<scalar_t>, p, count, P);
      stage.rows_by_rows(count, gate_rows_, P, h_dropped_, P, args_.w_hh, gh_);
      return count > 0;
    }
    const int64_t columns = kFreeGatesOf<Cell> * args_.hidden_size;
    stage.rows_by_rows(rows.before, columns, P, before, P, args_.w_hh, gh_);
    if (!args_.h0) return rows.before > 0;
    stage.rows_by_rows(rows.rows - rows.before, columns, P, args_.h0 + rows.before * P, P,
                       args_.w_hh, gh_ + rows.before * columns);
    return true;
  }

  void project(Stage& stage, const StepRows& rows) {
    const int64_t P = args_.output_size;
    scalar_t* y = args_.y + rows.first_row * P;
    stage.rows_by_rows(rows.rows, P, args_.hidden_size, m_, args_.hidden_size, args_.w_hr, y);
    stage.copy(args_.h_n + rows.after * P, y + rows.after * P,
               (rows.rows - rows.after) * P * static_cast<int64_t>(sizeof(scalar_t)));
  }

  Args args_;
  Schedule schedule_;
  OnchipRun onchip_;
  int64_t gate_rows_, chunk_row_ = 0;
  acc_t *gx_, *gh_, *carry_, *linked_ = nullptr;
  scalar_t *m_, *h_dropped_, *link_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
