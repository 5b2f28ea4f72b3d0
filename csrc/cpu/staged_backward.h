// The backward loop of a cell with stages (cells/stages.h): its second half, what stands between,
// its first half, and the products that were normalised. Workers own rows of the batch.
#pragma once

#include "backward.h"
#include "norm.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class scalar_t>
class StagedBackward : public BackwardPass<Cell, scalar_t> {
  using Base = BackwardPass<Cell, scalar_t>;
  using Base::args_, Base::s_, Base::cell_, Base::mine_, Base::outputs_, Base::worker_,
      Base::kShape;

 public:
  using Base::Base;

  void start() {
    const int64_t rows = linked_rows();
    const Range packs = part_of(outputs_.count(), worker_.index, worker_.count);
    if (s_.w_link)
      for (int64_t p = packs.begin; p < packs.end; ++p)
        pack_rows(
            outputs_, p, rows, [&](int64_t k) { return linked_weights() + k * outputs_.units; },
            s_.w_link);
    Base::start();  // and a barrier
  }

  // Sums of gates that are normalised go chunk by chunk, one row of the batch after the other: the
  // bits do not depend on whose rows they are.
  void begin_chunk() {
    for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b)
      __builtin_memset(s_.sums + b * s_.sum_row, 0, s_.sum_row * sizeof(scalar_t));
  }

  // As BackwardPass has it.
  void step(int64_t t, int64_t base, bool carry) {
    const int64_t count = smaller(mine_.rows.end, active(args_, t)) - mine_.rows.begin;
    const int64_t row = first_row(args_, t) - base + mine_.rows.begin;  // of the chunk
    if (count > 0) {
      if constexpr (kLinkOf<Cell> == Link::kProduct) {
        for (int64_t r = 0; r < count; ++r) finish_row(row_of(t, mine_.rows.begin + r, row + r));
        row_product(outputs_, mine_.output_panels, count, false,
                    s_.dgh + row * s_.gate_row + this->free_rows(), s_.gate_row,
                    {linked_weights(), s_.w_link, linked_rows()},
                    s_.dlink + mine_.rows.begin * s_.link_row, s_.link_row);
      }
      for (int64_t r = 0; r < count; ++r) whole_row(row_of(t, mine_.rows.begin + r, row + r));
      if (carry && kDense) this->carry_back(row, count);
    }
    if (args_.reset) this->cut_gradients(t);
  }

 private:
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  static constexpr bool kDense = Cell::kRecurrence == Recurrence::kDense;

  int64_t linked_rows() const { return kShape.linked_gates * args_.hidden_size; }
  const scalar_t* linked_weights() const {
    return args_.w_hh + this->free_rows() * args_.output_size;
  }
  // The k-th of those behind the bias, each of a number a unit, or null; and its gradient.
  const scalar_t* norm_parameter(int k) const {
    return args_.b_hh ? args_.b_hh + (kGates + k) * args_.hidden_size : nullptr;
  }
  scalar_t* norm_gradient(int64_t b, int k) const {
    return s_.sums + b * s_.sum_row + (2 * kGates + k) * args_.hidden_size;
  }

  // A row of the batch at a step.
  struct Row {
    int64_t t, b, layer_row, chunk_row;
    scalar_t *dgx, *dgh;
    const scalar_t* before[kStates];
  };
  Row row_of(int64_t t, int64_t b, int64_t chunk_row) const {
    const int64_t at = chunk_row * s_.gate_row;
    Row row{t, b, first_row(args_, t) + b, chunk_row, s_.dgx + at, s_.dgh + at, {}};
    for (int k = 0; k < kStates; ++k) row.before[k] = this->state_before(k, t, b);
    return row;
  }

  // What the halves read and write of some units.
  template <class W>
  struct Units {
    W kept[at_least_one<kSaved>], prev[kStates], next[kStates], dstate[kStates];
  };
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
    for (int k = 0; k < kStates; ++k) store_units(gradient(k, row.b) + unit, u.dstate[k], left);
  }
  template <class W>
  RNNFAST_HD void store_gates(scalar_t* to, int64_t unit, int64_t left,
                              const W (&gates)[kGates]) const {
    RNNFAST_UNROLL
    for (int g = 0; g < kGates; ++g) store_units(to + g * args_.hidden_size + unit, gates[g], left);
  }
  // The carried gradient of h, or of an inner state.
  scalar_t* gradient(int k, int64_t b) const {
    return k == 0 ? s_.dh + b * args_.output_size : this->inner_gradient(k, b);
  }

  // What arrives at h of a step, for the half or the cell that takes it.
  template <class Use>
  RNNFAST_HD void for_arriving(const Row& row, const Use& use) const {
    const auto ahead = this->row_ahead(row.t, row.b);
    const scalar_t* dy =
        args_.dy.data ? step_of(args_, args_.dy, row.t) + row.b * args_.dy.row_stride : nullptr;
    for_units<scalar_t>(args_.hidden_size, [&](auto zero, int64_t unit, int64_t left) {
      using W = decltype(zero);
      Units<W> u;
      for (int64_t at = 0; ahead.saved && at < left; at += lanes_of<scalar_t>)
        ahead.fetch(unit + at, this->planes_, args_.hidden_size);
      load(row, unit, left, u);
      if (dy) u.dstate[0] += load_units<W>(dy + unit, left);
      use(unit, left, u);
      store(row, unit, left, u);
    });
  }

  void finish_row(const Row& row) const {
    scalar_t* dlink = s_.dlink + row.b * s_.link_row;
    const scalar_t* link = s_.linked + row.b * s_.link_row;
    for_arriving(row, [&](int64_t unit, int64_t left, auto& u) {
      using W = std::remove_reference_t<decltype(u.next[0])>;
      W dgates[kGates] = {}, linked{}, to{};
      if constexpr (kLinkOf<Cell> == Link::kNorm) linked = load_whole<W>(link + unit);
      cell_.finish_backward(u.kept, linked, u.prev, u.next, u.dstate, dgates, to);
      store_gates(row.dgx, unit, left, dgates);
      if constexpr (kLinkOf<Cell> == Link::kNorm) store_whole(dlink + unit, to);
    });
  }

  void begin_row(const Row& row) const {
    const scalar_t* dlink = s_.dlink + row.b * s_.link_row;
    scalar_t* links = s_.links ? s_.links + row.chunk_row * s_.link_row : nullptr;
    for_units<scalar_t>(args_.hidden_size, [&](auto zero, int64_t unit, int64_t left) {
      using W = decltype(zero);
      Units<W> u;
      W dgates[kGates], link{};
      load(row, unit, left, u);
      RNNFAST_UNROLL
      for (int g = 0; g < kGates; ++g)
        dgates[g] = load_whole<W>(row.dgx + g * args_.hidden_size + unit);
      cell_.begin_backward(u.kept, u.prev, u.next, load_whole<W>(dlink + unit), u.dstate, dgates,
                           link);
      store(row, unit, left, u);
      store_gates(row.dgx, unit, left, dgates);
      if (links) store_whole(links + unit, link);
    });
  }

  // A cell without a link.
  void cell_row(const Row& row) const {
    for_arriving(row, [&](int64_t unit, int64_t left, auto& u) {
      using W = std::remove_reference_t<decltype(u.next[0])>;
      W dgx[kGates], dgh[kGates];
      cell_.backward(u.kept, u.prev, u.next, u.dstate, dgx, dgh);
      store_gates(row.dgx, unit, left, dgx);
      store_gates(row.dgh, unit, left, dgh);
      if constexpr (!kDense) u.dstate[0] += dgh[0] * load_units<W>(args_.w_hh + unit, left);
    });
  }

  // All that a product with w_hh, or with that of the link, does not divide.
  void whole_row(const Row& row) const {
    const int64_t size = args_.hidden_size;
    if constexpr (kLinkOf<Cell> == Link::kNorm) {
      // The link is the last state.
      const scalar_t* from = this->saved_plane(row.layer_row, kSaved + kStates - 2);
      const scalar_t* gain = norm_parameter(kNormPlanes<Cell>);
      scalar_t* dlink = s_.dlink + row.b * s_.link_row;
      normalise(from, size, gain, norm_parameter(kNormPlanes<Cell> + 1),
                s_.linked + row.b * s_.link_row);
      finish_row(row);
      normalise_backward(from, size, gain, dlink, dlink, norm_gradient(row.b, kNormPlanes<Cell>),
                         norm_gradient(row.b, kNormPlanes<Cell> + 1));
    }
    if constexpr (kLinkOf<Cell> == Link::kNone)
      cell_row(row);
    else
      begin_row(row);
    if constexpr (kNormsGates<Cell>) norm_gates(row);
  }

  // From the gradients of what the cell saw to those of the products.
  void norm_gates(const Row& row) const {
    const int64_t size = args_.hidden_size;
    scalar_t* const sums = s_.sums + row.b * s_.sum_row;
    const auto side = [&](int k, const scalar_t* dy, scalar_t* dx) {
      const scalar_t* from =
          this->saved_plane(row.layer_row, this->planes_ - kNormPlanes<Cell> + k * kGates);
      const scalar_t* gain = norm_parameter(k * kGates);
      scalar_t *dgain = norm_gradient(row.b, k * kGates), *dbias = sums + k * kGates * size;
      for_norm_groups<Cell>(size, [&](int64_t begin, int64_t count) {
        normalise_backward(from + begin, count, gain ? gain + begin : nullptr, dy + begin,
                           dx + begin, dgain + begin, dbias + begin);
      });
    };
    // One set of gradients for both sides, where the cell has a link: the input side takes it last.
    if constexpr (kNormsHidden<Cell>)
      side(1, kLinkOf<Cell> == Link::kNone ? row.dgh : row.dgx, row.dgh);
    else
      for_units<scalar_t>(kGates * size, [&](auto zero, int64_t unit, int64_t left) {
        using W = decltype(zero);
        scalar_t* const to = sums + kGates * size + unit;
        store_units(to, load_units<W>(to, left) + load_units<W>(row.dgh + unit, left), left);
      });
    side(0, row.dgx, row.dgx);
  }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
