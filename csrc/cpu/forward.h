// Forward of one direction of one layer on the CPU: input projection
// in chunks of steps, then step by step a product with the panels of
// w_hh and the cell on the result while it is in the first cache.
//
// Each worker owns rows of the batch or panels of units (share.h); with units it meets the others
// once a step, because the next product reads all of h. h lives in two buffers, written in turn, so
// that one barrier a step is enough.
#pragma once

#include "share.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

constexpr int64_t kForwardChunkRows = 128;  // gx of a chunk stays in the second cache

template <class scalar_t>
struct ForwardScratch {
  const scalar_t *w_ih, *w_hh, *w_hr;  // packed, or null where the direct kernel runs
  scalar_t *w_ih_out, *w_hh_out, *w_hr_out, *b_ih, *b_hh;
  scalar_t* gx;    // (chunk rows, panels) in panel order
  scalar_t* h[2];  // (B, h_row)
  scalar_t* m;     // (B, m_row): h before the projection
  int64_t h_row, m_row, gx_size;
};

// Sizes of the packed weights, in this order, in one buffer: w_ih, w_hh, w_hr.
template <class Cell, class scalar_t>
struct PackedLayout {
  Panels<scalar_t> gates, outputs;
  int64_t w_ih, w_hh, w_hr;  // elements

  RNNFAST_HD PackedLayout(int64_t input_size, int64_t hidden_size, int64_t output_size,
                          bool projection)
      : gates{hidden_size, Cell::kGates}, outputs{output_size, 1} {
    w_ih = gates.padded() * input_size;
    w_hh = Cell::kRecurrence == Recurrence::kDense ? gates.padded() * output_size : 0;
    w_hr = projection ? outputs.padded() * hidden_size : 0;
  }
};

template <class Cell, class scalar_t>
ForwardScratch<scalar_t> forward_scratch(const ForwardArgs<scalar_t>& args, const Choice& choice,
                                         Arena& arena) {
  constexpr int64_t lanes = lanes_of<scalar_t>;
  const PackedLayout<Cell, scalar_t> sizes(args.input_size, args.hidden_size, args.output_size,
                                           args.w_hr != nullptr);
  ForwardScratch<scalar_t> s{};
  s.h_row = divide_up(args.output_size, lanes) * lanes + lanes;
  s.m_row = divide_up(args.hidden_size, lanes) * lanes + lanes;
  if (args.packed) {
    s.w_ih = args.packed;
    if (sizes.w_hh) s.w_hh = s.w_ih + sizes.w_ih;
    if (sizes.w_hr) s.w_hr = s.w_ih + sizes.w_ih + sizes.w_hh;
  } else {
    if (choice.kernel_ih == Kernel::kPacked) s.w_ih = s.w_ih_out = arena.take<scalar_t>(sizes.w_ih);
    if (choice.kernel_hh == Kernel::kPacked) {
      s.w_hh = s.w_hh_out = arena.take<scalar_t>(sizes.w_hh);
      if (args.w_hr) s.w_hr = s.w_hr_out = arena.take<scalar_t>(sizes.w_hr);
    }
  }
  s.b_ih = arena.take<scalar_t>(sizes.gates.padded());
  s.b_hh = arena.take<scalar_t>(sizes.gates.padded());
  // Workers that own rows are not always in the same chunk: each has a gx of its own.
  s.gx_size = chunk_capacity(args.rows, args.batch, kForwardChunkRows) * sizes.gates.padded();
  s.gx = arena.take<scalar_t>(s.gx_size * (choice.split == Split::kBatch ? choice.threads : 1));
  s.h[0] = arena.take<scalar_t>(args.batch * s.h_row);
  s.h[1] = arena.take<scalar_t>(args.batch * s.h_row);
  if (args.w_hr) s.m = arena.take<scalar_t>(args.batch * s.m_row);
  return s;
}

template <class Cell, class scalar_t>
class ForwardPass {
 public:
  ForwardPass(const ForwardArgs<scalar_t>& args, const Choice& choice,
              const ForwardScratch<scalar_t>& scratch, const Worker& worker)
      : args_(args),
        s_(scratch),
        worker_(worker),
        gates_{args.hidden_size, Cell::kGates},
        outputs_{args.output_size, 1},
        mine_(share_of(args, choice, worker, gates_, outputs_)) {
    gx_row_ = gates_.padded();
    gx_ = scratch.gx + (mine_.by_units ? 0 : worker.index * scratch.gx_size);
    planes_ = Cell::kSaved + Cell::kStates - 1 + (args.w_hr ? 1 : 0);
  }

  void run() {
    pack_weights();
    start_states();
    // Weights of a batch split are packed by all; h0 of a unit split is written by all.
    barrier(worker_);
    const bool down = args_.reverse;
    Range chunk{0, 0};
    int current = 0;
    for (int64_t step = 0; step < args_.seq_len; ++step) {
      const int64_t t = down ? args_.seq_len - 1 - step : step;
      if (step == 0 || t < chunk.begin || t >= chunk.end) {
        chunk = chunk_of(args_, t, down, kForwardChunkRows);
        project_inputs(chunk);
      }
      recurrent_step(t, chunk.begin, s_.h[current], s_.h[1 - current]);
      if (args_.w_hr) {
        share_units();
        project_hidden(t, s_.h[1 - current]);
      }
      if (Cell::kRecurrence == Recurrence::kDense) share_units();
      current = 1 - current;
    }
  }

 private:
  static constexpr int64_t kLanes = lanes_of<scalar_t>;
  using V = vector_of<scalar_t>;

  // What this step wrote is read by workers that own other
  // units; workers that own rows read only their own.
  void share_units() {
    if (mine_.by_units) barrier(worker_);
  }

  // Own panels when panels are divided; a share of all panels when rows are.
  void pack_weights() {
    const Range packs =
        mine_.by_units ? mine_.panels : part_of(gates_.count(), worker_.index, worker_.count);
    for (int64_t p = packs.begin; p < packs.end; ++p) {
      if (s_.w_ih_out) pack_units(gates_, p, args_.input_size, args_.w_ih, s_.w_ih_out);
      if (s_.w_hh_out) pack_units(gates_, p, args_.output_size, args_.w_hh, s_.w_hh_out);
      if (s_.w_ih && args_.b_ih) pack_bias(gates_, p, args_.b_ih, s_.b_ih);
      if (s_.w_hh && args_.b_hh) pack_bias(gates_, p, args_.b_hh, s_.b_hh);
    }
    const Range mine_out = mine_.by_units ? mine_.output_panels
                                          : part_of(outputs_.count(), worker_.index, worker_.count);
    if (s_.w_hr_out)
      for (int64_t p = mine_out.begin; p < mine_out.end; ++p)
        pack_units(outputs_, p, args_.hidden_size, args_.w_hr, s_.w_hr_out);
  }

  // h0 goes to both buffers: a row that enters late
  // (packed, reverse) finds it in whichever is current.
  void start_states() {
    const Range units = columns_of(gates_, mine_.panels);
    const Range outputs = args_.w_hr ? columns_of(outputs_, mine_.output_panels) : units;
    for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
      for (int64_t u = outputs.begin; u < outputs.end; ++u)
        s_.h[0][b * s_.h_row + u] = s_.h[1][b * s_.h_row + u] =
            args_.h0 ? args_.h0[b * args_.output_size + u] : scalar_t(0);
      for (int64_t k = 0; k < Cell::kStates - 1; ++k) {
        const int64_t at = (k * args_.batch + b) * args_.hidden_size;
        for (int64_t u = units.begin; u < units.end; ++u)
          args_.c_n[at + u] = args_.c0 ? args_.c0[at + u] : scalar_t(0);
      }
    }
  }

  // gx = x . w_ih^T + b_ih for the chunk's steps, own rows and panels.
  void project_inputs(Range chunk) {
    for (int64_t p = mine_.panels.begin; p < mine_.panels.end; ++p) {
      const int64_t base = first_row(args_, chunk.begin);
      const int64_t steps = chunk.size(), rows = mine_.rows.size();
      const bool whole = rows == args_.batch;
      const bool even = args_.x.step_stride == args_.batch * args_.x.row_stride;
      if (whole && (args_.batch_sizes || even || args_.batch == 1)) {
        // All rows of the chunk lie at one distance: one product.
        const int64_t stride =
            args_.batch == 1 && !args_.batch_sizes ? args_.x.step_stride : args_.x.row_stride;
        input_product(p, step_of(args_, args_.x, chunk.begin), stride,
                      first_row(args_, chunk.end) - base, 0, 1);
      } else if (!args_.batch_sizes && steps > rows) {
        for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b)
          input_product(p, step_of(args_, args_.x, chunk.begin) + b * args_.x.row_stride,
                        args_.x.step_stride, steps, b, args_.batch);
      } else {
        for (int64_t t = chunk.begin; t < chunk.end; ++t) {
          const int64_t count = smaller(mine_.rows.end, active(args_, t)) - mine_.rows.begin;
          if (count > 0)
            input_product(p, step_of(args_, args_.x, t) + mine_.rows.begin * args_.x.row_stride,
                          args_.x.row_stride, count, first_row(args_, t) - base + mine_.rows.begin,
                          1);
        }
      }
    }
  }

  // `count` rows of x into rows first, first + every, ... of gx.
  void input_product(int64_t p, const scalar_t* x, int64_t x_row, int64_t count, int64_t first,
                     int64_t every) {
    gate_product(p, count, args_.input_size, x, x_row, s_.w_ih, args_.w_ih, args_.b_ih, s_.b_ih,
                 gx_ + first * gx_row_ + gates_.offset(p), every * gx_row_);
  }

  // a . w^T + bias for the gates of panel p, by whichever kernel has its weights.
  void gate_product(int64_t p, int64_t rows, int64_t k_size, const scalar_t* a, int64_t a_row,
                    const scalar_t* packed, const scalar_t* plain, const scalar_t* bias,
                    const scalar_t* packed_bias, scalar_t* out, int64_t out_row) {
    if (packed) {
      const int vectors = gates_.vectors(p);
      multiply(rows, vectors,
               Operands<scalar_t>{k_size, a, a_row, 1, packed + gates_.offset(p) * k_size,
                                  vectors * kLanes, bias ? packed_bias + gates_.offset(p) : nullptr,
                                  0, out, out_row});
      return;
    }
    const int64_t unit = gates_.first(p), width = gates_.vectors_per_gate(p) * kLanes;
    for (int g = 0; g < Cell::kGates; ++g) {
      const int64_t at = g * args_.hidden_size + unit;
      multiply_direct(rows, gates_.valid(p), k_size, a, a_row, plain + at * k_size, k_size,
                      bias ? bias + at : nullptr, out + g * width, out_row);
    }
  }

  // Step t: for each tile of rows and panel, gh = h . w_hh^T + b_hh, then the cell.
  void recurrent_step(int64_t t, int64_t chunk_begin, const scalar_t* h, scalar_t* h_next) {
    const int64_t count = smaller(mine_.rows.end, active(args_, t)) - mine_.rows.begin;
    if (count <= 0) return;
    const scalar_t* gx = gx_ + (first_row(args_, t) - first_row(args_, chunk_begin)) * gx_row_;
    alignas(64) scalar_t gh[kMaxRows][kMaxVectors * kLanes];
    for (int64_t p = mine_.panels.begin; p < mine_.panels.end; ++p) {
      for_row_tiles(count, gates_.vectors(p), [&](int64_t row, int height) {
        const int64_t b = mine_.rows.begin + row;
        fetch_saved(p, first_row(args_, t) + b, height);
        if constexpr (Cell::kRecurrence == Recurrence::kDense) {
          gate_product(p, height, args_.output_size, h + b * s_.h_row, s_.h_row, s_.w_hh,
                       args_.w_hh, args_.b_hh, s_.b_hh, &gh[0][0], kMaxVectors * kLanes);
        } else {
          diagonal_product(p, height, h + b * s_.h_row, gh);
        }
        for (int r = 0; r < height; ++r)
          cell_row(p, t, b + r, gx + (b + r) * gx_row_ + gates_.offset(p), gh[r], h, h_next);
      });
    }
  }

  // Asks for the lines that the cell will write behind this
  // product, so that its stores do not wait for memory.
  void fetch_saved(int64_t p, int64_t row, int height) {
    if (!args_.saved) return;
    const scalar_t* line = args_.saved + row * planes_ * args_.hidden_size + gates_.first(p);
    for (int i = 0; i < height * planes_; ++i) __builtin_prefetch(line + i * args_.hidden_size, 1);
  }

  void diagonal_product(int64_t p, int height, const scalar_t* h,
                        scalar_t (&gh)[kMaxRows][kMaxVectors * kLanes]) {
    for (int v = 0; v < gates_.vectors(p); ++v) {
      const int64_t unit = gates_.first(p) + v * kLanes, left = args_.hidden_size - unit;
      const V u = load_part(args_.w_hh + unit, left);
      const V bias = args_.b_hh ? load_part(args_.b_hh + unit, left) : V{};
      for (int r = 0; r < height; ++r)
        store(&gh[r][v * kLanes], bias + u * load(h + r * s_.h_row + unit));
    }
  }

  // The cell for one row and the units of one panel; writes the new states, y and what backward
  // needs.
  void cell_row(int64_t p, int64_t t, int64_t b, const scalar_t* gx, const scalar_t* gh,
                const scalar_t* h, scalar_t* h_next) {
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
  RNNFAST_HD void cell_vector(int64_t p, int v, int64_t row, int64_t b, bool last,
                              const scalar_t* gx, const scalar_t* gh, const scalar_t* h,
                              scalar_t* h_next) {
    const int per_gate = gates_.vectors_per_gate(p);
    const int64_t unit = gates_.first(p) + v * kLanes;
    const int64_t left = kWhole ? kLanes : args_.hidden_size - unit;
    V gates_x[Cell::kGates], gates_h[Cell::kGates], state[Cell::kStates];
    V kept[at_least_one<Cell::kSaved>];
    for (int g = 0; g < Cell::kGates; ++g) {
      gates_x[g] = load(gx + (g * per_gate + v) * kLanes);
      gates_h[g] = load(gh + (g * per_gate + v) * kLanes);
    }
    state[0] = args_.w_hr ? V{} : load(h + b * s_.h_row + unit);
    for (int k = 1; k < Cell::kStates; ++k) state[k] = load_part(inner_state(k, b) + unit, left);

    Cell::forward(gates_x, gates_h, state, kept);

    for (int k = 1; k < Cell::kStates; ++k) store_part(inner_state(k, b) + unit, state[k], left);
    if (args_.saved) {
      scalar_t* plane = args_.saved + row * planes_ * args_.hidden_size + unit;
      for (int k = 0; k < Cell::kSaved; ++k, plane += args_.hidden_size)
        store_part(plane, kept[k], left);
      for (int k = 1; k < Cell::kStates; ++k, plane += args_.hidden_size)
        store_part(plane, state[k], left);
      if (args_.w_hr) store_part(plane, state[0], left);
    }
    if (args_.w_hr) {
      store(s_.m + b * s_.m_row + unit, state[0]);
    } else {
      store(h_next + b * s_.h_row + unit, state[0]);
      store_part(args_.y + row * args_.output_size + unit, state[0], left);
      if (last) store_part(args_.h_n + b * args_.output_size + unit, state[0], left);
    }
  }

  scalar_t* inner_state(int k, int64_t b) const {
    return args_.c_n + ((k - 1) * args_.batch + b) * args_.hidden_size;
  }

  // Whether row b has no step after t.
  bool is_last(int64_t t, int64_t b) const {
    const int64_t next = args_.reverse ? t - 1 : t + 1;
    return next < 0 || next >= args_.seq_len || b >= active(args_, next);
  }

  // h = m . w_hr^T for the own columns of the output.
  void project_hidden(int64_t t, scalar_t* h_next) {
    const int64_t count = smaller(mine_.rows.end, active(args_, t)) - mine_.rows.begin;
    if (count <= 0) return;
    const int64_t hidden = args_.hidden_size, outputs = args_.output_size;
    const scalar_t* m = s_.m + mine_.rows.begin * s_.m_row;
    for (int64_t p = mine_.output_panels.begin; p < mine_.output_panels.end; ++p) {
      const int64_t column = outputs_.first(p), valid = outputs_.valid(p);
      scalar_t* out = h_next + mine_.rows.begin * s_.h_row + column;
      if (s_.w_hr)
        multiply(count, outputs_.vectors(p),
                 Operands<scalar_t>{hidden, m, s_.m_row, 1, s_.w_hr + outputs_.offset(p) * hidden,
                                    outputs_.vectors(p) * kLanes, nullptr, 0, out, s_.h_row});
      else
        multiply_direct(count, valid, hidden, m, s_.m_row, args_.w_hr + column * hidden, hidden,
                        static_cast<const scalar_t*>(nullptr), out, s_.h_row);
      for (int64_t r = 0; r < count; ++r) {
        const int64_t b = mine_.rows.begin + r;
        scalar_t* y = args_.y + (first_row(args_, t) + b) * outputs + column;
        for (int64_t c = 0; c < valid; ++c) y[c] = out[r * s_.h_row + c];
        if (is_last(t, b))
          for (int64_t c = 0; c < valid; ++c) args_.h_n[b * outputs + column + c] = y[c];
      }
    }
  }

  const ForwardArgs<scalar_t>& args_;
  const ForwardScratch<scalar_t>& s_;
  const Worker worker_;
  const Panels<scalar_t> gates_, outputs_;
  const Share mine_;
  int64_t gx_row_;
  scalar_t* gx_;
  int planes_;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
