// Compiled once an instruction set, as kernels.cpp: instances of the engine's forward for the types
// of 16 bits and for int8. Backward of 16 bits runs in float32.
#include "narrow_kernels.h"

#include "../cells/list.h"
#include "instances.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

void pack_int8(const CellShape& cell, const LayerArgs<float>& args, const Int8Weights& w,
               char* packed) {
  const PackedLayout<Int8> layout(cell, args.input_size, args.hidden_size, args.output_size,
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

template <class Cell>
struct ForwardInt8 : Forward<Cell, Int8> {
  using Base = Forward<Cell, Int8>;
  static void pack(const LayerArgs<float>& args, const Int8Weights& w, char* packed) {
    pack_int8(Base::kShape, args, w, packed);
  }
  static constexpr Int8Kernels table() {
    return {{Base::scratch, Base::run, Base::packed_bytes, nullptr}, pack};
  }
};

#define RNNFAST_BFLOAT16(id, name, Type) Forward<Type, Plain<BFloat16>>::table(),
#define RNNFAST_FLOAT16(id, name, Type) Forward<Type, Plain<Float16>>::table(),
#define RNNFAST_DOT_BFLOAT16(id, name, Type) Forward<Type, DotBFloat16>::table(),
#define RNNFAST_INT8(id, name, Type) ForwardInt8<Type>::table(),
constexpr ForwardKernels<BFloat16> kBFloat16[] = {RNNFAST_CELLS_OF_ALL_TYPES(RNNFAST_BFLOAT16)};
constexpr ForwardKernels<Float16> kFloat16[] = {RNNFAST_CELLS_OF_ALL_TYPES(RNNFAST_FLOAT16)};
constexpr Int8Kernels kInt8[] = {RNNFAST_CELLS_OF_ALL_FORMATS(RNNFAST_INT8)};
#ifdef RNNFAST_DOT_BFLOAT16_HERE
constexpr ForwardKernels<BFloat16> kDotBFloat16[] = {
    RNNFAST_CELLS_OF_ALL_FORMATS(RNNFAST_DOT_BFLOAT16)};
#else
constexpr const ForwardKernels<BFloat16>* kDotBFloat16 = nullptr;
#endif

}  // namespace

// constant-initialised: other translation units read it before main
constinit const NarrowKernels kNarrow = {kBFloat16, kDotBFloat16, kFloat16, kInt8};

}  // namespace rnnfast::RNNFAST_TARGET
