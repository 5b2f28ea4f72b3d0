// Compiled once an instruction set, with RNNFAST_TARGET naming it: instances of the engine for
// every cell and number type. Nothing here may be called before dispatch.cpp has asked the
// processor, and nothing may leave a weak symbol behind.
#include "../cells/list.h"
#include "dispatch.h"
#include "forward.h"
#include "gradients.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class scalar_t>
struct Instance {
  static int64_t forward_bytes(const ForwardArgs<scalar_t>& args, const Choice& choice) {
    Arena arena;
    forward_scratch<Cell>(args, choice, arena);
    return arena.used;
  }
  static void forward(const ForwardArgs<scalar_t>& args, const Choice& choice, char* memory,
                      const Worker& worker) {
    Arena arena{memory, 0};
    const ForwardScratch<scalar_t> scratch = forward_scratch<Cell>(args, choice, arena);
    ForwardPass<Cell, scalar_t>(args, choice, scratch, worker).run();
  }
  static int64_t backward_bytes(const BackwardArgs<scalar_t>& args, const Choice& choice) {
    Arena arena;
    backward_scratch<Cell>(args, choice, arena);
    return arena.used;
  }
  static void backward(const BackwardArgs<scalar_t>& args, const Choice& choice, char* memory,
                       const Worker& worker) {
    Arena arena{memory, 0};
    const BackwardScratch<scalar_t> scratch = backward_scratch<Cell>(args, choice, arena);
    run_backward<Cell>(args, choice, scratch, worker);
  }
  static int64_t packed_elements(int64_t input_size, int64_t hidden_size, int64_t output_size,
                                 bool projection) {
    const PackedLayout<Cell, scalar_t> sizes(input_size, hidden_size, output_size, projection);
    return sizes.w_ih + sizes.w_hh + sizes.w_hr;
  }
  static void pack(const LayerArgs<scalar_t>& args, scalar_t* packed) {
    const PackedLayout<Cell, scalar_t> sizes(args.input_size, args.hidden_size, args.output_size,
                                             args.w_hr != nullptr);
    for (int64_t p = 0; p < sizes.gates.count(); ++p) {
      pack_units(sizes.gates, p, args.input_size, args.w_ih, packed);
      if (sizes.w_hh) pack_units(sizes.gates, p, args.output_size, args.w_hh, packed + sizes.w_ih);
    }
    for (int64_t p = 0; p < sizes.outputs.count() && args.w_hr; ++p)
      pack_units(sizes.outputs, p, args.hidden_size, args.w_hr, packed + sizes.w_ih + sizes.w_hh);
  }
  static constexpr CellKernels<scalar_t> table() {
    return {forward_bytes, forward, backward_bytes, backward, packed_elements, pack};
  }
};

#define RNNFAST_INSTANCE_32(id, name, Type) Instance<Type, float>::table(),
#define RNNFAST_INSTANCE_64(id, name, Type) Instance<Type, double>::table(),
constexpr CellKernels<float> kFloat32[] = {RNNFAST_CELLS(RNNFAST_INSTANCE_32)};
constexpr CellKernels<double> kFloat64[] = {RNNFAST_CELLS(RNNFAST_INSTANCE_64)};

template <class scalar_t>
void apply_math(MathFunction function, int64_t count, const scalar_t* in, scalar_t* out) {
  constexpr int64_t lanes = lanes_of<scalar_t>;
  for (int64_t i = 0; i < count; i += lanes) {
    const auto x = load_part(in + i, count - i);
    const auto y = function == MathFunction::kExp       ? exp(x)
                   : function == MathFunction::kSigmoid ? sigmoid(x)
                                                        : tanh(x);
    store_part(out + i, y, count - i);
  }
}

template <class scalar_t>
void product(Kernel kernel, int64_t rows, int64_t units, int64_t k_size, const scalar_t* a,
             const scalar_t* w, scalar_t* out) {
  const scalar_t* no_bias = nullptr;
  if (kernel == Kernel::kDirect)
    return multiply_direct(rows, units, k_size, a, k_size, w, k_size, no_bias, out, units);
  constexpr int64_t lanes = lanes_of<scalar_t>;
  const Panels<scalar_t> panels{units, 1};
  scalar_t* packed = new scalar_t[panels.padded() * k_size];
  for (int64_t p = 0; p < panels.count(); ++p) {
    pack_units(panels, p, k_size, w, packed);
    multiply_columns(
        rows, panels.valid(p), false,
        Operands<scalar_t>{k_size, a, k_size, 1, packed + panels.offset(p) * k_size,
                           panels.vectors(p) * lanes, nullptr, 0, out + panels.first(p), units});
  }
  delete[] packed;
}

int64_t spin_tile(int64_t repeats) {
  constexpr int kRows = max_rows(kMaxVectors);
  constexpr int64_t kSize = 64, lanes = lanes_of<float>;
  static float a[kRows * kSize], w[kSize * kMaxVectors * lanes], out[kRows * kMaxVectors * lanes];
  for (int64_t i = 0; i < repeats; ++i)
    tile<float, kRows, kMaxVectors>(
        {kSize, a, kSize, 1, w, kMaxVectors * lanes, nullptr, 0, out, kMaxVectors * lanes});
  return repeats * 2 * kRows * kSize * kMaxVectors * lanes;
}

constexpr KernelTable kTable = {kFloat32,           kFloat64,       apply_math<float>,
                                apply_math<double>, product<float>, product<double>,
                                spin_tile};

}  // namespace

const KernelTable& kernel_table() { return kTable; }

}  // namespace rnnfast::RNNFAST_TARGET
