// Backward of one direction of one layer on the CPU: the time loop.
// Gradients: dgx, dgh = dL/d(pre-activations), (N, G*H) in PyTorch's gate
// order; dh, dc = what flows from step to step. Weight and input gradients:
// gradients.h, a chunk at a time, so that dgx and dgh never leave the cache.
//
// A step, for own rows and units: the cell's backward from the carried dh + dy; then, once all of
// dgh is there (a barrier when units are divided), dh of the step before = dgh . w_hh. With a
// projection two products stand in for one: dm = dh . w_hr before the cell, and dh = dgh . w_hh
// after the cell.
#pragma once

#include <type_traits>

#include "../cells/stages.h"
#include "row_product.h"
#include "share.h"
#include "units.h"
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

// Rows of w_hh that h is multiplied with, and those of the link.
template <class Cell>
int64_t free_rows(int64_t hidden_size) {
  return kFreeGatesOf<Cell> * hidden_size;
}
template <class Cell>
int64_t linked_rows(int64_t hidden_size) {
  return kLinkedGatesOf<Cell> * hidden_size;
}

template <class Cell, class scalar_t>
BackwardScratch<scalar_t> backward_scratch(const BackwardArgs<scalar_t>& args, const Choice& choice,
                                           Arena& arena) {
  constexpr bool kDense = Cell::kRecurrence == Recurrence::kDense;
  const int64_t gates = Cell::kGates * args.hidden_size;
  const Panels<scalar_t> inputs{args.input_size, 1}, outputs{args.output_size, 1},
      units{args.hidden_size, 1};
  BackwardScratch<scalar_t> s{};
  s.capacity = chunk_capacity(args.rows, args.batch, kBackwardChunkRows);
  s.gate_row = gates + kMaxRows + lanes_of<scalar_t>;
  if (kDense && choice.kernel_hh == Kernel::kPacked)
    s.w_hh = arena.take<scalar_t>(outputs.padded() * free_rows<Cell>(args.hidden_size));
  if (args.w_hr && choice.kernel_hh == Kernel::kPacked)
    s.w_hr = arena.take<scalar_t>(units.padded() * args.output_size);
  if (args.dx && choice.kernel_ih == Kernel::kPacked)
    s.w_ih = arena.take<scalar_t>(inputs.padded() * gates);
  s.dh = arena.take<scalar_t>(args.batch * args.output_size);
  if (Cell::kStates > 1)
    s.dc = arena.take<scalar_t>((Cell::kStates - 1) * args.batch * args.hidden_size);
  s.dgx = arena.take<scalar_t>(s.capacity * s.gate_row);
  s.dgh = Cell::kSplitGates ? arena.take<scalar_t>(s.capacity * s.gate_row) : s.dgx;
  s.parameter_row = kParametersOf<Cell> * args.hidden_size + lanes_of<scalar_t>;
  if (kParametersOf<Cell> > 0) s.dp = arena.take<scalar_t>(s.capacity * s.parameter_row);
  if (args.masks.h_kept) s.dh_entered = arena.take<scalar_t>(args.batch * args.output_size);
  if (args.w_hr) {
    s.dm = arena.take<scalar_t>(args.batch * units.padded());
    s.dh_steps = arena.take<scalar_t>(s.capacity * args.output_size + 2 * kLeftTiles * kMaxRows);
  }
  if constexpr (kHasStages<Cell>) {
    s.link_row = units.padded() + lanes_of<scalar_t>;
    s.dlink = arena.take<scalar_t>(args.batch * s.link_row);
    s.linked = arena.take<scalar_t>(args.batch * s.link_row);
    s.sum_row = (2 * Cell::kGates + kNormParameters<Cell>)*args.hidden_size + lanes_of<scalar_t>;
    if (kNormsGates<Cell>) s.sums = arena.take<scalar_t>(args.batch * s.sum_row);
    if (kLinkedGatesOf<Cell> > 0) {
      if (choice.kernel_hh == Kernel::kPacked)
        s.w_link = arena.take<scalar_t>(outputs.padded() * linked_rows<Cell>(args.hidden_size));
      s.links = arena.take<scalar_t>(s.capacity * s.link_row);
      if (args.dw_hh) s.link_packed = arena.take<scalar_t>(outputs.padded() * s.capacity);
    }
  }
  if (args.dw_ih) s.x_packed = arena.take<scalar_t>(inputs.padded() * s.capacity);
  if (args.dw_hh && kDense) s.h_packed = arena.take<scalar_t>(outputs.padded() * s.capacity);
  if (args.dw_hr) s.m_packed = arena.take<scalar_t>(units.padded() * s.capacity);
  s.a_tiles_size = left_tiles_size<scalar_t>(s.capacity);
  s.a_tiles = arena.take<scalar_t>(s.a_tiles_size * choice.threads);
  return s;
}

template <class Cell, class scalar_t>
class BackwardPass {
 public:
  BackwardPass(const BackwardArgs<scalar_t>& args, const Choice& choice,
               const BackwardScratch<scalar_t>& scratch, const Worker& worker)
      : args_(args),
        s_(scratch),
        worker_(worker),
        units_{args.hidden_size, 1},
        outputs_{args.output_size, 1},
        mine_(share_of(args, choice, worker, units_, outputs_)) {
    planes_ = Cell::kSaved + Cell::kStates - 1 + kNormPlanes<Cell> + (args.w_hr ? 1 : 0);
  }

  // Packs the loop's weights (shared: a barrier follows) and starts the carried gradients.
  void start() {
    const int64_t gates = free_rows<Cell>(args_.hidden_size);
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
      for (int64_t k = 0; k < Cell::kStates - 1; ++k) {
        const int64_t inner = (k * args_.batch + b) * args_.hidden_size;
        for (int64_t u = units.begin; u < units.end; ++u)
          s_.dc[inner + u] = args_.dc_n ? args_.dc_n[inner + u] : scalar_t(0);
      }
    }
    barrier(worker_);
  }

  // Step t; its gate gradients go to the chunk's rows, which begin with row `base` of the layer.
  // `carry`: whether dh of the step before is wanted. Ends with a barrier, so that all workers may
  // read the step's dgx and dgh.
  void step(int64_t t, int64_t base, bool carry) {
    const int64_t count = smaller(mine_.rows.end, active(args_, t)) - mine_.rows.begin;
    const int64_t row = first_row(args_, t) - base + mine_.rows.begin;  // of the chunk
    if (args_.w_hr) {
      if (count > 0) take_output_gradient(t, row, count);
      barrier_if_shared();
      if (count > 0) undo_projection(row, count);
    }
    for (int64_t r = 0; r < count; ++r) cell_row(t, mine_.rows.begin + r, row + r);
    if (Cell::kRecurrence == Recurrence::kDense) barrier_if_shared();
    if (Cell::kRecurrence == Recurrence::kDense && carry && count > 0) carry_back(row, count);
    if (args_.reset) cut_gradients(t);
  }

  void finish() {
    const Range outputs = columns_of(outputs_, mine_.output_panels),
                units = columns_of(units_, mine_.panels);
    for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
      const int64_t at = b * args_.output_size;
      if (args_.dh0)
        for (int64_t u = outputs.begin; u < outputs.end; ++u) args_.dh0[at + u] = s_.dh[at + u];
      for (int64_t k = 0; k < Cell::kStates - 1 && args_.dc0; ++k) {
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
                        : saved_plane(row, Cell::kSaved + index - 1);
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

  // The cell's backward for one row and the own units, in
  // order: what forward kept is read as a few streams.
  void cell_row(int64_t t, int64_t b, int64_t chunk_row) {
    const int64_t layer_row = first_row(args_, t) + b;
    const scalar_t* dy = args_.dy.data && !args_.w_hr
                             ? step_of(args_, args_.dy, t) + b * args_.dy.row_stride
                             : nullptr;
    const scalar_t* before[Cell::kStates];
    for (int k = 0; k < Cell::kStates; ++k) before[k] = state_before(k, t, b);
    const Range units = columns_of(units_, mine_.panels);
    const RowAhead ahead = row_ahead(t, b);
    for (int64_t unit = units.begin; unit < units.end;) {
      const int64_t left = args_.hidden_size - unit;
      if (ahead.saved) ahead.fetch(unit, planes_, args_.hidden_size);
      if (unit + kLanes < units.end && left >= 2 * kLanes) {
        if (ahead.saved) ahead.fetch(unit + kLanes, planes_, args_.hidden_size);
        cell_vector<pair_of<scalar_t>>(unit, 2 * kLanes, layer_row, b, chunk_row, dy, before);
        unit += 2 * kLanes;
        continue;
      }
      // A whole vector needs no count.
      if (left >= kLanes)
        cell_vector<V>(unit, kLanes, layer_row, b, chunk_row, dy, before);
      else
        cell_vector<V>(unit, left, layer_row, b, chunk_row, dy, before);
      unit += kLanes;
    }
  }

  // W: a vector, of which the layer has `left` lanes, or a whole pair.
  template <class W>
  RNNFAST_HD void cell_vector(int64_t unit, int64_t left, int64_t layer_row, int64_t b,
                              int64_t chunk_row, const scalar_t* dy,
                              const scalar_t* const (&before)[Cell::kStates]) {
    W kept[at_least_one<Cell::kSaved>], prev[Cell::kStates], next[Cell::kStates],
        dstate[Cell::kStates];
    W dgx[Cell::kGates], dgh[Cell::kGates];
    RNNFAST_UNROLL
    for (int k = 0; k < Cell::kSaved; ++k)
      kept[k] = load_units<W>(saved_plane(layer_row, k) + unit, left);
    prev[0] = next[0] = W{};
    RNNFAST_UNROLL
    for (int k = args_.w_hr ? 1 : 0; k < Cell::kStates; ++k) {
      prev[k] = before[k] ? load_units<W>(before[k] + unit, left) : W{};
      next[k] = load_units<W>(k == 0 ? args_.y + layer_row * args_.output_size + unit
                                     : saved_plane(layer_row, Cell::kSaved + k - 1) + unit,
                              left);
    }
    if (args_.w_hr) {
      // prev[0] is of another size; a cell with a projection does not look at it.
      next[0] = load_units<W>(hidden_of(layer_row) + unit, left);
      dstate[0] = load_units<W>(s_.dm + b * units_.padded() + unit, left);
    } else {
      dstate[0] = load_units<W>(s_.dh + b * args_.output_size + unit, left);
      if (dy) dstate[0] += load_units<W>(dy + unit, left);
    }
    RNNFAST_UNROLL
    for (int k = 1; k < Cell::kStates; ++k)
      dstate[k] = load_units<W>(inner_gradient(k, b) + unit, left);

    constexpr int kParameters = kParametersOf<Cell>;
    W params[at_least_one<kParameters>] = {}, dparams[at_least_one<kParameters>] = {};
    RNNFAST_UNROLL
    for (int k = 0; k < kParameters; ++k)
      if (args_.b_hh)
        params[k] = load_units<W>(args_.b_hh + (Cell::kGates + k) * args_.hidden_size + unit, left);

    if constexpr (kKeepsOf<Cell>) {
      W keep[Cell::kStates];
      RNNFAST_UNROLL
      for (int s = 0; s < Cell::kStates; ++s) {
        constexpr int kSide = sizeof(W) / sizeof(V);
        V part[kSide];
        RNNFAST_UNROLL
        for (int i = 0; i < kSide; ++i)
          part[i] = kept_part<scalar_t>(args_, Cell::kStates, layer_row, s, unit + i * kLanes,
                                        left - i * kLanes);
        __builtin_memcpy(&keep[s], part, sizeof(part));
      }
      cell_.backward(keep, kept, prev, next, dstate, dgx, dgh);
    } else {
      cell_backward(cell_, params, dparams, kept, prev, next, dstate, dgx, dgh);
    }

    RNNFAST_UNROLL
    for (int k = 0; k < kParameters; ++k)
      store_units(s_.dp + chunk_row * s_.parameter_row + k * args_.hidden_size + unit, dparams[k],
                  left);

    RNNFAST_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) {
      const int64_t at = chunk_row * s_.gate_row + g * args_.hidden_size + unit;
      store_units(s_.dgx + at, dgx[g], left);
      if (Cell::kSplitGates) store_units(s_.dgh + at, dgh[g], left);
    }
    if constexpr (Cell::kRecurrence == Recurrence::kDiagonal)
      dstate[0] += dgh[0] * load_units<W>(args_.w_hh + unit, left);
    if (!args_.w_hr) store_units(s_.dh + b * args_.output_size + unit, dstate[0], left);
    RNNFAST_UNROLL
    for (int k = 1; k < Cell::kStates; ++k)
      store_units(inner_gradient(k, b) + unit, dstate[k], left);
  }

  scalar_t* inner_gradient(int k, int64_t b) const {
    return s_.dc + ((k - 1) * args_.batch + b) * args_.hidden_size;
  }

  // dh += dgh . w_hh for own rows and outputs, through the mask of what entered.
  void carry_back(int64_t row, int64_t count) {
    const bool add = !args_.w_hr, dropped = args_.masks.h_kept != nullptr;
    const int64_t P = args_.output_size;
    row_product(outputs_, mine_.output_panels, count, add && !dropped, s_.dgh + row * s_.gate_row,
                s_.gate_row, {args_.w_hh, s_.w_hh, free_rows<Cell>(args_.hidden_size)},
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
      for (int k = 1; k < Cell::kStates; ++k)
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

  const BackwardArgs<scalar_t>& args_;
  const BackwardScratch<scalar_t>& s_;
  const Worker worker_;
  const Panels<scalar_t> units_, outputs_;
  const Share mine_;
  const Cell cell_ = make_cell<Cell>(args_.options);
  int planes_;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
