// Gradients of the weights and of x, from the gate gradients of one chunk of steps:
//   dw_ih += dgx^T . x    dw_hh += dgh^T . h_prev    dw_hr += dh^T . m
//   db = sums of dgx and dgh    dx = dgx . w_ih
// Right sides are packed in panels that all workers share (left ones: weight_product.h). Workers
// own rows of the result, and every sum runs over the chunk's rows in order: the bits do not depend
// on their number.
#pragma once

#include "staged_backward.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
class GradientPass {
 public:
  GradientPass(const CellShape& shape, const BackwardArgs<scalar_t>& args,
               const BackwardScratch<scalar_t>& scratch, const BackwardBase<scalar_t>& loop,
               const Worker& worker)
      : shape_(shape),
        args_(args),
        s_(scratch),
        loop_(loop),
        worker_(worker),
        inputs_{args.input_size, 1},
        outputs_{args.output_size, 1},
        units_{args.hidden_size, 1} {}

  void start() {
    const Range mine = part_of(inputs_.count(), worker_.index, worker_.count);
    const int64_t gates = shape_.gates * args_.hidden_size;
    if (s_.w_ih)
      for (int64_t p = mine.begin; p < mine.end; ++p)
        pack_rows(
            inputs_, p, gates, [&](int64_t k) { return args_.w_ih + k * args_.input_size; },
            s_.w_ih);
  }

  // dx of the steps of `chunk`, whose gate gradients are complete.
  void inputs(Range chunk) {
    const int64_t base = first_row(args_, chunk.begin);
    if (args_.dx) input_gradient(base, part_of(rows_of(chunk), worker_.index, worker_.count));
  }

  // Hands out the gate gradients of the steps of `chunk`.
  void gates(Range chunk) {
    const Range mine = part_of(rows_of(chunk), worker_.index, worker_.count);
    const int64_t base = first_row(args_, chunk.begin), gates = shape_.gates * args_.hidden_size;
    const auto copy = [&](const scalar_t* from, int64_t from_row, scalar_t* to, int64_t columns) {
      if (!to) return;
      for (int64_t k = mine.begin; k < mine.end; ++k)
        for (int64_t m = 0; m < columns; ++m) to[(base + k) * columns + m] = from[k * from_row + m];
    };
    copy(s_.dgx, s_.gate_row, args_.dgx, gates);
    copy(s_.dgh, s_.gate_row, args_.dgh, gates);
    copy(s_.dh_steps, args_.output_size, args_.dm, args_.output_size);
  }

  // Adds the weights' gradients of the steps of `chunk` (`first`: nothing has been added yet).
  // Callers put barriers around it.
  void add(Range chunk, bool first) {
    const int64_t rows = rows_of(chunk);
    share_right_sides(chunk, rows);
    barrier(worker_);
    const Range gates = part_of(shape_.gates * args_.hidden_size, worker_.index, worker_.count);
    const Right<scalar_t> x{inputs_, s_.x_packed, args_.dw_ih},
        h{outputs_, s_.h_packed, args_.dw_hh}, m{units_, s_.m_packed, args_.dw_hr};
    scalar_t* tiles = s_.a_tiles + worker_.index * s_.a_tiles_size;
    const auto add_product = [&](Range range, const scalar_t* left, int64_t left_row,
                                 const auto&... rights) {
      weight_product(
          range, rows, first, [&](int64_t k) { return left + k * left_row; }, {rights...}, tiles);
    };
    if (shape_.recurrence == Recurrence::kDiagonal) {
      add_product(gates, s_.dgx, s_.gate_row, x);
      if (args_.dw_hh) diagonal_gradient(gates, chunk, rows, first);
    } else if (shape_.recurrence == Recurrence::kNone) {
      add_product(gates, s_.dgx, s_.gate_row, x);
    } else if (shape_.linked_gates > 0) {
      // Gates that h is multiplied with, then those of the link: both sums have the same left side.
      const int64_t I = args_.input_size, P = args_.output_size,
                    linked = shape_.free_gates * args_.hidden_size;
      const auto below = [&](scalar_t* out, int64_t columns) {
        return out ? out + linked * columns : nullptr;
      };
      const Right<scalar_t> x_linked{inputs_, s_.x_packed, below(args_.dw_ih, I)},
          link{outputs_, s_.link_packed, below(args_.dw_hh, P)};
      add_product(part_of(linked, worker_.index, worker_.count), s_.dgx, s_.gate_row, x, h);
      add_product(part_of(shape_.linked_gates * args_.hidden_size, worker_.index, worker_.count),
                  s_.dgx + linked, s_.gate_row, x_linked, link);
    } else if (shape_.split_gates) {
      add_product(gates, s_.dgx, s_.gate_row, x);
      add_product(gates, s_.dgh, s_.gate_row, h);
    } else {
      add_product(gates, s_.dgx, s_.gate_row, x, h);
    }
    add_product(part_of(args_.output_size, worker_.index, worker_.count), s_.dh_steps,
                args_.output_size, m);
    if (shape_.norms_gates) return sum_biases(first);
    if (args_.db_ih) sum_rows(gates, rows, first, s_.dgx, s_.gate_row, args_.db_ih);
    if (args_.db_hh && (shape_.split_gates || !args_.db_ih)) {
      sum_rows(gates, rows, first, s_.dgh, s_.gate_row, args_.db_hh);
    } else if (args_.db_hh) {
      // the same sums
      for (int64_t m = gates.begin; m < gates.end; ++m) args_.db_hh[m] = args_.db_ih[m];
    }
    if (shape_.parameters > 0 && args_.db_hh)
      sum_rows(part_of(shape_.parameters * args_.hidden_size, worker_.index, worker_.count), rows,
               first, s_.dp, s_.parameter_row, args_.db_hh + shape_.gates * args_.hidden_size);
  }

 private:
  static constexpr int64_t kLanes = lanes_of<scalar_t>;
  using V = vector_of<scalar_t>;

  // Walks the chunk's rows in order while a panel asks for them one after the other.
  struct StepCursor {
    const BackwardArgs<scalar_t>& args;
    int64_t t, base;
    int64_t step_row(int64_t row) {  // returns the row within its step, and moves t there
      while (row + base >= first_row(args, t) + active(args, t)) ++t;
      return row + base - first_row(args, t);
    }
  };

  int64_t rows_of(Range chunk) const {
    return first_row(args_, chunk.end - 1) + active(args_, chunk.end - 1) -
           first_row(args_, chunk.begin);
  }

  void share_right_sides(Range chunk, int64_t rows) {
    const int64_t base = first_row(args_, chunk.begin);
    if (s_.x_packed) {
      const Range mine = part_of(inputs_.count(), worker_.index, worker_.count);
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        StepCursor cursor{args_, chunk.begin, base};
        pack_rows(
            inputs_, p, rows,
            [&](int64_t k) {
              const int64_t b = cursor.step_row(k);
              return step_of(args_, args_.x, cursor.t) + b * args_.x.row_stride;
            },
            s_.x_packed);
      }
    }
    if (s_.h_packed) {
      const Range mine = part_of(outputs_.count(), worker_.index, worker_.count);
      for (int64_t p = mine.begin; p < mine.end; ++p) {
        StepCursor cursor{args_, chunk.begin, base};
        pack_rows(
            outputs_, p, rows,
            [&](int64_t k) {
              const int64_t b = cursor.step_row(k);
              return loop_.state_before(0, cursor.t, b);
            },
            s_.h_packed);
        if (args_.masks.h_kept) drop_panel(p, {args_, chunk.begin, base}, rows);
      }
    }
    if (s_.link_packed) {
      const Range mine = part_of(outputs_.count(), worker_.index, worker_.count);
      for (int64_t p = mine.begin; p < mine.end; ++p)
        pack_rows(
            outputs_, p, rows, [&](int64_t k) { return s_.links + k * s_.link_row; },
            s_.link_packed);
    }
    if (s_.m_packed) {
      const Range mine = part_of(units_.count(), worker_.index, worker_.count);
      for (int64_t p = mine.begin; p < mine.end; ++p)
        pack_rows(
            units_, p, rows, [&](int64_t k) { return loop_.hidden_of(base + k); }, s_.m_packed);
    }
  }

  // What was dropped of h on its way into the product has no part in the gradient either. A slice
  // of a packed panel is as wide as its k_stride.
  void drop_panel(int64_t p, StepCursor cursor, int64_t rows) {
    WeightPanel<scalar_t> panel = packed_panel(outputs_, p, rows, s_.h_packed);
    for (int64_t k = 0; k < rows; ++k, panel.w += panel.k_stride) {
      const int64_t b = cursor.step_row(k);
      scalar_t* slice = panel.w;
      for (int64_t c = 0; c < outputs_.valid(p); c += panel.k_stride, slice += panel.slice_stride)
        drop_h(args_, b, outputs_.first(p) + c, smaller(panel.k_stride, outputs_.valid(p) - c),
               slice, slice);
    }
  }

  // Of normalised gates: what the loop summed over the chunk's steps, over the batch.
  void sum_biases(bool first) {
    const auto sum = [&](int count, int64_t from, scalar_t* out) {
      if (out)
        sum_rows(part_of(count * args_.hidden_size, worker_.index, worker_.count), args_.batch,
                 first, s_.sums + from * args_.hidden_size, s_.sum_row, out);
    };
    sum(shape_.gates, 0, args_.db_ih);
    sum(shape_.gates + shape_.norm_parameters, shape_.gates, args_.db_hh);
  }

  // Adds the values of the chunk's rows to out (or to nothing, if first): in partial sums of 64
  // rows, a few vectors side by side, since a row's neighbours lie in the same cache lines.
  // value(k, m, left) are the `left` columns from m of row k.
  template <class RowValue>
  void sum_columns(Range range, int64_t rows, bool first, const RowValue& value, scalar_t* out) {
    constexpr int kSide = 4;
    for (int64_t m = range.begin; m < range.end; m += kSide * kLanes) {
      const int side = static_cast<int>(smaller(kSide, divide_up(range.end - m, kLanes)));
      V total[kSide] = {};
      for (int64_t k = 0; k < rows;) {
        V part[kSide] = {};
        for (const int64_t end = smaller(rows, k + 64); k < end; ++k)
          for (int v = 0; v < side; ++v)
            part[v] += value(k, m + v * kLanes, range.end - m - v * kLanes);
        for (int v = 0; v < side; ++v) total[v] += part[v];
      }
      for (int v = 0; v < side; ++v) {
        const int64_t at = m + v * kLanes, left = range.end - at;
        store_part(out + at, first ? total[v] : load_part(out + at, left) + total[v], left);
      }
    }
  }

  void sum_rows(Range range, int64_t rows, bool first, const scalar_t* from, int64_t row,
                scalar_t* out) {
    // Rows are padded to a vector more than they hold, so that whole vectors may be read.
    sum_columns(
        range, rows, first, [&](int64_t k, int64_t m, int64_t) { return load(from + k * row + m); },
        out);
  }

  // du = sum of dgh * h_prev.
  void diagonal_gradient(Range range, Range chunk, int64_t rows, bool first) {
    StepCursor cursor{args_, chunk.begin, first_row(args_, chunk.begin)};
    sum_columns(
        range, rows, first,
        [&](int64_t k, int64_t m, int64_t left) {
          if (k == 0) cursor.t = chunk.begin;
          const int64_t b = cursor.step_row(k);
          const scalar_t* h = loop_.state_before(0, cursor.t, b);
          return h ? load(s_.dgh + k * s_.gate_row + m) * load_part(h + m, left) : V{};
        },
        args_.dw_hh);
  }

  // dx = dgx . w_ih for the chunk's rows in `range`; dx is contiguous.
  void input_gradient(int64_t base, Range range) {
    row_product(inputs_, Range{0, inputs_.count()}, range.size(), false,
                s_.dgx + range.begin * s_.gate_row, s_.gate_row,
                {args_.w_ih, s_.w_ih, shape_.gates * args_.hidden_size},
                args_.dx + (base + range.begin) * args_.input_size, args_.input_size);
  }

  const CellShape& shape_;
  const BackwardArgs<scalar_t>& args_;
  const BackwardScratch<scalar_t>& s_;
  const BackwardBase<scalar_t>& loop_;
  const Worker worker_;
  const Panels<scalar_t> inputs_, outputs_, units_;
};

// The whole backward of one worker, with the loop of its steps.
template <class Cell, class scalar_t, class Loop>
void run_loop(const BackwardArgs<scalar_t>& args, const BackwardScratch<scalar_t>& scratch,
              const Worker& worker, Loop& loop) {
  static constexpr CellShape kShape = shape_of<Cell>();
  GradientPass<scalar_t> gradients(kShape, args, scratch, loop, worker);
  gradients.start();
  loop.start();
  const bool down = !args.reverse;  // against the direction of forward
  bool first = true;
  int64_t steps = 0;
  for (int64_t t = down ? args.seq_len - 1 : 0; t >= 0 && t < args.seq_len;) {
    const Range chunk = chunk_of(args, t, down, kBackwardChunkRows);
    wait_for(args.leader, worker, steps += chunk.size());
    const int64_t base = first_row(args, chunk.begin);
    if constexpr (kNormsGates<Cell>) loop.begin_chunk();
    for (int64_t i = 0; i < chunk.size(); ++i) {
      const int64_t at = down ? chunk.end - 1 - i : chunk.begin + i;
      const bool is_first_step = at == (args.reverse ? args.seq_len - 1 : 0);
      // A row's first step carries to dh0; in a packed reverse pass that may happen at any step.
      loop.step(at, base, args.dh0 != nullptr || !is_first_step);
    }
    barrier(worker);  // the chunk's gate gradients are complete
    gradients.gates(chunk);
    gradients.inputs(chunk);
    note_done(args.done, worker, steps);
    gradients.add(chunk, first);
    barrier(worker);  // and may be overwritten
    first = false;
    t = down ? chunk.begin - 1 : chunk.end;
  }
  loop.finish();
}

template <class Cell, class scalar_t>
void run_backward(const BackwardArgs<scalar_t>& args, const Choice& choice,
                  const BackwardScratch<scalar_t>& scratch, const Worker& worker) {
  using Loop = std::conditional_t<kHasStages<Cell>, StagedBackward<Cell, scalar_t>,
                                  BackwardPass<Cell, scalar_t>>;
  Loop loop(args, choice, scratch, worker);
  run_loop<Cell>(args, scratch, worker, loop);
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
