// The operators that run a layer: forward, backward and pack. Allocation, checks and the way into
// the engine; no maths.
#include "../cpu/dispatch.h"
#include "checks.h"

namespace rnnfast {
namespace {

Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int count, void (*run)(long, long, void*), void* context) {
            torch::stable::parallel_for(
                0, count, 1, [&](int64_t begin, int64_t end) { run(begin, end, context); });
          }};
}

template <class scalar_t>
scalar_t* out(const Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}

// y, h_n, c_n, saved
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class scalar_t>
void run_forward_op(int64_t cell, const CheckedLayer& layer, const OptionalTensor& packed,
                    const ForwardResult& result, bool save) {
  ForwardArgs<scalar_t> args{};
  layer.fill(args);
  const Isa isa = active_isa();
  if (packed) {
    const auto made_for = [&](bool good) {
      if (!good)
        fail(std::string("packed was made for another ISA, cell or size of weights than ") +
             layer.cell.name + " on " + isa_name(isa) + "; call pack again");
    };
    made_for(packed->numel() == packed_size(isa, static_cast<int>(cell), args));
    args.packed = panels_of(isa, static_cast<int>(cell), args,
                            static_cast<const scalar_t*>(packed->const_data_ptr()));
    made_for(args.packed != nullptr);
  }
  args.y = out<scalar_t>(std::get<0>(result));
  args.h_n = out<scalar_t>(std::get<1>(result));
  args.c_n = out<scalar_t>(std::get<2>(result));
  args.saved = save ? out<scalar_t>(std::get<3>(result)) : nullptr;
  run_forward(isa, static_cast<int>(cell), args, torch_threads());
}

ForwardResult forward(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh,
                      OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                      OptionalTensor batch_sizes, OptionalTensor packed, int64_t cell, bool reverse,
                      bool save) {
  const CheckedLayer layer({x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, cell, reverse});
  const ScalarType dtype = layer.dtype;
  if (packed) {
    check_same("packed", *packed, dtype);
    if (!packed->is_contiguous()) fail("packed must be contiguous, as pack returned it");
  }
  const int64_t inner = layer.cell.states - 1;
  ForwardResult result{
      layer.packed_rows ? empty({layer.rows, layer.output_size}, dtype)
                        : empty({layer.seq_len, layer.batch, layer.output_size}, dtype),
      empty({layer.batch, layer.output_size}, dtype),
      empty({inner, layer.batch, layer.hidden_size}, dtype),
      save ? empty({layer.rows, layer.planes(), layer.hidden_size}, dtype) : empty({0}, dtype)};
  if (layer.empty()) return result;
  if (dtype == ScalarType::Float)
    run_forward_op<float>(cell, layer, packed, result, save);
  else
    run_forward_op<double>(cell, layer, packed, result, save);
  return result;
}

// dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr; bit i of `needs` asks for the i-th.
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
enum Needs : int64_t {
  kDx = 1,
  kDh0 = 2,
  kDc0 = 4,
  kDwIh = 8,
  kDwHh = 16,
  kDbIh = 32,
  kDbHh = 64,
  kDwHr = 128
};

struct IncomingGradients {
  OptionalTensor dy, dh_n, dc_n;
};

template <class scalar_t>
void run_backward_op(int64_t cell, const CheckedLayer& layer, const IncomingGradients& incoming,
                     const Tensor& y, const Tensor& saved, int64_t needs,
                     const BackwardResult& result) {
  BackwardArgs<scalar_t> args{};
  layer.fill(args);
  if (incoming.dy) args.dy = layer.rows_of<scalar_t>(*incoming.dy);
  if (incoming.dh_n) args.dh_n = static_cast<const scalar_t*>(incoming.dh_n->const_data_ptr());
  if (incoming.dc_n) args.dc_n = static_cast<const scalar_t*>(incoming.dc_n->const_data_ptr());
  args.y = static_cast<const scalar_t*>(y.const_data_ptr());
  args.saved = static_cast<const scalar_t*>(saved.const_data_ptr());
  const auto wanted = [&](Needs need, const Tensor& tensor) {
    return needs & need ? out<scalar_t>(tensor) : nullptr;
  };
  args.dx = wanted(kDx, std::get<0>(result));
  args.dh0 = wanted(kDh0, std::get<1>(result));
  args.dc0 = wanted(kDc0, std::get<2>(result));
  args.dw_ih = wanted(kDwIh, std::get<3>(result));
  args.dw_hh = wanted(kDwHh, std::get<4>(result));
  args.db_ih = wanted(kDbIh, std::get<5>(result));
  args.db_hh = wanted(kDbHh, std::get<6>(result));
  args.dw_hr = wanted(kDwHr, std::get<7>(result));
  run_backward(active_isa(), static_cast<int>(cell), args, torch_threads());
}

BackwardResult backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x,
                        OptionalTensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh,
                        OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                        OptionalTensor batch_sizes, Tensor y, Tensor saved, int64_t cell,
                        bool reverse, int64_t needs) {
  const CheckedLayer layer({x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, cell, reverse});
  const ScalarType dtype = layer.dtype;
  const int64_t T = layer.seq_len, B = layer.batch, I = layer.input_size, H = layer.hidden_size,
                P = layer.output_size;
  const int64_t inner = layer.cell.states - 1, N = layer.rows, gates = layer.cell.gates * H;

  const auto check_rows = [&](const char* name, const Tensor& tensor) {
    check_same(name, tensor, dtype);
    if (layer.packed_rows)
      check_shape(name, tensor, "(N, P)", {N, P});
    else
      check_shape(name, tensor, "(T, B, P)", {T, B, P});
  };
  IncomingGradients incoming;
  if (dy) {
    check_rows("dy", *dy);
    incoming.dy = unit_stride(*dy);
  }
  if (dh_n) {
    check_same("dh_n", *dh_n, dtype);
    check_shape("dh_n", *dh_n, "(B, P)", {B, P});
    incoming.dh_n = torch_contiguous(*dh_n);
  }
  if (dc_n) {
    check_same("dc_n", *dc_n, dtype);
    check_shape("dc_n", *dc_n, "(S-1, B, H)", {inner, B, H});
    incoming.dc_n = torch_contiguous(*dc_n);
  }
  check_rows("y", y);
  check_same("saved", saved, dtype);
  check_shape("saved", saved, "(N, planes, H)", {N, layer.planes(), H});
  if (needs < 0 || needs > 255)
    fail("needs must be a mask of 8 bits, got " + std::to_string(needs));
  if ((needs & kDbIh && !b_ih) || (needs & kDbHh && !b_hh) || (needs & kDwHr && !w_hr))
    fail("needs asks for the gradient of an argument that is None");
  const Tensor y_rows = torch_contiguous(y), saved_rows = torch_contiguous(saved);

  const auto if_needed = [&](Needs need, std::initializer_list<int64_t> sizes) {
    return needs & need ? empty(sizes, dtype) : empty({0}, dtype);
  };
  BackwardResult result{
      layer.packed_rows ? if_needed(kDx, {N, I}) : if_needed(kDx, {T, B, I}),
      if_needed(kDh0, {B, P}),
      if_needed(kDc0, {inner, B, H}),
      if_needed(kDwIh, {gates, I}),
      layer.cell.diagonal ? if_needed(kDwHh, {H}) : if_needed(kDwHh, {gates, P}),
      if_needed(kDbIh, {gates}),
      if_needed(kDbHh, {gates}),
      if_needed(kDwHr, {P, H}),
  };
  if (layer.empty()) {
    std::apply([](const auto&... tensors) { (fill_zero(tensors), ...); }, result);
    return result;
  }
  if (dtype == ScalarType::Float)
    run_backward_op<float>(cell, layer, incoming, y_rows, saved_rows, needs, result);
  else
    run_backward_op<double>(cell, layer, incoming, y_rows, saved_rows, needs, result);
  return result;
}

// Weights as the active ISA's micro-kernel wants them, for forward's `packed`.
template <class scalar_t>
Tensor pack_op(int64_t cell, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& w_hr,
               ScalarType dtype) {
  LayerArgs<scalar_t> args{};
  args.input_size = w_ih.size(1);
  args.hidden_size = w_ih.size(0) / checked_cell(cell).gates;
  args.output_size = w_hr ? w_hr->size(0) : args.hidden_size;
  args.w_ih = static_cast<const scalar_t*>(w_ih.const_data_ptr());
  args.w_hh = static_cast<const scalar_t*>(w_hh.const_data_ptr());
  args.w_hr = w_hr ? static_cast<const scalar_t*>(w_hr->const_data_ptr()) : nullptr;
  const Isa isa = active_isa();
  Tensor packed = empty({packed_size(isa, static_cast<int>(cell), args)}, dtype);
  pack_weights(isa, static_cast<int>(cell), args, out<scalar_t>(packed));
  return packed;
}

Tensor pack(Tensor w_ih, Tensor w_hh, OptionalTensor w_hr, int64_t cell) {
  const ScalarType dtype = checked_dtype("w_ih", w_ih);
  if (w_ih.dim() != 2) fail("w_ih must have shape (G*H, I), got " + shape_text(w_ih));
  // The layer's own checks, on an input without rows.
  const Tensor x = empty({1, 0, w_ih.size(1)}, dtype);
  const OptionalTensor none;
  const CheckedLayer layer({x, none, none, w_ih, w_hh, none, none, w_hr, none, cell, false});
  OptionalTensor projection;
  if (w_hr) projection.emplace(torch_contiguous(*w_hr));
  return dtype == ScalarType::Float ? pack_op<float>(cell, torch_contiguous(w_ih),
                                                     torch_contiguous(w_hh), projection, dtype)
                                    : pack_op<double>(cell, torch_contiguous(w_ih),
                                                      torch_contiguous(w_hh), projection, dtype);
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY(rnnfast, m) {
  m.def(
      "forward(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? "
      "b_hh, Tensor? w_hr, "
      "Tensor? batch_sizes, Tensor? packed, int cell, bool reverse, bool save) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor "
      "w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor y, Tensor saved, int "
      "cell, bool reverse, "
      "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pack(Tensor w_ih, Tensor w_hh, Tensor? w_hr, int cell) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("forward", TORCH_BOX(&rnnfast::forward));
  m.impl("backward", TORCH_BOX(&rnnfast::backward));
  m.impl("pack", TORCH_BOX(&rnnfast::pack));
}
