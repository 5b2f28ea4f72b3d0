// The operators that run one direction of a layer, forward and backward. Allocation, checks and the
// way into the engine; no maths.
#include "cpu_calls.h"

namespace rnnfast {

namespace {

ForwardResult run(const ForwardCall& call, const OptionalTensor& packed, int64_t cell) {
  check_packed(packed);
  if (call.layer.empty()) return call.result;
  const Isa isa = active_isa();
  with_type(call.layer.dtype, [&](auto scalar) {
    WeightFormat format;
    auto args = cpu_args<decltype(scalar)>(call, packed, isa, cell, format);
    run_forward(isa, id_of_code(cell), args, format, torch_threads());
  });
  return call.result;
}

}  // namespace

ForwardResult cpu_forward(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                          const OptionalTensor& packed, int64_t cell, bool reverse, bool save,
                          int64_t saved_rows) {
  return run({x, d, batch_sizes, packed.has_value(), cell, reverse, save, nullptr, saved_rows},
             packed, cell);
}

namespace {

ForwardResult forward(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh,
                      OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                      OptionalTensor batch_sizes, OptionalTensor reset, OptionalTensor packed,
                      int64_t cell, bool reverse, bool save) {
  return cpu_forward(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, batch_sizes, packed, cell,
                     reverse, save);
}

std::tuple<Tensor, Tensor> forward_last(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                        Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                        OptionalTensor w_hr, OptionalTensor batch_sizes,
                                        OptionalTensor reset, OptionalTensor packed, int64_t cell,
                                        bool reverse) {
  const Pass pass{h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset};
  const auto result =
      run({x, pass, batch_sizes, packed.has_value(), cell, reverse, false, nullptr, 0, true},
          packed, cell);
  return {std::get<1>(result), std::get<2>(result)};
}

Tensor widened(const Tensor& tensor) {
  const Tensor from = torch_contiguous(tensor);
  Tensor to = empty_as(from, ScalarType::Float);
  if (from.scalar_type() == ScalarType::BFloat16)
    widen(from.numel(), static_cast<const BFloat16*>(from.const_data_ptr()), out<float>(to));
  else
    widen(from.numel(), static_cast<const Float16*>(from.const_data_ptr()), out<float>(to));
  return to;
}

OptionalTensor widened(const OptionalTensor& tensor) {
  OptionalTensor to;
  if (tensor) to.emplace(widened(*tensor));
  return to;
}

Tensor narrowed(const Tensor& from, ScalarType dtype) {
  Tensor to = empty_as(from, dtype);
  const auto* numbers = static_cast<const float*>(from.const_data_ptr());
  if (dtype == ScalarType::BFloat16)
    narrow(from.numel(), numbers, out<BFloat16>(to));
  else
    narrow(from.numel(), numbers, out<Float16>(to));
  return to;
}

}  // namespace

namespace {

// A call of 16 bits, run in float32.
BackwardCall run_widened(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                         const Incoming& in, int64_t cell, bool reverse) {
  // The checks, on the tensors as they came.
  BackwardCall::checked(CheckedLayer({x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr,
                                      batch_sizes, d.reset, cell, reverse, false, false, &d.masks}),
                        d, in);
  BackwardCall wide(widened(x),
                    {widened(d.h0), widened(d.c0), widened(d.w_ih), widened(d.w_hh),
                     widened(d.b_ih), widened(d.b_hh), widened(d.w_hr), d.reset, d.masks},
                    batch_sizes,
                    {widened(in.dy), widened(in.dh_n), widened(in.dc_n), widened(in.y), in.saved,
                     in.needs, in.gates},
                    cell, reverse);
  run_on_cpu(wide, cell);
  return wide;
}

template <class Result>
Result all_narrowed(const Result& result, ScalarType dtype) {
  return std::apply([&](const auto&... tensors) { return Result{narrowed(tensors, dtype)...}; },
                    result);
}

}  // namespace

BackwardResult backward_of_half(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                                const Incoming& in, int64_t cell, bool reverse) {
  return all_narrowed(run_widened(x, d, batch_sizes, in, cell, reverse).result, x.scalar_type());
}

BackwardResult cpu_backward(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                            const Incoming& in, int64_t cell, bool reverse) {
  if (is_half(x)) return backward_of_half(x, d, batch_sizes, in, cell, reverse);
  const BackwardCall call(x, d, batch_sizes, in, cell, reverse);
  run_on_cpu(call, cell);
  return call.result;
}

namespace {

BackwardResult backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x,
                        OptionalTensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh,
                        OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                        OptionalTensor batch_sizes, OptionalTensor reset, Tensor y, Tensor saved,
                        int64_t cell, bool reverse, int64_t needs) {
  return cpu_backward(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, batch_sizes,
                      {dy, dh_n, dc_n, y, saved, needs}, cell, reverse);
}

GateGradients gate_gradients(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x,
                             OptionalTensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh,
                             OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                             OptionalTensor batch_sizes, OptionalTensor reset, Tensor y,
                             Tensor saved, int64_t cell, bool reverse) {
  const Pass pass{h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset};
  const Incoming incoming{dy, dh_n, dc_n, y, saved, kDh0 | kDc0, true};
  if (is_half(x))
    return all_narrowed(gates_of(run_widened(x, pass, batch_sizes, incoming, cell, reverse)),
                        x.scalar_type());
  const BackwardCall call(x, pass, batch_sizes, incoming, cell, reverse);
  run_on_cpu(call, cell);
  return gates_of(call);
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY(rnnfast, m) {
  m.def(
      "forward(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? "
      "b_hh, Tensor? w_hr, "
      "Tensor? batch_sizes, Tensor? reset, Tensor? packed, int cell, bool reverse, bool save) -> "
      "(Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "forward_last(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor? reset, Tensor? packed, int cell, "
      "bool reverse) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor "
      "w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor? reset, Tensor y, "
      "Tensor saved, int "
      "cell, bool reverse, "
      "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gate_gradients(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, "
      "Tensor? reset, Tensor y, Tensor saved, int cell, bool reverse) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("forward", TORCH_BOX(&rnnfast::forward));
  m.impl("forward_last", TORCH_BOX(&rnnfast::forward_last));
  m.impl("backward", TORCH_BOX(&rnnfast::backward));
  m.impl("gate_gradients", TORCH_BOX(&rnnfast::gate_gradients));
}
