// The engine for one cell and one format, as a table of kernels has it.
#pragma once

#include "dispatch.h"
#include "forward.h"
#include "gradients.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// All weights of a layer, where its layout has them.
template <class Format>
void pack_all(const CellShape& cell, const LayerArgs<typename Format::tensor_t>& args,
              char* packed) {
  using tensor_t = typename Format::tensor_t;
  const PackedLayout<Format> layout(cell, args.input_size, args.hidden_size, args.output_size,
                                    args.w_hr != nullptr);
  const auto part = [&](const auto& panels, const auto& to, int64_t k_size, const tensor_t* w) {
    for (int64_t p = 0; p < panels.count() && to.elements; ++p)
      pack_weights<Format>(panels, p, k_size, w, reinterpret_cast<tensor_t*>(packed + to.panels));
  };
  part(layout.gates, layout.ih, args.input_size, args.w_ih);
  part(layout.free_gates, layout.hh, args.output_size, args.w_hh);
  if (cell.linked_gates > 0)
    part(layout.linked_gates, layout.link, args.output_size,
         args.w_hh + layout.free_gates.units * args.output_size);
  part(layout.outputs, layout.hr, args.hidden_size, args.w_hr);
}

template <class Cell, class Format>
struct Forward {
  using tensor_t = typename Format::tensor_t;
  static constexpr CellShape kShape = shape_of<Cell>();

  static int64_t scratch(const ForwardArgs<tensor_t>& args, const Choice& choice) {
    Arena arena;
    forward_scratch<Format>(kShape, args, choice, arena);
    return arena.used;
  }
  static void run(const ForwardArgs<tensor_t>& args, const Choice& choice, char* memory,
                  const Worker& worker) {
    Arena arena{memory, 0};
    const ForwardScratch<Format> scratch = forward_scratch<Format>(kShape, args, choice, arena);
    ForwardPass<Cell, Format>(args, choice, scratch, worker).run();
  }
  static int64_t packed_bytes(int64_t input_size, int64_t hidden_size, int64_t output_size,
                              bool projection) {
    return PackedLayout<Format>(kShape, input_size, hidden_size, output_size, projection).bytes;
  }
  static void pack(const LayerArgs<tensor_t>& args, char* packed) {
    pack_all<Format>(kShape, args, packed);
  }
  static constexpr ForwardKernels<tensor_t> table() { return {scratch, run, packed_bytes, pack}; }
};

template <class Cell, class scalar_t>
struct Backward {
  static constexpr CellShape kShape = shape_of<Cell>();

  static int64_t scratch(const BackwardArgs<scalar_t>& args, const Choice& choice) {
    Arena arena;
    backward_scratch(kShape, args, choice, arena);
    return arena.used;
  }
  static void run(const BackwardArgs<scalar_t>& args, const Choice& choice, char* memory,
                  const Worker& worker) {
    Arena arena{memory, 0};
    const BackwardScratch<scalar_t> scratch = backward_scratch(kShape, args, choice, arena);
    run_backward<Cell>(args, choice, scratch, worker);
  }
  static constexpr BackwardKernels<scalar_t> table() { return {scratch, run}; }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
