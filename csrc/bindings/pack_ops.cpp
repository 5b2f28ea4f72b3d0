// The operators that pack weights for layers that are frozen or quantized.
#include "../cpu/dispatch.h"
#include "results.h"

namespace rnnfast {
namespace {

// Weights as the active ISA's micro-kernel wants them, for forward's `packed`.
template <class scalar_t>
Tensor pack_op(int64_t cell, const CheckedLayer& layer) {
  LayerArgs<scalar_t> args{};
  layer.fill(args);
  const Isa isa = active_isa();
  Tensor packed = empty({packed_bytes(isa, id_of_code(cell), args)}, ScalarType::Byte, layer.place);
  fill_zero(packed);  // the gaps between its parts, too
  pack_weights(isa, id_of_code(cell), args, out<char>(packed));
  return packed;
}

// The layer's own checks, on an input without rows.
CheckedLayer layer_of_weights(const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& w_hr,
                              int64_t cell, ScalarType dtype, bool shapes_only) {
  if (w_ih.dim() != 2) fail("w_ih must have shape (G*H, I), got " + shape_text(w_ih));
  const Tensor x = empty({1, 0, w_ih.size(1)}, dtype, place_of(w_ih));
  const OptionalTensor none;
  return CheckedLayer(
      {x, none, none, w_ih, w_hh, none, none, w_hr, none, none, cell, false, shapes_only});
}

Tensor pack(Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, int64_t cell) {
  const ScalarType dtype = checked_dtype("w_ih", w_ih);
  const CheckedLayer layer = layer_of_weights(w_ih, w_hh, w_hr, cell, dtype, false);
  OptionalTensor packed;
  with_type(dtype, [&](auto scalar) { packed.emplace(pack_op<decltype(scalar)>(cell, layer)); });
  return *packed;
}

// A matrix of bytes and the scale of each of its rows.
void check_bytes(const char* name, const char* scale_name, const Tensor& w, const Tensor& scale) {
  if (!w.is_cpu() || w.scalar_type() != ScalarType::Char || w.dim() != 2)
    fail(std::string(name) + " must be an int8 CPU tensor of two dimensions, got " + shape_text(w));
  if (w.size(1) > kLongestInt8)
    fail(std::string(name) + " must have at most " + std::to_string(kLongestInt8) +
         " columns to be added up in 32 bits, got " + shape_text(w));
  if (!scale.is_cpu() || scale.scalar_type() != ScalarType::Float)
    fail(std::string(scale_name) + " must be a float32 CPU tensor");
  check_shape(scale_name, scale, "(rows of the weight,)", {w.size(0)});
}

// As pack, from bytes and their scales; a w_hh that is no matrix is float32 and has none.
Tensor pack_int8(Tensor w_ih, Tensor scale_ih, Tensor w_hh, OptionalTensor scale_hh,
                 OptionalTensor w_hr, OptionalTensor scale_hr, int64_t cell) {
  const CellInfo& info = checked_cell(cell);
  if (!info.dot_kernels) fail(std::string("cell ") + info.name + " has no products of int8");
  const bool keeps_hh = !info.dense;
  check_bytes("w_ih", "scale_ih", w_ih, scale_ih);
  if (!keeps_hh) {
    if (!scale_hh) fail("scale_hh must be given, it is None");
    check_bytes("w_hh", "scale_hh", w_hh, *scale_hh);
  }
  if (w_hr) {
    if (!scale_hr) fail("scale_hr must be given with w_hr, it is None");
    check_bytes("w_hr", "scale_hr", *w_hr, *scale_hr);
  }
  // Shapes are checked on float32 tensors of the same sizes.
  const auto shape_of = [](const Tensor& w) { return empty_as(w, ScalarType::Float); };
  OptionalTensor projection;
  if (w_hr) projection.emplace(shape_of(*w_hr));
  const CheckedLayer layer = layer_of_weights(shape_of(w_ih), keeps_hh ? w_hh : shape_of(w_hh),
                                              projection, cell, ScalarType::Float, true);
  LayerArgs<float> args{};
  layer.fill(args);
  const auto rows = [](const Tensor& w) { return torch_contiguous(w); };
  const Tensor ih = rows(w_ih), hh = rows(w_hh), s_ih = rows(scale_ih);
  OptionalTensor hr, s_hh, s_hr;
  if (w_hr) hr.emplace(rows(*w_hr));
  if (scale_hh) s_hh.emplace(rows(*scale_hh));
  if (scale_hr) s_hr.emplace(rows(*scale_hr));
  const auto bytes = [](const Tensor& w) { return static_cast<const int8_t*>(w.const_data_ptr()); };
  const auto scales = [](const OptionalTensor& s) {
    return s ? static_cast<const float*>(s->const_data_ptr()) : nullptr;
  };
  const Int8Weights weights{bytes(ih),
                            keeps_hh ? nullptr : bytes(hh),
                            hr ? bytes(*hr) : nullptr,
                            scales(s_ih),
                            scales(s_hh),
                            scales(s_hr)};
  const Isa isa = active_isa();
  Tensor packed =
      empty({packed_bytes_int8(isa, id_of_code(cell), args)}, ScalarType::Byte, layer.place);
  fill_zero(packed);
  pack_weights_int8(isa, id_of_code(cell), args, weights, out<char>(packed));
  return packed;
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("pack(Tensor w_ih, Tensor w_hh, Tensor? w_hr, int cell) -> Tensor");
  m.def(
      "pack_int8(Tensor w_ih, Tensor scale_ih, Tensor w_hh, Tensor? scale_hh, Tensor? w_hr, "
      "Tensor? scale_hr, int cell) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("pack", TORCH_BOX(&rnnfast::pack));
  m.impl("pack_int8", TORCH_BOX(&rnnfast::pack_int8));
}
