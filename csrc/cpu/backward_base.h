// What a backward pass does around its cell, compiled once a type: scratch memory, weights, the
// gradients that are carried from step to step, the projection.
#pragma once

#include "../cells/shape.h"
#include "row_product.h"
#include "share.h"
#include "weight_product.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
struct BackwardScratch {
  scalar_t *w_hh, *w_hr, *w_ih;  // packed by rows; null: read in PyTorch's layout
  scalar_t *dh, *dc;             // carried: (B, P), (S-1, B, H)
  scalar_t *dgx, *dgh;           // (chunk rows, gate_row); one buffer unless kSplitGates
  scalar_t* dp;                  // (chunk rows, parameter_row) of a cell with parameters
  scalar_t* dm;                  // (B, H) gradient of h before the projection
  scalar_t* dh_entered;          // (B, P) gradient of h as it entered, where a mask drops it
  scalar_t* dh_steps;            // (chunk rows, P) total gradient of the projected h
  // Of a cell with stages: the packed part of w_hh that its link is multiplied with, (B, link_row)
  // of the link's gradient, and the links of the chunk, (chunk rows, link_row).
  scalar_t *w_link, *dlink, *links;
  // Of gates that are normalised: (B, sum_row) of this chunk's gradients of b_ih and b_hh, with all
  // that stands behind the bias there; and (B, link_row) of a normalised link.
  scalar_t *sums, *linked;
  scalar_t *x_packed, *h_packed, *m_packed, *link_packed;  // right sides of weight gradients
  scalar_t* a_tiles;  // (workers, kLeftTiles tiles of chunk rows) left side
  int64_t capacity, gate_row, parameter_row, link_row, sum_row, a_tiles_size;
};

template <class scalar_t>
BackwardScratch<scalar_t> backward_scratch(const CellShape& cell,
                                           const BackwardArgs<scalar_t>& args, const Choice& choice,
                                           Arena& arena) {
  const bool dense = cell.recurrence == Recurrence::kDense;
  const int64_t gates = cell.gates * args.hidden_size;
  const Panels<scalar_t> inputs{args.input_size, 1}, outputs{args.output_size, 1},
      units{args.hidden_size, 1};
  BackwardScratch<scalar_t> s{};
  s.capacity = chunk_capacity(args.rows, args.batch, kBackwardChunkRows);
  s.gate_row = gates + kMaxRows + lanes_of<scalar_t>;
  if (dense && choice.kernel_hh == Kernel::kPacked)
    s.w_hh = arena.take<scalar_t>(outputs.padded() * cell.free_gates * args.hidden_size);
  if (args.w_hr && choice.kernel_hh == Kernel::kPacked)
    s.w_hr = arena.take<scalar_t>(units.padded() * args.output_size);
  if (args.dx && choice.kernel_ih == Kernel::kPacked)
    s.w_ih = arena.take<scalar_t>(inputs.padded() * gates);
  s.dh = arena.take<scalar_t>(args.batch * args.output_size);
  if (cell.states > 1)
    s.dc = arena.take<scalar_t>((cell.states - 1) * args.batch * args.hidden_size);
  s.dgx = arena.take<scalar_t>(s.capacity * s.gate_row);
  s.dgh = cell.split_gates ? arena.take<scalar_t>(s.capacity * s.gate_row) : s.dgx;
  s.parameter_row = cell.parameters * args.hidden_size + lanes_of<scalar_t>;
  if (cell.parameters > 0) s.dp = arena.take<scalar_t>(s.capacity * s.parameter_row);
  if (args.masks.h_kept) s.dh_entered = arena.take<scalar_t>(args.batch * args.output_size);
  if (args.w_hr) {
    s.dm = arena.take<scalar_t>(args.batch * units.padded());
    s.dh_steps = arena.take<scalar_t>(s.capacity * args.output_size + 2 * kLeftTiles * kMaxRows);
  }
  if (cell.stages) {
    s.link_row = units.padded() + lanes_of<scalar_t>;
    s.dlink = arena.take<scalar_t>(args.batch * s.link_row);
    s.linked = arena.take<scalar_t>(args.batch * s.link_row);
    s.sum_row = (2 * cell.gates + cell.norm_parameters) * args.hidden_size + lanes_of<scalar_t>;
    if (cell.norms_gates) s.sums = arena.take<scalar_t>(args.batch * s.sum_row);
    if (cell.linked_gates > 0) {
      if (choice.kernel_hh == Kernel::kPacked)
        s.w_link = arena.take<scalar_t>(outputs.padded() * cell.linked_gates * args.hidden_size);
      s.links = arena.take<scalar_t>(s.capacity * s.link_row);
      if (args.dw_hh) s.link_packed = arena.take<scalar_t>(outputs.padded() * s.capacity);
    }
  }
  if (args.dw_ih) s.x_packed = arena.take<scalar_t>(inputs.padded() * s.capacity);
  if (args.dw_hh && dense) s.h_packed = arena.take<scalar_t>(outputs.padded() * s.capacity);
  if (args.dw_hr) s.m_packed = arena.take<scalar_t>(units.padded() * s.capacity);
  s.a_tiles_size = left_tiles_size<scalar_t>(s.capacity);
  s.a_tiles = arena.take<scalar_t>(s.a_tiles_size * choice.threads);
  return s;
}

template <class scalar_t>
class BackwardBase {
 public:
  BackwardBase(const CellShape& shape, const BackwardArgs<scalar_t>& args, const Choice& choice,
               const BackwardScratch<scalar_t>& scratch, const Worker& worker)
      : shape_(shape),
        args_(args),
        s_(scratch),
        worker_(worker),
        units_{args.hidden_size, 1},
        outputs_{args.output_size, 1},
        mine_(share_of(args, choice, worker, units_, outputs_)),
        planes_(shape.planes + (args.w_hr ? 1 : 0)) {}

  // Packs the loop's weights (shared: a barrier follows) and starts the carried gradients.
  void start() {
    const int64_t gates = free_rows();
    const Range packs = part_of(outputs_.count(), worker_.index, worker_.count);
    if (s_.w_hh)
      for (int64_t p = packs.begin; p < packs.end; ++p)
        pack_rows(
            outputs_, p, gates, [&](int64_t k) { return args_.w_hh + k * args_.output_size; },
            s_.w_hh);
    const Range hidden_packs = part_of(units_.count(), worker_.index, worker_.count);
    if (s_.w_hr)
      for (int64_t p = hidden_packs.begin; p < hidden_packs.end; ++p)
        pack_rows(
            units_, p, args_.output_size,
            [&](int64_t k) { return args_.w_hr + k * args_.hidden_size; }, s_.w_hr);

    const Range outputs = columns_of(outputs_, mine_.output_panels),
                units = columns_of(units_, mine_.panels);
    for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
      const int64_t at = b * args_.output_size;
      for (int64_t u = outputs.begin; u < outputs.end; ++u)
        s_.dh[at + u] = args_.dh_n ? args_.dh_n[at + u] : scalar_t(0);
      for (int64_t k = 0; k < shape_.states - 1; ++k) {
        const int64_t inner = (k * args_.batch + b) * args_.hidden_size;
        for (int64_t u = units.begin; u < units.end; ++u)
          s_.dc[inner + u] = args_.dc_n ? args_.dc_n[inner + u] : scalar_t(0);
      }
    }
    barrier(worker_);
  }

  void finish() {
    const Range outputs = columns_of(outputs_, mine_.output_panels),
                units = columns_of(units_, mine_.panels);
    for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
      const int64_t at = b * args_.output_size;
      if (args_.dh0)
        for (int64_t u = outputs.begin; u < outputs.end; ++u) args_.dh0[at + u] = s_.dh[at + u];
      for (int64_t k = 0; k < shape_.states - 1 && args_.dc0; ++k) {
        const int64_t inner = (k * args_.batch + b) * args_.hidden_size;
        for (int64_t u = units.begin; u < units.end; ++u) args_.dc0[inner + u] = s_.dc[inner + u];
      }
    }
  }

  // h (index 0) or an inner state of row b before step t; null stands for zeros.
  const scalar_t* state_before(int index, int64_t t, int64_t b) const {
    if (starts_anew(args_, t, b)) return nullptr;
    if (b < continuing(args_, t)) {
      const int64_t row = first_row(args_, previous(args_, t)) + b;
      return index == 0 ? args_.y + row * args_.output_size
                        : saved_plane(row, shape_.saved + index - 1);
    }
    if (index == 0) return args_.h0 ? args_.h0 + b * args_.output_size : nullptr;
    return args_.c0 ? args_.c0 + ((index - 1) * args_.batch + b) * args_.hidden_size : nullptr;
  }

  const scalar_t* saved_plane(int64_t row, int plane) const {
    return args_.saved + (row * planes_ + plane) * args_.hidden_size;
  }
  // h before the projection
  const scalar_t* hidden_of(int64_t row) const { return saved_plane(row, planes_ - 1); }

 protected:
  static constexpr int64_t kLanes = lanes_of<scalar_t>;
  using V = vector_of<scalar_t>;

  void barrier_if_shared() {
    if (mine_.by_units) barrier(worker_);
  }

  // What the cell will read of the same sequence at the step that comes next: forward wrote it long
  // ago, and it lies far away.
  struct RowAhead {
    const scalar_t *saved = nullptr, *y = nullptr, *dy = nullptr;
    void fetch(int64_t unit, int planes, int64_t hidden_size) const {
      for (int k = 0; k < planes; ++k) __builtin_prefetch(saved + k * hidden_size + unit, 0, 2);
      __builtin_prefetch(y + unit, 0, 2);
      if (dy) __builtin_prefetch(dy + unit, 0, 2);
    }
  };

  RowAhead row_ahead(int64_t t, int64_t b) const {
    const int64_t next = previous(args_, t);
    if (next < 0 || next >= args_.seq_len || b >= active(args_, next)) return {};
    const int64_t row = first_row(args_, next) + b;
    return {saved_plane(row, 0), args_.y + row * args_.output_size,
            args_.dy.data && !args_.w_hr ? step_of(args_, args_.dy, next) + b * args_.dy.row_stride
                                         : nullptr};
  }

  scalar_t* inner_gradient(int k, int64_t b) const {
    return s_.dc + ((k - 1) * args_.batch + b) * args_.hidden_size;
  }

  // dh += dgh . w_hh for own rows and outputs, through the mask of what entered.
  void carry_back(int64_t row, int64_t count) {
    const bool add = !args_.w_hr, dropped = args_.masks.h_kept != nullptr;
    const int64_t P = args_.output_size;
    row_product(outputs_, mine_.output_panels, count, add && !dropped, s_.dgh + row * s_.gate_row,
                s_.gate_row, {args_.w_hh, s_.w_hh, free_rows()},
                (dropped ? s_.dh_entered : s_.dh) + mine_.rows.begin * P, P);
    if (!dropped) return;
    const Range outputs = columns_of(outputs_, mine_.output_panels);
    const scalar_t scale = static_cast<scalar_t>(args_.masks.h_scale);
    for (int64_t b = mine_.rows.begin; b < mine_.rows.begin + count; ++b)
      for (int64_t at = b * P + outputs.begin; at < b * P + outputs.end; ++at) {
        const scalar_t through = args_.masks.h_kept[at] ? scale * s_.dh_entered[at] : scalar_t(0);
        s_.dh[at] = add ? s_.dh[at] + through : through;
      }
  }

  // Nothing flows to the step before, or to h0, from rows that start anew at step t.
  void cut_gradients(int64_t t) {
    const Range outputs = columns_of(outputs_, mine_.output_panels),
                units = columns_of(units_, mine_.panels);
    const int64_t end = smaller(mine_.rows.end, active(args_, t));
    for (int64_t b = mine_.rows.begin; b < end; ++b) {
      if (!starts_anew(args_, t, b)) continue;
      for (int64_t u = outputs.begin; u < outputs.end; ++u)
        s_.dh[b * args_.output_size + u] = scalar_t(0);
      for (int k = 1; k < shape_.states; ++k)
        for (int64_t u = units.begin; u < units.end; ++u) inner_gradient(k, b)[u] = scalar_t(0);
    }
  }

  // Total gradient of the projected h of step t, kept for dw_hr.
  void take_output_gradient(int64_t t, int64_t row, int64_t count) {
    const Range outputs = columns_of(outputs_, mine_.output_panels);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t b = mine_.rows.begin + r;
      const scalar_t* dy =
          args_.dy.data ? step_of(args_, args_.dy, t) + b * args_.dy.row_stride : nullptr;
      for (int64_t u = outputs.begin; u < outputs.end; ++u)
        s_.dh_steps[(row + r) * args_.output_size + u] =
            s_.dh[b * args_.output_size + u] + (dy ? dy[u] : scalar_t(0));
    }
  }

  // dm = dh . w_hr for own rows and units.
  void undo_projection(int64_t row, int64_t count) {
    row_product(units_, mine_.panels, count, false, s_.dh_steps + row * args_.output_size,
                args_.output_size, {args_.w_hr, s_.w_hr, args_.output_size},
                s_.dm + mine_.rows.begin * units_.padded(), units_.padded());
  }

  // Rows of w_hh that h is multiplied with.
  int64_t free_rows() const { return shape_.free_gates * args_.hidden_size; }

  const CellShape& shape_;
  const BackwardArgs<scalar_t>& args_;
  const BackwardScratch<scalar_t>& s_;
  const Worker worker_;
  const Panels<scalar_t> units_, outputs_;
  const Share mine_;
  const int planes_;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
