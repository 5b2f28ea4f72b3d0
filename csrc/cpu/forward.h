// Forward of one direction of one layer on the CPU: input projection
// in chunks of steps, then step by step a product with the panels of
// w_hh and the cell on the result while it is in the first cache.
//
// Each worker owns rows of the batch or panels of units (share.h); with units it meets the others
// once a step, because the next product reads all of h. h lives in two buffers, written in turn, so
// that one barrier a step is enough.
#pragma once

#include "staged_forward.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class Format>
class ForwardPass {
 public:
  using tensor_t = typename Format::tensor_t;
  using acc_t = typename Format::acc_t;
  using weight_t = typename Format::weight_t;
  using operand_t = typename Format::operand_t;

  ForwardPass(const ForwardArgs<tensor_t>& args, const Choice& choice,
              const ForwardScratch<Format>& scratch, const Worker& worker)
      : args_(args),
        s_(scratch),
        worker_(worker),
        chunk_rows_(choice.chunk_rows),
        gates_(gate_panels<Cell, acc_t>(args.hidden_size)),
        outputs_{args.output_size, 1},
        mine_(share_of(args, choice, worker, gates_, outputs_)) {
    gx_row_ = scratch.gx_row;
    gx_ = scratch.gx + (mine_.by_units ? 0 : worker.index * scratch.gx_size);
    planes_ = Cell::kSaved + Cell::kStates - 1 + (args.w_hr ? 1 : 0);
    panel_by_panel_ = args.seq_len == 1 && inputs_in_place() && !kHasStages<Cell>;
    static thread_local unsigned calls = 0;
    sweep_ = ++calls;
  }

  void run() {
    pack();
    start_states();
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
        count_rows(chunk);
        if (!panel_by_panel_) project_inputs(chunk);
        if constexpr (kNormsGates<Cell>) norm_inputs(chunk);
      }
      if (args_.reset) reset_states(t, s_.h[current]);
      const int64_t first = own_before_[t - chunk.begin];
      if constexpr (kHasStages<Cell>)
        staged_step(t, first, s_.h[current], s_.h[1 - current]);
      else
        recurrent_step(t, first, s_.h[current], s_.h[1 - current]);
      if (args_.w_hr) {
        share_units();
        project_hidden(t, s_.h[1 - current]);
      }
      if (Cell::kRecurrence == Recurrence::kDense) share_units();
      current = 1 - current;
    }
    note_done(args_.done, worker_, args_.seq_len);
    if constexpr (!std::is_same_v<acc_t, tensor_t>) write_inner_states();
  }

 private:
  static constexpr int64_t kLanes = lanes_of<acc_t>;
  // Rows of a tile of the loop: its products stay in the first cache until the cell has read them.
  static constexpr int kTileRows = Format::kDot ? kDotRows : kMaxRows;
  using V = vector_of<acc_t>;
  // Where a panel has one vector of a gate, the pairs of the cell are of two rows.
  static constexpr bool kPairsOfRows = Cell::kGates > 1;

  // Rows that enter a product, and (bytes only) their scales.
  struct Operand {
    const operand_t* rows;
    int64_t row;
    const float* scales;
  };

  // What this step wrote is read by workers that own other
  // units; workers that own rows read only their own.
  void share_units() {
    if (mine_.by_units) barrier(worker_);
  }

  // Own panels when panels are divided; a share of all panels when rows are.
  void pack() {
    const Range packs =
        mine_.by_units ? mine_.panels : part_of(gates_.count(), worker_.index, worker_.count);
    for (int64_t p = packs.begin; p < packs.end; ++p) {
      if constexpr (std::is_same_v<weight_t, tensor_t>) {
        if (s_.w_ih_out) pack_weights<Format>(gates_, p, args_.input_size, args_.w_ih, s_.w_ih_out);
        if (s_.w_hh_out && !kHasStages<Cell>)
          pack_weights<Format>(gates_, p, args_.output_size, args_.w_hh, s_.w_hh_out);
      }
      if (args_.b_ih) pack_bias(gates_, p, args_.b_ih, s_.b_ih);
      if (args_.b_hh && Cell::kRecurrence != Recurrence::kDiagonal)
        pack_bias(gates_, p, args_.b_hh, s_.b_hh);
    }
    if constexpr (kHasStages<Cell>) StagedForward<Cell, Format>(args_, s_).pack(worker_);
    if constexpr (std::is_same_v<weight_t, tensor_t>) {
      const Range mine_out = mine_.by_units
                                 ? mine_.output_panels
                                 : part_of(outputs_.count(), worker_.index, worker_.count);
      if (s_.w_hr_out)
        for (int64_t p = mine_out.begin; p < mine_out.end; ++p)
          pack_weights<Format>(outputs_, p, args_.hidden_size, args_.w_hr, s_.w_hr_out);
    }
  }

  // h0 goes to both buffers: a row that enters late
  // (packed, reverse) finds it in whichever is current.
  void start_states() {
    const Range units = own_units();
    const Range outputs = args_.w_hr ? columns_of(outputs_, mine_.output_panels) : units;
    for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
      for (int64_t u = outputs.begin; u < outputs.end; ++u)
        s_.h[0][b * s_.h_row + u] = s_.h[1][b * s_.h_row + u] =
            args_.h0 ? widen_scalar(args_.h0[b * args_.output_size + u]) : acc_t(0);
      for (int64_t k = 0; k < Cell::kStates - 1; ++k) {
        const int64_t at = (k * args_.batch + b) * args_.hidden_size;
        for (int64_t u = units.begin; u < units.end; ++u)
          s_.c[at + u] = args_.c0 ? widen_scalar(args_.c0[at + u]) : acc_t(0);
      }
    }
  }

  // Zeroes what enters step t in rows that start anew there. Workers that divide the units see the
  // same rows, so that all of them meet, or none.
  void reset_states(int64_t t, acc_t* h) {
    const Range units = own_units();
    const Range outputs = args_.w_hr ? columns_of(outputs_, mine_.output_panels) : units;
    const int64_t end = smaller(mine_.rows.end, active(args_, t));
    bool any = false;
    for (int64_t b = mine_.rows.begin; b < end; ++b) {
      if (!starts_anew(args_, t, b)) continue;
      any = true;
      for (int64_t u = outputs.begin; u < outputs.end; ++u) h[b * s_.h_row + u] = acc_t(0);
      for (int k = 1; k < Cell::kStates; ++k)
        for (int64_t u = units.begin; u < units.end; ++u) inner_state(k, b)[u] = acc_t(0);
    }
    if (any && Cell::kRecurrence == Recurrence::kDense) share_units();
  }

  void write_inner_states() {
    const Range units = own_units();
    for (int64_t k = 0; k < Cell::kStates - 1; ++k)
      for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
        const int64_t at = (k * args_.batch + b) * args_.hidden_size;
        convert(units.size(), s_.c + at + units.begin, args_.c_n + at + units.begin);
      }
  }

  Range own_units() const {
    return kHasStages<Cell> ? Range{0, args_.hidden_size} : columns_of(gates_, mine_.panels);
  }

  int64_t own_rows(int64_t t) const {
    return larger(0, smaller(mine_.rows.end, active(args_, t)) - mine_.rows.begin);
  }

  // gx holds the own rows of a chunk without gaps: how many are before each step.
  void count_rows(Range chunk) {
    own_before_[0] = 0;
    for (int64_t i = 0; i < chunk.size(); ++i)
      own_before_[i + 1] = own_before_[i] + own_rows(chunk.begin + i);
  }

  // gx = x . w_ih^T + b_ih for the chunk's steps, own rows and panels.
  void project_inputs(Range chunk) {
    if (own_before_[chunk.size()] == 0) return;  // all of the own rows have ended
    if (inputs_in_place()) {
      for (int64_t p = mine_.panels.begin; p < mine_.panels.end; ++p) project_panel(p, chunk);
    } else if constexpr (converts_hidden<Format>) {
      const Operand x = convert_inputs(chunk);
      for (int64_t p = mine_.panels.begin; p < mine_.panels.end; ++p)
        input_product(p, x, own_before_[chunk.size()], 0, 1);
    }
  }

  // Groups want whole blocks of k, and their products many rows.
  bool inputs_in_place() const {
    if constexpr (converts_inputs<Format>) return false;
    if (!Format::kDot) return true;
    return args_.input_size == padded_k<Format>(args_.input_size) && inputs_are_even();
  }

  // Whether the own rows of a chunk of x lie at one distance.
  bool inputs_are_even() const {
    return mine_.rows.size() == args_.batch &&
           (args_.batch_sizes || args_.batch == 1 ||
            args_.x.step_stride == args_.batch * args_.x.row_stride);
  }

  // x in place, as few products as its strides allow.
  void project_panel(int64_t p, Range chunk) {
    const int64_t steps = chunk.size(), rows = mine_.rows.size();
    const operand_t* x = reinterpret_cast<const operand_t*>(step_of(args_, args_.x, chunk.begin));
    const int64_t row_stride = args_.x.row_stride, step_stride = args_.x.step_stride;
    if (inputs_are_even()) {
      // All rows of the chunk lie at one distance: one product.
      const int64_t stride = args_.batch == 1 && !args_.batch_sizes ? step_stride : row_stride;
      input_product(p, {x, stride, nullptr}, own_before_[steps], 0, 1);
    } else if (!args_.batch_sizes && steps > rows) {
      for (int64_t b = 0; b < rows; ++b)
        input_product(p, {x + (mine_.rows.begin + b) * row_stride, step_stride, nullptr}, steps, b,
                      rows);
    } else {
      for (int64_t i = 0; i < steps; ++i) {
        const operand_t* from =
            reinterpret_cast<const operand_t*>(step_of(args_, args_.x, chunk.begin + i));
        const int64_t count = own_before_[i + 1] - own_before_[i];
        if (count > 0)
          input_product(p, {from + mine_.rows.begin * row_stride, row_stride, nullptr}, count,
                        own_before_[i], 1);
      }
    }
  }

  Operand convert_inputs(Range chunk) {
    const int64_t row = operand_row<Format>(args_.input_size);
    operand_t* out = s_.x_rows + worker_.index * s_.x_size;
    float* scales = s_.x_scales + worker_.index * s_.x_scales_size;
    for (int64_t t = chunk.begin; t < chunk.end; ++t) {
      const tensor_t* x = step_of(args_, args_.x, t) + mine_.rows.begin * args_.x.row_stride;
      const int64_t first = own_before_[t - chunk.begin];
      for (int64_t r = 0; r < own_before_[t - chunk.begin + 1] - first; ++r)
        to_operand<Format>(args_.input_size, x + r * args_.x.row_stride, out + (first + r) * row,
                           scales + first + r);
    }
    return {out, row, scales};
  }

  // `count` rows from `from` as a product wants them: in place where they are right already.
  Operand operand_of(const acc_t* from, int64_t from_row, int64_t count, int64_t k_size) {
    if constexpr (converts_hidden<Format>) {
      const int64_t row = operand_row<Format>(k_size);
      operand_t* out = s_.h_rows + worker_.index * s_.h_size;
      float* scales = s_.h_scales + worker_.index * args_.batch;
      for (int64_t r = 0; r < count; ++r)
        to_operand<Format>(k_size, from + r * from_row, out + r * row, scales + r);
      return {out, row, scales};
    } else {
      return {from, from_row, nullptr};
    }
  }

  // The own rows of h, of which a mask may drop entries.
  const acc_t* entering(const acc_t* h, int64_t count) {
    const int64_t begin = mine_.rows.begin;
    if (!args_.masks.h_kept) return h + begin * s_.h_row;
    acc_t* rows = s_.h_dropped + worker_.index * args_.batch * s_.h_row;
    for (int64_t r = 0; r < count; ++r)
      drop_h(args_, begin + r, 0, args_.output_size, h + (begin + r) * s_.h_row,
             rows + r * s_.h_row);
    return rows;
  }

  // `count` rows of x into rows first, first + every, ... of gx.
  void input_product(int64_t p, const Operand& x, int64_t count, int64_t first, int64_t every) {
    gate_product(p, count, args_.input_size, x, s_.w_ih, args_.w_ih,
                 args_.b_ih && !kNormsGates<Cell> ? s_.b_ih : nullptr,
                 gx_ + first * gx_row_ + gates_.offset(p), every * gx_row_);
  }

  // a . w^T + bias for the gates of panel p, by whichever kernel has its weights.
  void gate_product(int64_t p, int64_t rows, int64_t k_size, const Operand& a,
                    const PackedMatrix<Format>& packed, const tensor_t* plain, const acc_t* bias,
                    acc_t* out, int64_t out_row) {
    const acc_t* start = bias ? bias + gates_.offset(p) : nullptr;
    if (packed.panels)
      return packed_product(gates_, p, rows, k_size, a, packed, start, out, out_row);
    if constexpr (!Format::kDot) {
      const int64_t unit = gates_.first(p), width = gates_.vectors_per_gate(p) * kLanes;
      for (int g = 0; g < gates_.gates; ++g)
        multiply_direct(rows, gates_.valid(p), k_size, a.rows, a.row,
                        plain + (g * gates_.units + unit) * k_size, k_size,
                        start ? start + g * width : nullptr, out + g * width, out_row);
    }
  }

  void packed_product(const Panels<acc_t>& panels, int64_t p, int64_t rows, int64_t k_size,
                      const Operand& a, const PackedMatrix<Format>& w, const acc_t* start,
                      acc_t* out, int64_t out_row) {
    const int vectors = panels.vectors(p);
    const weight_t* panel = w.panels + panels.offset(p) * padded_k<Format>(k_size);
    if constexpr (Format::kDot) {
      constexpr int64_t kGroupBytes = 4;
      w.dot(rows, vectors,
            {padded_k<Format>(k_size) * static_cast<int64_t>(sizeof(weight_t)) / kDotBlockBytes,
             a.rows, a.row * static_cast<int64_t>(sizeof(operand_t)), panel,
             vectors * kLanes * kGroupBytes, start, 0, out, out_row, a.scales,
             w.scale ? w.scale + panels.offset(p) : nullptr,
             w.sum ? w.sum + panels.offset(p) : nullptr});
    } else {
      multiply(rows, vectors,
               Operands<acc_t, weight_t>{k_size, a.rows, a.row, 1, panel, vectors * kLanes, start,
                                         0, out, out_row});
    }
  }

  void norm_inputs(Range chunk) {
    const int64_t b = mine_.rows.begin;
    for (int64_t t = chunk.begin; t < chunk.end; ++t)
      StagedForward<Cell, Format>(args_, s_).norm_inputs(
          t, {b, b + own_rows(t)}, gx_ + own_before_[t - chunk.begin] * gx_row_);
  }

  // Step t of a cell with stages, whose workers own rows.
  void staged_step(int64_t t, int64_t first, const acc_t* h, acc_t* h_next) {
    const int64_t count = own_rows(t), b = mine_.rows.begin;
    if (count > 0)
      StagedForward<Cell, Format>(args_, s_).step(t, {b, b + count}, gx_ + first * gx_row_, h,
                                                  h_next, sweep_++ % 2);
  }

  // Step t: for each tile of rows and panel, gh = h . w_hh^T + b_hh, then the cell.
  void recurrent_step(int64_t t, int64_t first, const acc_t* h, acc_t* h_next) {
    const int64_t count = own_rows(t);
    if (count <= 0) return;
    Operand a{};
    if constexpr (Cell::kRecurrence == Recurrence::kDense)
      a = operand_of(entering(h, count), s_.h_row, count, args_.output_size);
    alignas(64) acc_t gh[kTileRows][kMaxVectors * kLanes];
    for (int64_t i = 0; i < mine_.panels.size(); ++i) {
      // There and back: what was read last, by the last step or call, is still in the cache.
      const int64_t p = sweep_ % 2 ? mine_.panels.end - 1 - i : mine_.panels.begin + i;
      if (panel_by_panel_) project_panel(p, {t, t + 1});
      const int limit = Format::kDot ? kTileRows : max_rows(gates_.vectors(p));
      for_row_tiles(count, limit, [&](int64_t row, int height) {
        const int64_t b = mine_.rows.begin + row;
        const acc_t* gx = gx_ + (first + row) * gx_row_ + gates_.offset(p);
        fetch_rows(p, first_row(args_, t) + b, b, height, gx);
        if constexpr (Cell::kRecurrence == Recurrence::kDense) {
          gate_product(p, height, args_.output_size,
                       {a.rows + row * a.row, a.row, a.scales ? a.scales + row : nullptr}, s_.w_hh,
                       args_.w_hh, args_.b_hh ? s_.b_hh : nullptr, &gh[0][0], kMaxVectors * kLanes);
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
      for (int k = 1; k < Cell::kStates; ++k) __builtin_prefetch(inner_state(k, b + r) + unit, 1);
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
      if (left >= kLanes)
        cell_vectors<true, kRows, 1>(p, v, row, b, last, gx, gh, h, h_next);
      else
        cell_vectors<false, kRows, 1>(p, v, row, b, last, gx, gh, h, h_next);
    }
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
      state[k] = take(inner_state(k, b) + unit, args_.hidden_size, left);

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
      put(inner_state(k, b) + unit, args_.hidden_size, left, state[k]);
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

  acc_t* inner_state(int k, int64_t b) const {
    return s_.c + ((k - 1) * args_.batch + b) * args_.hidden_size;
  }

  // h = m . w_hr^T for the own columns of the output.
  void project_hidden(int64_t t, acc_t* h_next) {
    const int64_t count = own_rows(t);
    if (count <= 0) return;
    const int64_t hidden = args_.hidden_size, outputs = args_.output_size;
    const Operand m = operand_of(s_.m + mine_.rows.begin * s_.m_row, s_.m_row, count, hidden);
    for (int64_t p = mine_.output_panels.begin; p < mine_.output_panels.end; ++p) {
      const int64_t column = outputs_.first(p), valid = outputs_.valid(p);
      acc_t* out = h_next + mine_.rows.begin * s_.h_row + column;
      if (s_.w_hr.panels) {
        packed_product(outputs_, p, count, hidden, m, s_.w_hr, nullptr, out, s_.h_row);
      } else if constexpr (!Format::kDot) {
        multiply_direct(count, valid, hidden, m.rows, m.row, args_.w_hr + column * hidden, hidden,
                        static_cast<const acc_t*>(nullptr), out, s_.h_row);
      }
      for (int64_t r = 0; r < count; ++r) {
        const int64_t b = mine_.rows.begin + r;
        if (args_.y)
          convert(valid, out + r * s_.h_row,
                  args_.y + (first_row(args_, t) + b) * outputs + column);
        if (is_last(args_, t, b))
          convert(valid, out + r * s_.h_row, args_.h_n + b * outputs + column);
      }
    }
  }

  const ForwardArgs<tensor_t>& args_;
  const ForwardScratch<Format>& s_;
  const Worker worker_;
  const int64_t chunk_rows_;
  const Panels<acc_t> gates_, outputs_;
  const Share mine_;
  const Cell cell_ = make_cell<Cell>(args_.options);
  int64_t gx_row_;
  acc_t* gx_;
  int planes_;
  bool panel_by_panel_;  // a single step: the weights of a panel are read together
  unsigned sweep_;       // odd ones run over the panels backwards; no result depends on it
  int64_t own_before_[kForwardChunkRows + 1];  // a step has a row at least
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
