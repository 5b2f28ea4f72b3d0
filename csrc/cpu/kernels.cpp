// Compiled once an instruction set, with RNNFAST_TARGET naming it: instances of the engine for
// every cell and number type. Nothing here may be called before dispatch.cpp has asked the
// processor, and nothing may leave a weak symbol behind.
#include "../cells/list.h"
#include "dispatch.h"
#include "forward.h"
#include "gradients.h"
#include "sample_product.h"
#include "scan.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Cell, class Format>
struct Forward {
  using tensor_t = typename Format::tensor_t;
  using Layout = PackedLayout<Cell, Format>;

  static int64_t scratch(const ForwardArgs<tensor_t>& args, const Choice& choice) {
    Arena arena;
    forward_scratch<Cell, Format>(args, choice, arena);
    return arena.used;
  }
  static void run(const ForwardArgs<tensor_t>& args, const Choice& choice, char* memory,
                  const Worker& worker) {
    Arena arena{memory, 0};
    const ForwardScratch<Format> scratch = forward_scratch<Cell, Format>(args, choice, arena);
    ForwardPass<Cell, Format>(args, choice, scratch, worker).run();
  }
  static int64_t packed_bytes(int64_t input_size, int64_t hidden_size, int64_t output_size,
                              bool projection) {
    return Layout(input_size, hidden_size, output_size, projection).bytes;
  }
  static void pack(const LayerArgs<tensor_t>& args, char* packed) {
    const Layout layout(args.input_size, args.hidden_size, args.output_size, args.w_hr != nullptr);
    const auto part = [&](const auto& panels, const auto& to, int64_t k_size, const tensor_t* w) {
      for (int64_t p = 0; p < panels.count() && to.elements; ++p)
        pack_weights<Format>(panels, p, k_size, w, reinterpret_cast<tensor_t*>(packed + to.panels));
    };
    part(layout.gates, layout.ih, args.input_size, args.w_ih);
    part(layout.gates, layout.hh, args.output_size, args.w_hh);
    part(layout.outputs, layout.hr, args.hidden_size, args.w_hr);
  }
  static constexpr ForwardKernels<tensor_t> table() { return {scratch, run, packed_bytes, pack}; }
};

template <class Cell>
struct ForwardInt8 : Forward<Cell, Int8> {
  using Base = Forward<Cell, Int8>;
  static void pack(const LayerArgs<float>& args, const Int8Weights& w, char* packed) {
    const typename Base::Layout layout(args.input_size, args.hidden_size, args.output_size,
                                       w.w_hr != nullptr);
    const auto part = [&](const auto& panels, const auto& to, int64_t k_size, const int8_t* from,
                          const float* scale) {
      for (int64_t p = 0; p < panels.count() && to.elements; ++p) {
        pack_weights<Int8>(panels, p, k_size, from, reinterpret_cast<int8_t*>(packed + to.panels));
        pack_scales(panels, p, k_size, from, scale, reinterpret_cast<float*>(packed + to.scale),
                    reinterpret_cast<int32_t*>(packed + to.sum));
      }
    };
    part(layout.gates, layout.ih, args.input_size, w.w_ih, w.scale_ih);
    part(layout.gates, layout.hh, args.output_size, w.w_hh, w.scale_hh);
    part(layout.outputs, layout.hr, args.hidden_size, w.w_hr, w.scale_hr);
  }
  static constexpr Int8Kernels table() {
    return {{Base::scratch, Base::run, Base::packed_bytes, nullptr}, pack};
  }
};

template <class Cell, class scalar_t>
struct Backward {
  static int64_t scratch(const BackwardArgs<scalar_t>& args, const Choice& choice) {
    Arena arena;
    backward_scratch<Cell>(args, choice, arena);
    return arena.used;
  }
  static void run(const BackwardArgs<scalar_t>& args, const Choice& choice, char* memory,
                  const Worker& worker) {
    Arena arena{memory, 0};
    const BackwardScratch<scalar_t> scratch = backward_scratch<Cell>(args, choice, arena);
    run_backward<Cell>(args, choice, scratch, worker);
  }
  static constexpr BackwardKernels<scalar_t> table() { return {scratch, run}; }
};

#define RNNFAST_FLOAT32(id, name, Type) Forward<Type, Plain<float>>::table(),
#define RNNFAST_FLOAT64(id, name, Type) Forward<Type, Plain<double>>::table(),
#define RNNFAST_BFLOAT16(id, name, Type) Forward<Type, Plain<BFloat16>>::table(),
#define RNNFAST_FLOAT16(id, name, Type) Forward<Type, Plain<Float16>>::table(),
#define RNNFAST_DOT_BFLOAT16(id, name, Type) Forward<Type, DotBFloat16>::table(),
#define RNNFAST_INT8(id, name, Type) ForwardInt8<Type>::table(),
#define RNNFAST_BACKWARD32(id, name, Type) Backward<Type, float>::table(),
#define RNNFAST_BACKWARD64(id, name, Type) Backward<Type, double>::table(),
constexpr ForwardKernels<float> kFloat32[] = {RNNFAST_CELLS(RNNFAST_FLOAT32)};
constexpr ForwardKernels<double> kFloat64[] = {RNNFAST_CELLS(RNNFAST_FLOAT64)};
constexpr ForwardKernels<BFloat16> kBFloat16[] = {RNNFAST_CELLS(RNNFAST_BFLOAT16)};
constexpr ForwardKernels<Float16> kFloat16[] = {RNNFAST_CELLS(RNNFAST_FLOAT16)};
constexpr Int8Kernels kInt8[] = {RNNFAST_CELLS_OF_ALL_FORMATS(RNNFAST_INT8)};
constexpr BackwardKernels<float> kBackward32[] = {RNNFAST_CELLS(RNNFAST_BACKWARD32)};
constexpr BackwardKernels<double> kBackward64[] = {RNNFAST_CELLS(RNNFAST_BACKWARD64)};
#ifdef RNNFAST_DOT_BFLOAT16_HERE
constexpr ForwardKernels<BFloat16> kDotBFloat16[] = {
    RNNFAST_CELLS_OF_ALL_FORMATS(RNNFAST_DOT_BFLOAT16)};
#else
constexpr const ForwardKernels<BFloat16>* kDotBFloat16 = nullptr;
#endif

void widen_halves(int64_t count, bool brain, const uint16_t* in, float* out) {
  if (brain)
    convert(count, reinterpret_cast<const BFloat16*>(in), out);
  else
    convert(count, reinterpret_cast<const Float16*>(in), out);
}
void narrow_halves(int64_t count, bool brain, const float* in, uint16_t* out) {
  if (brain)
    convert(count, in, reinterpret_cast<BFloat16*>(out));
  else
    convert(count, in, reinterpret_cast<Float16*>(out));
}

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
    tile<float, float, kRows, kMaxVectors>(
        {kSize, a, kSize, 1, w, kMaxVectors * lanes, nullptr, 0, out, kMaxVectors * lanes});
  return repeats * 2 * kRows * kSize * kMaxVectors * lanes;
}

template <class scalar_t>
constexpr ScanKernels<scalar_t> kScan = {scan_bytes<scalar_t>, scan<ForwardScan>,
                                         scan<BackwardScan>};

constexpr KernelTable kTable = {kFloat32,
                                kFloat64,
                                kBFloat16,
                                kDotBFloat16,
                                kFloat16,
                                kInt8,
                                kBackward32,
                                kBackward64,
                                {sample_bytes<float>, sample_product<float>},
                                {sample_bytes<double>, sample_product<double>},
                                kScan<float>,
                                kScan<double>,
                                kScan<BFloat16>,
                                kScan<Float16>,
                                byte_product,
                                widen_halves,
                                narrow_halves,
                                apply_math<float>,
                                apply_math<double>,
                                product<float>,
                                product<double>,
                                spin_tile};

}  // namespace

const KernelTable& kernel_table() { return kTable; }

}  // namespace rnnfast::RNNFAST_TARGET
