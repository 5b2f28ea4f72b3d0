// Forward of 16 bits of cells that have kernels of full width only: what the call reads is widened,
// float32 computes, and the results are rounded once. (Backward of 16 bits does the same for every
// cell, in the bindings.)
#include <memory>
#include <vector>

#include "kernel_of.h"
#include "run_widened.h"

namespace rnnfast {
namespace {

template <class half_t>
class Widened {
 public:
  const float* of(const half_t* from, int64_t count) {
    if (!from) return nullptr;
    float* to = room(count);
    widen(count, from, to);
    return to;
  }

  // Rows, one after the other.
  const float* of_rows(const LayerArgs<half_t>& args) {
    float* const to = room(args.rows * args.input_size);
    for (int64_t t = 0, row = 0; t < args.seq_len; ++t) {
      const int64_t count = args.batch_sizes ? args.batch_sizes[t] : args.batch;
      const half_t* from = args.batch_sizes ? args.x.data + row * args.x.row_stride
                                            : args.x.data + t * args.x.step_stride;
      for (int64_t b = 0; b < count; ++b, ++row)
        widen(args.input_size, from + b * args.x.row_stride, to + row * args.input_size);
    }
    return to;
  }

  float* room(int64_t count) {
    buffers_.emplace_back(new float[count]);
    return buffers_.back().get();
  }

 private:
  std::vector<std::unique_ptr<float[]>> buffers_;
};

struct Sizes {
  int64_t w_ih, w_hh, w_hr, bias, parameters;
};

Sizes sizes_of(const CellInfo& cell, int64_t I, int64_t H, int64_t P) {
  const int64_t gates = cell.gates * H;
  return {gates * I,
          cell.dense      ? gates * P
          : cell.diagonal ? H
                          : 0,
          P * H, gates, cell.parameters * H};
}

// The weights, where they are not packed, and biases.
template <class half_t>
void widen_weights(int cell, const LayerArgs<half_t>& args, bool packed, Widened<half_t>& widened,
                   LayerArgs<float>& wide) {
  const CellInfo& info = cell_info(cell);
  const Sizes sizes = sizes_of(info, args.input_size, args.hidden_size, args.output_size);
  if (!packed) wide.w_ih = widened.of(args.w_ih, sizes.w_ih);
  if (!packed || info.diagonal) wide.w_hh = widened.of(args.w_hh, sizes.w_hh);
  // of packed ones the pointer only says that there is a projection
  wide.w_hr =
      packed ? reinterpret_cast<const float*>(args.w_hr) : widened.of(args.w_hr, sizes.w_hr);
  wide.b_ih = widened.of(args.b_ih, sizes.bias);
  wide.b_hh = widened.of(args.b_hh, sizes.bias + sizes.parameters);
}

template <class half_t>
void copy_sizes(const LayerArgs<half_t>& args, LayerArgs<float>& wide) {
  wide.seq_len = args.seq_len;
  wide.batch = args.batch;
  wide.input_size = args.input_size;
  wide.hidden_size = args.hidden_size;
  wide.output_size = args.output_size;
  wide.rows = args.rows;
  wide.options = args.options;
  wide.batch_sizes = args.batch_sizes;
  wide.offsets = args.offsets;
  wide.reverse = args.reverse;
  wide.reset = args.reset;
  wide.masks = args.masks;
}

}  // namespace

template <class half_t>
void run_forward_widened(Isa isa, int cell, const ForwardArgs<half_t>& args,
                         const Threads& threads) {
  const int64_t I = args.input_size, H = args.hidden_size, P = args.output_size, B = args.batch,
                inner = (cell_info(cell).states - 1) * B * H;
  Widened<half_t> widened;
  ForwardArgs<float> wide{};
  copy_sizes(args, wide);
  wide.x = {widened.of_rows(args), B * I, I};
  wide.h0 = widened.of(args.h0, B * P);
  wide.c0 = widened.of(args.c0, inner);
  widen_weights(cell, args, args.packed != nullptr, widened, wide);
  wide.packed = args.packed;
  if (args.y) wide.y = widened.room(args.rows * P);
  wide.h_n = widened.room(B * P);
  wide.c_n = widened.room(inner);
  wide.saved = args.saved;
  run_forward(isa, cell, wide, WeightFormat::kPlain, threads);
  if (args.y) narrow(args.rows * P, wide.y, args.y);
  narrow(B * P, wide.h_n, args.h_n);
  narrow(inner, wide.c_n, args.c_n);
}

template <class half_t>
void pack_weights_widened(Isa isa, int cell, const LayerArgs<half_t>& args, char* packed) {
  Widened<half_t> widened;
  LayerArgs<float> wide{};
  copy_sizes(args, wide);
  widen_weights(cell, args, false, widened, wide);
  forward_kernels(isa, cell, WeightFormat::kPlain, float{}).pack(wide, packed);
}

#define RNNFAST_INSTANTIATE(half_t)                                                        \
  template void run_forward_widened(Isa, int, const ForwardArgs<half_t>&, const Threads&); \
  template void pack_weights_widened(Isa, int, const LayerArgs<half_t>&, char*);
RNNFAST_INSTANTIATE(BFloat16)
RNNFAST_INSTANTIATE(Float16)

}  // namespace rnnfast
