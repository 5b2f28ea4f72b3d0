// Compiled once an instruction set, with RNNFAST_TARGET naming it: instances of the engine for
// every cell, of float32 and float64 (those of fewer bits: narrow_kernels.cpp, so that two
// processors may compile them), and all that is no cell's. Nothing here may be called before
// dispatch.cpp has asked the processor, and nothing may leave a weak symbol behind.
#include "../cells/list.h"
#include "batch_norm_kernels.h"
#include "instances.h"
#include "narrow_kernels.h"
#include "sample_product.h"
#include "scan.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

#define RNNFAST_FLOAT32(id, name, Type) Forward<Type, Plain<float>>::table(),
#define RNNFAST_FLOAT64(id, name, Type) Forward<Type, Plain<double>>::table(),
#define RNNFAST_BACKWARD32(id, name, Type) Backward<Type, float>::table(),
#define RNNFAST_BACKWARD64(id, name, Type) Backward<Type, double>::table(),
constexpr ForwardKernels<float> kFloat32[] = {RNNFAST_CELLS(RNNFAST_FLOAT32)};
constexpr ForwardKernels<double> kFloat64[] = {RNNFAST_CELLS(RNNFAST_FLOAT64)};
constexpr BackwardKernels<float> kBackward32[] = {RNNFAST_CELLS(RNNFAST_BACKWARD32)};
constexpr BackwardKernels<double> kBackward64[] = {RNNFAST_CELLS(RNNFAST_BACKWARD64)};

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
  const Panels<scalar_t> panels{units, 1};
  scalar_t* packed = new scalar_t[panels.padded() * k_size];
  for (int64_t p = 0; p < panels.count(); ++p) {
    pack_units(panels, p, k_size, w, packed);
    multiply_columns(
        rows, panels.valid(p), false,
        Operands<scalar_t>{k_size, a, k_size, 1,
                           packed_panel<scalar_t, const scalar_t>(panels, p, k_size, packed),
                           nullptr, 0, out + panels.first(p), units});
  }
  delete[] packed;
}

int64_t spin_tile(int64_t repeats) {
  constexpr int kSlice = slice_vectors(kMaxVectors), kRows = max_rows(kSlice);
  constexpr int64_t kSize = 64, kWidth = kSlice * lanes_of<float>;
  static float a[kRows * kSize], w[kSize * kWidth], out[kRows * kWidth];
  for (int64_t i = 0; i < repeats; ++i)
    tile<float, float, kRows, kSlice>(
        {kSize, a, kSize, 1, {w, kWidth, 0}, nullptr, 0, out, kWidth});
  return repeats * 2 * kRows * kSize * kWidth;
}

template <class scalar_t>
constexpr ScanKernels<scalar_t> kScan = {scan_bytes<scalar_t>, scan<ForwardScan>,
                                         scan<BackwardScan>};

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = {kFloat32,
                                    kFloat64,
                                    kNarrow.bfloat16,
                                    kNarrow.dot_bfloat16,
                                    kNarrow.float16,
                                    kNarrow.int8,
                                    kBackward32,
                                    kBackward64,
                                    {sample_bytes<float>, sample_product<float>},
                                    {sample_bytes<double>, sample_product<double>},
                                    kScan<float>,
                                    kScan<double>,
                                    kScan<BFloat16>,
                                    kScan<Float16>,
                                    &kBatchNorm32,
                                    &kBatchNorm64,
                                    byte_product,
                                    widen_halves,
                                    narrow_halves,
                                    apply_math<float>,
                                    apply_math<double>,
                                    product<float>,
                                    product<double>,
                                    spin_tile};
  return table;
}

}  // namespace rnnfast::RNNFAST_TARGET
