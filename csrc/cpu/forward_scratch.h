// What the workers of a forward pass share: packed weights, the states, and room for a chunk of the
// input projection.
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
  PackedMatrix<Format> w_ih, w_hh, w_hr, w_link;  // panels null where the direct kernel runs
  weight_t *w_ih_out, *w_hh_out, *w_hr_out, *w_link_out;
  acc_t *b_ih, *b_hh;
  acc_t* gx;    // (chunk rows, panels) in panel order
  acc_t* h[2];  // (B, h_row)
  acc_t* m;     // (B, m_row): h before the projection
  acc_t*
      h_dropped;  // (B, h_row) for each worker: h as it enters the product, where a mask drops it
  acc_t* c;       // (S-1, B, H): inner states, c_n itself where that has the type
  acc_t *gh, *link;  // of a cell with stages: (B, gh_row) and (B, h_row)
  // Rows as products want them, for each worker: of a chunk of x, of h or m.
  operand_t *x_rows, *h_rows;
  float *x_scales, *h_scales;
  int64_t h_row, m_row, gx_row, gx_size, x_size, h_size, x_scales_size;
};

template <class Format>
ForwardScratch<Format> forward_scratch(const CellShape& cell,
                                       const ForwardArgs<typename Format::tensor_t>& args,
                                       const Choice& choice, Arena& arena) {
  using acc_t = typename Format::acc_t;
  using weight_t = typename Format::weight_t;
  constexpr int64_t lanes = lanes_of<acc_t>;
  const PackedLayout<Format> sizes(cell, args.input_size, args.hidden_size, args.output_size,
                                   args.w_hr != nullptr);
  ForwardScratch<Format> s{};
  s.h_row = divide_up(args.output_size, lanes) * lanes + lanes;
  s.m_row = divide_up(args.hidden_size, lanes) * lanes + lanes;
  if (args.packed) {
    s.w_ih = sizes.matrix(args.packed, sizes.ih);
    if (sizes.hh.elements) s.w_hh = sizes.matrix(args.packed, sizes.hh);
    if (sizes.hr.elements) s.w_hr = sizes.matrix(args.packed, sizes.hr);
    if (sizes.link.elements) s.w_link = sizes.matrix(args.packed, sizes.link);
  } else {
    if (choice.kernel_ih == Kernel::kPacked)
      s.w_ih.panels = s.w_ih_out = arena.take<weight_t>(sizes.ih.elements);
    if (choice.kernel_hh == Kernel::kPacked) {
      s.w_hh.panels = s.w_hh_out = arena.take<weight_t>(sizes.hh.elements);
      if (args.w_hr) s.w_hr.panels = s.w_hr_out = arena.take<weight_t>(sizes.hr.elements);
      if (sizes.link.elements)
        s.w_link.panels = s.w_link_out = arena.take<weight_t>(sizes.link.elements);
    }
  }
  s.w_ih.dot = args.dot_ih;
  s.w_hh.dot = s.w_hr.dot = args.dot_hh;
  // Whole vectors are read wherever a gate begins.
  s.gx_row = sizes.gates.padded() + (cell.stages ? lanes : 0);
  s.b_ih = arena.take<acc_t>(s.gx_row);
  s.b_hh = arena.take<acc_t>(s.gx_row);
  // Workers that own rows are not always in the same chunk: each has a gx of its own.
  const int64_t chunk_rows = chunk_capacity(args.rows, args.batch, choice.chunk_rows);
  s.gx_size = chunk_rows * s.gx_row;
  s.gx = arena.take<acc_t>(s.gx_size * (choice.split == Split::kBatch ? choice.threads : 1));
  s.h[0] = arena.take<acc_t>(args.batch * s.h_row);
  s.h[1] = arena.take<acc_t>(args.batch * s.h_row);
  if (cell.stages) {
    s.gh = arena.take<acc_t>(args.batch * s.gx_row);
    s.link = arena.take<acc_t>(args.batch * s.h_row);
  }
  if (args.w_hr) s.m = arena.take<acc_t>(args.batch * s.m_row);
  if (args.masks.h_kept) s.h_dropped = arena.take<acc_t>(args.batch * s.h_row * choice.threads);
  if constexpr (std::is_same_v<acc_t, typename Format::tensor_t>)
    s.c = args.c_n;
  else
    s.c = arena.take<acc_t>((cell.states - 1) * args.batch * args.hidden_size);
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

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
