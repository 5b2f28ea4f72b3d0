// Forward of one direction of one layer on the CPU: input projection
// in chunks of steps, then step by step a product with the panels of
// w_hh and the cell on the result while it is in the first cache.
//
// Each worker owns rows of the batch or panels of units (share.h); with units it meets the others
// once a step, because the next product reads all of h. h lives in two buffers, written in turn, so
// that one barrier a step is enough.
#pragma once

#include "packed_layout.h"
#include "share.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Format>
struct ForwardScratch {
  using acc_t = typename Format::acc_t;
  using weight_t = typename Format::weight_t;
  using operand_t = typename Format::operand_t;
  PackedMatrix<Format> w_ih, w_hh, w_hr;  // panels null where the direct kernel runs
  weight_t *w_ih_out, *w_hh_out, *w_hr_out;
  acc_t *b_ih, *b_hh;
  acc_t* gx;    // (chunk rows, panels) in panel order
  acc_t* h[2];  // (B, h_row)
  acc_t* m;     // (B, m_row): h before the projection
  acc_t* c;     // (S-1, B, H): inner states, c_n itself where that has the type
  // Rows as products want them, for each worker: of a chunk of x, of h or m.
  operand_t *x_rows, *h_rows;
  float *x_scales, *h_scales;
  int64_t h_row, m_row, gx_size, x_size, h_size, x_scales_size;
};

template <class Cell, class Format>
ForwardScratch<Format> forward_scratch(const ForwardArgs<typename Format::tensor_t>& args,
                                       const Choice& choice, Arena& arena) {
  using acc_t = typename Format::acc_t;
  using weight_t = typename Format::weight_t;
  constexpr int64_t lanes = lanes_of<acc_t>;
  const PackedLayout<Cell, Format> sizes(args.input_size, args.hidden_size, args.output_size,
                                         args.w_hr != nullptr);
  ForwardScratch<Format> s{};
  s.h_row = divide_up(args.output_size, lanes) * lanes + lanes;
  s.m_row = divide_up(args.hidden_size, lanes) * lanes + lanes;
  if (args.packed) {
    s.w_ih = sizes.matrix(args.packed, sizes.ih);
    if (sizes.hh.elements) s.w_hh = sizes.matrix(args.packed, sizes.hh);
    if (sizes.hr.elements) s.w_hr = sizes.matrix(args.packed, sizes.hr);
  } else {
    if (choice.kernel_ih == Kernel::kPacked)
      s.w_ih.panels = s.w_ih_out = arena.take<weight_t>(sizes.ih.elements);
    if (choice.kernel_hh == Kernel::kPacked) {
      s.w_hh.panels = s.w_hh_out = arena.take<weight_t>(sizes.hh.elements);
      if (args.w_hr) s.w_hr.panels = s.w_hr_out = arena.take<weight_t>(sizes.hr.elements);
    }
  }
  s.w_ih.dot = args.dot_ih;
  s.w_hh.dot = s.w_hr.dot = args.dot_hh;
  s.b_ih = arena.take<acc_t>(sizes.gates.padded());
  s.b_hh = arena.take<acc_t>(sizes.gates.padded());
  // Workers that own rows are not always in the same chunk: each has a gx of its own.
  const int64_t chunk_rows = chunk_capacity(args.rows, args.batch, choice.chunk_rows);
  s.gx_size = chunk_rows * sizes.gates.padded();
  s.gx = arena.take<acc_t>(s.gx_size * (choice.split == Split::kBatch ? choice.threads : 1));
  s.h[0] = arena.take<acc_t>(args.batch * s.h_row);
  s.h[1] = arena.take<acc_t>(args.batch * s.h_row);
  if (args.w_hr) s.m = arena.take<acc_t>(args.batch * s.m_row);
  if constexpr (std::is_same_v<acc_t, typename Format::tensor_t>)
    s.c = args.c_n;
  else
    s.c = arena.take<acc_t>((Cell::kStates - 1) * args.batch * args.hidden_size);
  if constexpr (converts_hidden<Format>) {
    s.x_size = chunk_rows * operand_row<Format>(args.input_size);
    s.h_size = args.batch * operand_row<Format>(larger(args.hidden_size, args.output_size));
    s.x_rows = arena.take<typename Format::operand_t>(s.x_size * choice.threads);
    s.h_rows = arena.take<typename Format::operand_t>(s.h_size * choice.threads);
    s.x_scales_size = chunk_rows;
    s.x_scales = arena.take<float>(chunk_rows * choice.threads);
    s.h_scales = arena.take<float>(args.batch * choice.threads);
  }
  return s;
}

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
        gates_{args.hidden_size, Cell::kGates},
        outputs_{args.output_size, 1},
        mine_(share_of(args, choice, worker, gates_, outputs_)) {
    gx_row_ = gates_.padded();
    gx_ = scratch.gx + (mine_.by_units ? 0 : worker.index * scratch.gx_size);
    planes_ = Cell::kSaved + Cell::kStates - 1 + (args.w_hr ? 1 : 0);
    panel_by_panel_ = args.seq_len == 1 && inputs_in_place();
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
      }
      if (args_.reset) reset_states(t, s_.h[current]);
      recurrent_step(t, own_before_[t - chunk.begin], s_.h[current], s_.h[1 - current]);
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
        if (s_.w_hh_out)
          pack_weights<Format>(gates_, p, args_.output_size, args_.w_hh, s_.w_hh_out);
      }
      if (args_.b_ih) pack_bias(gates_, p, args_.b_ih, s_.b_ih);
      if (args_.b_hh && Cell::kRecurrence == Recurrence::kDense)
        pack_bias(gates_, p, args_.b_hh, s_.b_hh);
    }
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
    const Range units = columns_of(gates_, mine_.panels);
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
    const Range units = columns_of(gates_, mine_.panels);
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
    const Range units = columns_of(gates_, mine_.panels);
    for (int64_t k = 0; k < Cell::kStates - 1; ++k)
      for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
        const int64_t at = (k * args_.batch + b) * args_.hidden_size;
        convert(units.size(), s_.c + at + units.begin, args_.c_n + at + units.begin);
      }
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

  // `count` rows of x into rows first, first + every, ... of gx.
  void input_product(int64_t p, const Operand& x, int64_t count, int64_t first, int64_t every) {
    gate_product(p, count, args_.input_size, x, s_.w_ih, args_.w_ih, args_.b_ih ? s_.b_ih : nullptr,
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
      for (int g = 0; g < Cell::kGates; ++g)
        multiply_direct(rows, gates_.valid(p), k_size, a.rows, a.row,
                        plain + (g * args_.hidden_size + unit) * k_size, k_size,
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

  // Step t: for each tile of rows and panel, gh = h . w_hh^T + b_hh, then the cell.
  void recurrent_step(int64_t t, int64_t first, const acc_t* h, acc_t* h_next) {
    const int64_t count = own_rows(t);
    if (count <= 0) return;
    Operand a{};
    if constexpr (Cell::kRecurrence == Recurrence::kDense)
      a = operand_of(h + mine_.rows.begin * s_.h_row, s_.h_row, count, args_.output_size);
    alignas(64) acc_t gh[kTileRows][kMaxVectors * kLanes];
    for (int64_t i = 0; i < mine_.panels.size(); ++i) {
      // There and back: what was read last, by the last step or call, is still in the cache.
      const int64_t p = sweep_ % 2 ? mine_.panels.end - 1 - i : mine_.panels.begin + i;
      if (panel_by_panel_) project_panel(p, {t, t + 1});
      const int limit = Format::kDot ? kTileRows : max_rows(gates_.vectors(p));
      for_row_tiles(count, limit, [&](int64_t row, int height) {
        const int64_t b = mine_.rows.begin + row;
        fetch_saved(p, first_row(args_, t) + b, height);
        if constexpr (Cell::kRecurrence == Recurrence::kDense) {
          gate_product(p, height, args_.output_size,
                       {a.rows + row * a.row, a.row, a.scales ? a.scales + row : nullptr}, s_.w_hh,
                       args_.w_hh, args_.b_hh ? s_.b_hh : nullptr, &gh[0][0], kMaxVectors * kLanes);
        } else {
          diagonal_product(p, height, h + b * s_.h_row, gh);
        }
        for (int r = 0; r < height; ++r)
          cell_row(p, t, b + r, gx_ + (first + row + r) * gx_row_ + gates_.offset(p), gh[r], h,
                   h_next);
      });
    }
    ++sweep_;
  }

  // Asks for the lines that the cell will write behind this
  // product, so that its stores do not wait for memory.
  void fetch_saved(int64_t p, int64_t row, int height) {
    if (!args_.saved) return;
    const acc_t* line = args_.saved + row * planes_ * args_.hidden_size + gates_.first(p);
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

  // The cell for one row and the units of one panel; writes the new states, y and what backward
  // needs.
  void cell_row(int64_t p, int64_t t, int64_t b, const acc_t* gx, const acc_t* gh, const acc_t* h,
                acc_t* h_next) {
    const bool last = is_last(t, b);
    for (int v = 0; v < gates_.vectors_per_gate(p); ++v) {
      if (gates_.first(p) + (v + 1) * kLanes <= args_.hidden_size)
        cell_vector<true>(p, v, first_row(args_, t) + b, b, last, gx, gh, h, h_next);
      else
        cell_vector<false>(p, v, first_row(args_, t) + b, b, last, gx, gh, h, h_next);
    }
  }

  // kWhole: the vector ends within the layer, so that its loads and stores need no count.
  template <bool kWhole>
  RNNFAST_HD void cell_vector(int64_t p, int v, int64_t row, int64_t b, bool last, const acc_t* gx,
                              const acc_t* gh, const acc_t* h, acc_t* h_next) {
    const int per_gate = gates_.vectors_per_gate(p);
    const int64_t unit = gates_.first(p) + v * kLanes;
    const int64_t left = kWhole ? kLanes : args_.hidden_size - unit;
    V gates_x[Cell::kGates], gates_h[Cell::kGates], state[Cell::kStates];
    V kept[at_least_one<Cell::kSaved>];
    RNNFAST_UNROLL
    for (int g = 0; g < Cell::kGates; ++g) {
      gates_x[g] = load(gx + (g * per_gate + v) * kLanes);
      gates_h[g] = load(gh + (g * per_gate + v) * kLanes);
    }
    state[0] = args_.w_hr ? V{} : load(h + b * s_.h_row + unit);
    RNNFAST_UNROLL
    for (int k = 1; k < Cell::kStates; ++k) state[k] = load_part(inner_state(k, b) + unit, left);

    Cell::forward(gates_x, gates_h, state, kept);

    RNNFAST_UNROLL

    for (int k = 1; k < Cell::kStates; ++k) store_part(inner_state(k, b) + unit, state[k], left);
    if (args_.saved) {
      acc_t* plane = args_.saved + row * planes_ * args_.hidden_size + unit;
      RNNFAST_UNROLL
      for (int k = 0; k < Cell::kSaved; ++k, plane += args_.hidden_size)
        store_part(plane, kept[k], left);
      RNNFAST_UNROLL
      for (int k = 1; k < Cell::kStates; ++k, plane += args_.hidden_size)
        store_part(plane, state[k], left);
      if (args_.w_hr) store_part(plane, state[0], left);
    }
    if (args_.w_hr) {
      store(s_.m + b * s_.m_row + unit, state[0]);
    } else {
      store(h_next + b * s_.h_row + unit, state[0]);
      store_narrow_part(args_.y + row * args_.output_size + unit, state[0], left);
      if (last) store_narrow_part(args_.h_n + b * args_.output_size + unit, state[0], left);
    }
  }

  acc_t* inner_state(int k, int64_t b) const {
    return s_.c + ((k - 1) * args_.batch + b) * args_.hidden_size;
  }

  // Whether row b has no step after t.
  bool is_last(int64_t t, int64_t b) const {
    const int64_t next = args_.reverse ? t - 1 : t + 1;
    return next < 0 || next >= args_.seq_len || b >= active(args_, next);
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
        convert(valid, out + r * s_.h_row, args_.y + (first_row(args_, t) + b) * outputs + column);
        if (is_last(t, b)) convert(valid, out + r * s_.h_row, args_.h_n + b * outputs + column);
      }
    }
  }

  const ForwardArgs<tensor_t>& args_;
  const ForwardScratch<Format>& s_;
  const Worker worker_;
  const int64_t chunk_rows_;
  const Panels<acc_t> gates_, outputs_;
  const Share mine_;
  int64_t gx_row_;
  acc_t* gx_;
  int planes_;
  bool panel_by_panel_;  // a single step: the weights of a panel are read together
  unsigned sweep_;       // odd ones run over the panels backwards; no result depends on it
  int64_t own_before_[kForwardChunkRows + 1];  // a step has a row at least
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
