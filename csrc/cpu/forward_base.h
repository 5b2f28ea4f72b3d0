// What a forward pass does around its cell, compiled once a format: the weights, the states, the
// input side and the products of a chunk of steps, the projection.
#pragma once

#include "forward_scratch.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Format>
class ForwardBase {
 public:
  using tensor_t = typename Format::tensor_t;
  using acc_t = typename Format::acc_t;
  using weight_t = typename Format::weight_t;
  using operand_t = typename Format::operand_t;

  ForwardBase(const CellShape& shape, const ForwardArgs<tensor_t>& args, const Choice& choice,
              const ForwardScratch<Format>& scratch, const Worker& worker)
      : shape_(shape),
        args_(args),
        s_(scratch),
        worker_(worker),
        chunk_rows_(choice.chunk_rows),
        gates_(gate_panels<acc_t>(shape, args.hidden_size, shape.gates)),
        outputs_{args.output_size, 1},
        mine_(share_of(args, choice, worker, gates_, outputs_)) {
    gx_row_ = scratch.gx_row;
    gx_ = scratch.gx + (mine_.by_units ? 0 : worker.index * scratch.gx_size);
    panel_by_panel_ = args.seq_len == 1 && inputs_in_place() && !shape.stages;
  }

 protected:
  static constexpr int64_t kLanes = lanes_of<acc_t>;

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
        if (s_.w_hh_out && !shape_.stages)
          pack_weights<Format>(gates_, p, args_.output_size, args_.w_hh, s_.w_hh_out);
      }
      if (args_.b_ih) pack_bias(gates_, p, args_.b_ih, s_.b_ih);
      if (args_.b_hh && shape_.recurrence != Recurrence::kDiagonal)
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
    const Range units = own_units();
    const Range outputs = args_.w_hr ? columns_of(outputs_, mine_.output_panels) : units;
    for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
      for (int64_t u = outputs.begin; u < outputs.end; ++u)
        s_.h[0][b * s_.h_row + u] = s_.h[1][b * s_.h_row + u] =
            args_.h0 ? widen_scalar(args_.h0[b * args_.output_size + u]) : acc_t(0);
      for (int64_t k = 0; k < shape_.states - 1; ++k) {
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
      for (int k = 1; k < shape_.states; ++k)
        for (int64_t u = units.begin; u < units.end; ++u) inner_state(k, b)[u] = acc_t(0);
    }
    if (any && shape_.recurrence == Recurrence::kDense) share_units();
  }

  void write_inner_states() {
    const Range units = own_units();
    for (int64_t k = 0; k < shape_.states - 1; ++k)
      for (int64_t b = mine_.rows.begin; b < mine_.rows.end; ++b) {
        const int64_t at = (k * args_.batch + b) * args_.hidden_size;
        convert(units.size(), s_.c + at + units.begin, args_.c_n + at + units.begin);
      }
  }

  Range own_units() const {
    return shape_.stages ? Range{0, args_.hidden_size} : columns_of(gates_, mine_.panels);
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
                 args_.b_ih && !shape_.norms_gates ? s_.b_ih : nullptr,
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
    if constexpr (Format::kDot) {
      constexpr int64_t kGroupBytes = 4;
      w.dot(rows, vectors,
            {padded_k<Format>(k_size) * static_cast<int64_t>(sizeof(weight_t)) / kDotBlockBytes,
             a.rows, a.row * static_cast<int64_t>(sizeof(operand_t)),
             w.panels + panels.offset(p) * padded_k<Format>(k_size), vectors * kLanes * kGroupBytes,
             start, 0, out, out_row, a.scales, w.scale ? w.scale + panels.offset(p) : nullptr,
             w.sum ? w.sum + panels.offset(p) : nullptr});
    } else {
      multiply(rows, vectors,
               Operands<acc_t, weight_t>{k_size, a.rows, a.row, 1,
                                         packed_panel(panels, p, k_size, w.panels), start, 0, out,
                                         out_row});
    }
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

  const CellShape& shape_;
  const ForwardArgs<tensor_t>& args_;
  const ForwardScratch<Format>& s_;
  const Worker worker_;
  const int64_t chunk_rows_;
  const Panels<acc_t> gates_, outputs_;
  const Share mine_;
  int64_t gx_row_;
  acc_t* gx_;
  bool panel_by_panel_;  // a single step: the weights of a panel are read together
  int64_t own_before_[kForwardChunkRows + 1];  // a step has a row at least
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
