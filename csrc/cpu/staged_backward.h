// The backward loop of a cell with stages (cells/stages.h): its second half, what stands between,
// its first half. Workers own rows of the batch.
#pragma once

#include "backward.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class scalar_t>
class StagedBackward : public BackwardPass<Cell, scalar_t> {
  using Base = BackwardPass<Cell, scalar_t>;
  using Base::args_, Base::s_, Base::cell_, Base::mine_, Base::outputs_, Base::worker_;

 public:
  using Base::Base;

  void start() {
    const int64_t rows = linked_rows<Cell>(args_.hidden_size);
    const Range packs = part_of(outputs_.count(), worker_.index, worker_.count);
    if (s_.w_link)
      for (int64_t p = packs.begin; p < packs.end; ++p)
        pack_rows(
            outputs_, p, rows, [&](int64_t k) { return linked_weights() + k * outputs_.units; },
            s_.w_link);
    Base::start();  // and a barrier
  }

  // As BackwardPass has it.
  void step(int64_t t, int64_t base, bool carry) {
    const int64_t count = smaller(mine_.rows.end, active(args_, t)) - mine_.rows.begin;
    const int64_t row = first_row(args_, t) - base + mine_.rows.begin;  // of the chunk
    if (count > 0) {
      for (int64_t r = 0; r < count; ++r) finish_row(t, mine_.rows.begin + r, row + r);
      if constexpr (kLinkOf<Cell> == Link::kProduct)
        row_product(outputs_, mine_.output_panels, count, false,
                    s_.dgh + row * s_.gate_row + free_rows<Cell>(args_.hidden_size), s_.gate_row,
                    {linked_weights(), s_.w_link, linked_rows<Cell>(args_.hidden_size)},
                    s_.dlink + mine_.rows.begin * s_.link_row, s_.link_row);
      for (int64_t r = 0; r < count; ++r) begin_row(t, mine_.rows.begin + r, row + r);
      if (carry) this->carry_back(row, count);
    }
    if (args_.reset) this->cut_gradients(t);
  }

 private:
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;

  const scalar_t* linked_weights() const {
    return args_.w_hh + free_rows<Cell>(args_.hidden_size) * args_.output_size;
  }

  // What both halves read of a row.
  template <class W>
  struct Units {
    W kept[at_least_one<kSaved>], prev[kStates], next[kStates], dstate[kStates], dgates[kGates];
  };
  struct Row {
    int64_t b, layer_row;
    scalar_t* dgates;
    const scalar_t* before[kStates];
  };
  Row row_of(int64_t t, int64_t b, int64_t chunk_row) const {
    Row row{b, first_row(args_, t) + b, s_.dgx + chunk_row * s_.gate_row, {}};
    for (int k = 0; k < kStates; ++k) row.before[k] = this->state_before(k, t, b);
    return row;
  }

  template <class W>
  RNNFAST_HD void load(const Row& row, int64_t unit, int64_t left, Units<W>& u) const {
    RNNFAST_UNROLL
    for (int k = 0; k < kSaved; ++k)
      u.kept[k] = load_units<W>(this->saved_plane(row.layer_row, k) + unit, left);
    RNNFAST_UNROLL
    for (int k = 0; k < kStates; ++k) {
      u.prev[k] = row.before[k] ? load_units<W>(row.before[k] + unit, left) : W{};
      u.next[k] = load_units<W>(k == 0 ? args_.y + row.layer_row * args_.output_size + unit
                                       : this->saved_plane(row.layer_row, kSaved + k - 1) + unit,
                                left);
      u.dstate[k] = load_units<W>(gradient(k, row.b) + unit, left);
    }
  }
  template <class W>
  RNNFAST_HD void store(const Row& row, int64_t unit, int64_t left, const Units<W>& u) const {
    RNNFAST_UNROLL
    for (int g = 0; g < kGates; ++g)
      store_units(row.dgates + g * args_.hidden_size + unit, u.dgates[g], left);
    RNNFAST_UNROLL
    for (int k = 0; k < kStates; ++k) store_units(gradient(k, row.b) + unit, u.dstate[k], left);
  }
  // The carried gradient of h, or of an inner state.
  scalar_t* gradient(int k, int64_t b) const {
    return k == 0 ? s_.dh + b * args_.output_size : this->inner_gradient(k, b);
  }

  void finish_row(int64_t t, int64_t b, int64_t chunk_row) const {
    const Row row = row_of(t, b, chunk_row);
    const auto ahead = this->row_ahead(t, b);
    const scalar_t* dy =
        args_.dy.data ? step_of(args_, args_.dy, t) + b * args_.dy.row_stride : nullptr;
    for_units<scalar_t>(args_.hidden_size, [&](auto zero, int64_t unit, int64_t left) {
      using W = decltype(zero);
      Units<W> u{};
      for (int64_t at = 0; ahead.saved && at < left; at += lanes_of<scalar_t>)
        ahead.fetch(unit + at, this->planes_, args_.hidden_size);
      load(row, unit, left, u);
      if (dy) u.dstate[0] += load_units<W>(dy + unit, left);
      cell_.finish_backward(u.kept, u.prev, u.next, u.dstate, u.dgates);
      store(row, unit, left, u);
    });
  }

  void begin_row(int64_t t, int64_t b, int64_t chunk_row) const {
    const Row row = row_of(t, b, chunk_row);
    const scalar_t* dlink = s_.dlink + b * s_.link_row;
    scalar_t* links = s_.links ? s_.links + chunk_row * s_.link_row : nullptr;
    for_units<scalar_t>(args_.hidden_size, [&](auto zero, int64_t unit, int64_t left) {
      using W = decltype(zero);
      Units<W> u;
      W link;
      load(row, unit, left, u);
      RNNFAST_UNROLL
      for (int g = 0; g < kGates; ++g)
        u.dgates[g] = load_whole<W>(row.dgates + g * args_.hidden_size + unit);
      cell_.begin_backward(u.kept, u.prev, u.next, load_whole<W>(dlink + unit), u.dstate, u.dgates,
                           link);
      store(row, unit, left, u);
      if (links) store_whole(links + unit, link);
    });
  }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
