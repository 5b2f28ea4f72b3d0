// Forward of one direction of one layer on the CPU: input projection
// in chunks of steps, then step by step a product with the panels of
// w_hh and the cell on the result while it is in the first cache.
//
// Each worker owns rows of the batch or panels of units (share.h); with units it meets the others
// once a step, because the next product reads all of h. h lives in two buffers, written in turn, so
// that one barrier a step is enough.
#pragma once

#include "forward_base.h"
#include "staged_forward.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class Format>
class ForwardPass : public ForwardBase<Format> {
  using Base = ForwardBase<Format>;
  using Base::args_, Base::s_, Base::worker_, Base::chunk_rows_, Base::gates_, Base::mine_,
      Base::gx_, Base::gx_row_, Base::own_before_, Base::panel_by_panel_, Base::kLanes;
  using typename Base::tensor_t, typename Base::acc_t, typename Base::Operand;
  static constexpr CellShape kShape = shape_of<Cell>();

 public:
  ForwardPass(const ForwardArgs<tensor_t>& args, const Choice& choice,
              const ForwardScratch<Format>& scratch, const Worker& worker)
      : Base(kShape, args, choice, scratch, worker) {
    planes_ = kShape.planes + (args.w_hr ? 1 : 0);
    static thread_local unsigned calls = 0;
    sweep_ = ++calls;
  }

  void run() {
    this->pack();
    if constexpr (kHasStages<Cell>) StagedForward<Cell, Format>(args_, s_).pack(worker_);
    this->start_states();
    // Weights of a batch split are packed by all; h0 of a unit split is written by all.
    barrier(worker_);
    const bool down = args_.reverse;
    Range chunk{0, 0};
    int current = 0;
    for (int64_t step = 0; step < args_.seq_len; ++step) {
      const int64_t t = down ? args_.seq_len - 1 - step : step;
      if (step == 0 || t < chunk.begin || t >= chunk.end) {
        note_done(args_.done, worker_, step);
        chunk = chunk_of(args_, t, down, chunk_rows_);
        wait_for(args_.leader, worker_, step + chunk.size());
        this->count_rows(chunk);
        if (!panel_by_panel_) this->project_inputs(chunk);
        if constexpr (kNormsGates<Cell>) norm_inputs(chunk);
      }
      if (args_.reset) this->reset_states(t, s_.h[current]);
      const int64_t first = own_before_[t - chunk.begin];
      if constexpr (kHasStages<Cell>)
        staged_step(t, first, s_.h[current], s_.h[1 - current]);
      else
        recurrent_step(t, first, s_.h[current], s_.h[1 - current]);
      if (args_.w_hr) {
        this->share_units();
        this->project_hidden(t, s_.h[1 - current]);
      }
      if (Cell::kRecurrence == Recurrence::kDense) this->share_units();
      current = 1 - current;
    }
    note_done(args_.done, worker_, args_.seq_len);
    if constexpr (!std::is_same_v<acc_t, tensor_t>) this->write_inner_states();
  }

 private:
  // Rows of a tile of the loop: its products stay in the first cache until the cell has read them.
  static constexpr int kTileRows = Format::kDot ? kDotRows : kMaxRows;
  using V = vector_of<acc_t>;
  // Where a panel has one vector of a gate, the pairs of the cell are of two rows.
  static constexpr bool kPairsOfRows = Cell::kGates > 1;

  void norm_inputs(Range chunk) {
    const int64_t b = mine_.rows.begin;
    for (int64_t t = chunk.begin; t < chunk.end; ++t)
      StagedForward<Cell, Format>(args_, s_).norm_inputs(
          t, {b, b + this->own_rows(t)}, gx_ + own_before_[t - chunk.begin] * gx_row_);
  }

  // Step t of a cell with stages, whose workers own rows.
  void staged_step(int64_t t, int64_t first, const acc_t* h, acc_t* h_next) {
    const int64_t count = this->own_rows(t), b = mine_.rows.begin;
    if (count > 0)
      StagedForward<Cell, Format>(args_, s_).step(t, {b, b + count}, gx_ + first * gx_row_, h,
                                                  h_next, sweep_++ % 2);
  }

  // Step t: for each tile of rows and panel, gh = h . w_hh^T + b_hh, then the cell.
  void recurrent_step(int64_t t, int64_t first, const acc_t* h, acc_t* h_next) {
    const int64_t count = this->own_rows(t);
    if (count <= 0) return;
    Operand a{};
    if constexpr (Cell::kRecurrence == Recurrence::kDense)
      a = this->operand_of(this->entering(h, count), s_.h_row, count, args_.output_size);
    alignas(64) acc_t gh[kTileRows][kMaxVectors * kLanes];
    for (int64_t i = 0; i < mine_.panels.size(); ++i) {
      // There and back: what was read last, by the last step or call, is still in the cache.
      const int64_t p = sweep_ % 2 ? mine_.panels.end - 1 - i : mine_.panels.begin + i;
      if (panel_by_panel_) this->project_panel(p, {t, t + 1});
      const int limit = Format::kDot ? kTileRows : tile_rows(gates_.vectors(p));
      for_row_tiles(count, limit, [&](int64_t row, int height) {
        const int64_t b = mine_.rows.begin + row;
        const acc_t* gx = gx_ + (first + row) * gx_row_ + gates_.offset(p);
        fetch_rows(p, first_row(args_, t) + b, b, height, gx);
        if constexpr (Cell::kRecurrence == Recurrence::kDense) {
          this->gate_product(p, height, args_.output_size,
                             {a.rows + row * a.row, a.row, a.scales ? a.scales + row : nullptr},
                             s_.w_hh, args_.w_hh, args_.b_hh ? s_.b_hh : nullptr, &gh[0][0],
                             kMaxVectors * kLanes);
        } else if constexpr (Cell::kRecurrence == Recurrence::kDiagonal) {
          diagonal_product(p, height, h + b * s_.h_row, gh);
        }
        int r = 0;
        if constexpr (kPairsOfRows)
          for (; r + 1 < height; r += 2)
            cell_rows<2>(p, t, b + r, gx + r * gx_row_, gh[r], h, h_next);
        for (; r < height; ++r) cell_rows<1>(p, t, b + r, gx + r * gx_row_, gh[r], h, h_next);
      });
    }
    ++sweep_;
  }

  // Asks for the lines that the cell will read and write behind this product, so that it does not
  // wait for them: their rows lie a page apart, where no processor guesses them.
  void fetch_rows(int64_t p, int64_t row, int64_t b, int height, const acc_t* gx) {
    const int64_t unit = gates_.first(p);
    for (int r = 0; r < height; ++r) {
      for (int v = 0; v < gates_.vectors(p); ++v)
        __builtin_prefetch(gx + r * gx_row_ + v * kLanes, 0);
      for (int k = 1; k < Cell::kStates; ++k)
        __builtin_prefetch(this->inner_state(k, b + r) + unit, 1);
    }
    if (!args_.saved) return;
    const acc_t* line = args_.saved + row * planes_ * args_.hidden_size + unit;
    for (int i = 0; i < height * planes_; ++i) __builtin_prefetch(line + i * args_.hidden_size, 1);
  }

  void diagonal_product(int64_t p, int height, const acc_t* h,
                        acc_t (&gh)[kTileRows][kMaxVectors * kLanes]) {
    for (int v = 0; v < gates_.vectors(p); ++v) {
      const int64_t unit = gates_.first(p) + v * kLanes, left = args_.hidden_size - unit;
      const V u = load_wide_part(args_.w_hh + unit, left);
      const V bias = args_.b_hh ? load_wide_part(args_.b_hh + unit, left) : V{};
      for (int r = 0; r < height; ++r)
        store(&gh[r][v * kLanes], bias + u * load(h + r * s_.h_row + unit));
    }
  }

  // The cell for one row or two and the units of one panel; writes the new states, y and what
  // backward needs.
  template <int kRows>
  void cell_rows(int64_t p, int64_t t, int64_t b, const acc_t* gx, const acc_t* gh, const acc_t* h,
                 acc_t* h_next) {
    const int64_t row = first_row(args_, t) + b;
    bool last[kRows];
    for (int r = 0; r < kRows; ++r) last[r] = is_last(args_, t, b + r);
    const int vectors = gates_.vectors_per_gate(p);
    for (int v = 0; v < vectors; ++v) {
      const int64_t left = args_.hidden_size - gates_.first(p) - v * kLanes;
      if constexpr (!kPairsOfRows)
        if (v + 1 < vectors && left >= 2 * kLanes) {
          cell_vectors<true, kRows, 2>(p, v++, row, b, last, gx, gh, h, h_next);
          continue;
        }
      if (left >= kLanes) {
        cell_vectors<true, kRows, 1>(p, v, row, b, last, gx, gh, h, h_next);
        continue;
      }
      // One row at a time: of pairs that are not whole there is no code.
      for (int r = 0; r < kRows; ++r)
        last_vector(p, v, row + r, b + r, last[r], gx + r * gx_row_, gh + r * kMaxVectors * kLanes,
                    h, h_next);
    }
  }
  __attribute__((noinline)) void last_vector(int64_t p, int v, int64_t row, int64_t b, bool last,
                                             const acc_t* gx, const acc_t* gh, const acc_t* h,
                                             acc_t* h_next) {
    cell_vectors<false, 1, 1>(p, v, row, b, {last}, gx, gh, h, h_next);
  }

  // One vector or a pair: of two rows, or side by side in one. kWhole: it ends within the layer, so
  // that its loads and stores need no count.
  template <bool kWhole, int kRows, int kSide>
  RNNFAST_HD void cell_vectors(int64_t p, int v, int64_t row, int64_t b, const bool (&last)[kRows],
                               const acc_t* gx, const acc_t* gh, const acc_t* h, acc_t* h_next) {
    static_assert(kRows == 1 || kSide == 1, "a pair has two vectors");
    using W = std::conditional_t<kRows * kSide == 2, pair_of<acc_t>, V>;
    const int per_gate = gates_.vectors_per_gate(p);
    const int64_t unit = gates_.first(p) + v * kLanes;
    const int64_t left = kWhole ? kLanes : args_.hidden_size - unit;
    // `count` lanes of the vector, or of each of the pair, in rows `stride` apart.
    const auto take = [&](const acc_t* from, int64_t stride, int64_t count) {
      V part[kRows * kSide];
      RNNFAST_UNROLL
      for (int i = 0; i < kRows * kSide; ++i)
        part[i] = load_part(from + (kRows == 2 ? i * stride : i * kLanes), count);
      W values;
      __builtin_memcpy(&values, part, sizeof(values));
      return values;
    };
    const auto put = [&](auto* to, int64_t stride, int64_t count, W values) {
      V part[kRows * kSide];
      __builtin_memcpy(part, &values, sizeof(values));
      RNNFAST_UNROLL
      for (int i = 0; i < kRows * kSide; ++i)
        store_narrow_part(to + (kRows == 2 ? i * stride : i * kLanes), part[i], count);
    };

    W gates_x[Cell::kGates], gates_h[Cell::kGates], state[Cell::kStates];
    W kept[at_least_one<Cell::kSaved>];
    RNNFAST_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) {
      // Whole vectors: panels and h are padded.
      const int64_t at = (g * per_gate + v) * kLanes;
      gates_x[g] = take(gx + at, gx_row_, kLanes);
      if constexpr (Cell::kRecurrence != Recurrence::kNone)
        gates_h[g] = take(gh + at, kMaxVectors * kLanes, kLanes);
      else
        gates_h[g] = args_.b_hh ? take(s_.b_hh + gates_.offset(p) + at, 0, kLanes) : W{};
    }
    state[0] = args_.w_hr ? W{} : take(h + b * s_.h_row + unit, s_.h_row, kLanes);
    RNNFAST_UNROLL
    for (int k = 1; k < Cell::kStates; ++k)
      state[k] = take(this->inner_state(k, b) + unit, args_.hidden_size, left);

    W params[at_least_one<kParametersOf<Cell>>] = {};
    RNNFAST_UNROLL
    for (int k = 0; k < kParametersOf<Cell>; ++k)
      if (args_.b_hh) params[k] = parameter<W, kSide>(k, unit, left);

    if constexpr (kKeepsOf<Cell>) {
      W keep[Cell::kStates];
      RNNFAST_UNROLL
      for (int s = 0; s < Cell::kStates; ++s) {
        V part[kRows * kSide];
        RNNFAST_UNROLL
        for (int i = 0; i < kRows * kSide; ++i)
          part[i] = kept_part<acc_t>(args_, Cell::kStates, row + (kRows == 2 ? i : 0), s,
                                     unit + (kRows == 2 ? 0 : i * kLanes), left);
        __builtin_memcpy(&keep[s], part, sizeof(part));
      }
      cell_.forward(keep, gates_x, gates_h, state, kept);
    } else {
      cell_forward(cell_, params, gates_x, gates_h, state, kept);
    }

    RNNFAST_UNROLL
    for (int k = 1; k < Cell::kStates; ++k)
      put(this->inner_state(k, b) + unit, args_.hidden_size, left, state[k]);
    if (args_.saved) {
      const int64_t stride = planes_ * args_.hidden_size;
      acc_t* plane = args_.saved + row * stride + unit;
      RNNFAST_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k, plane += args_.hidden_size)
        put(plane, stride, left, kept[k]);
      RNNFAST_UNROLL
      for (int k = 1; k < Cell::kStates; ++k, plane += args_.hidden_size)
        put(plane, stride, left, state[k]);
      if (args_.w_hr) put(plane, stride, left, state[0]);
    }
    if (args_.w_hr) {
      put(s_.m + b * s_.m_row + unit, s_.m_row, kLanes, state[0]);
      return;
    }
    put(h_next + b * s_.h_row + unit, s_.h_row, kLanes, state[0]);
    if (args_.y) put(args_.y + row * args_.output_size + unit, args_.output_size, left, state[0]);
    for (int r = 0; r < kRows; ++r) {
      if (!last[r]) continue;
      V part[kRows * kSide];
      __builtin_memcpy(part, &state[0], sizeof(state[0]));
      for (int i = 0; i < kSide; ++i)
        store_narrow_part(args_.h_n + (b + r) * args_.output_size + unit + i * kLanes,
                          part[r * kSide + i], left);
    }
  }

  // The k-th parameter of the units of a vector, or of a pair: the same ones for two rows.
  template <class W, int kSide>
  RNNFAST_HD W parameter(int k, int64_t unit, int64_t left) const {
    const tensor_t* from = args_.b_hh + (Cell::kGates + k) * args_.hidden_size + unit;
    V part[sizeof(W) / sizeof(V)];
    RNNFAST_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(W) / sizeof(V)); ++i)
      part[i] = load_wide_part(from + (kSide == 2 ? i * kLanes : 0), left);
    W values;
    __builtin_memcpy(&values, part, sizeof(values));
    return values;
  }

  const Cell cell_ = make_cell<Cell>(args_.options);
  int planes_;
  unsigned sweep_;  // odd ones run over the panels backwards; no result depends on it
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
