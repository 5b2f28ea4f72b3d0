// One pass of a layer, forward or backward, as operators see it: tensors that are checked, and room
// for the results.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "results.h"

namespace rnnfast {

// y, h_n, c_n, saved
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What a pass is given beside x and batch_sizes.
struct Pass {
  OptionalTensor h0, c0;
  Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh, w_hr, reset;
  MaskTensors masks = {};
};

// A checked forward pass with room for its results.
struct ForwardCall {
  CheckedLayer layer;
  ForwardResult result;
  bool save, last;

  // `packed`: of the weights only the shapes count. `used`: a y that nobody reads any more, for
  // this one if it has the same shape. `saved_rows`: room in `saved` for more rows than there are.
  // `only_last`: without y, of which h_n is the last step.
  ForwardCall(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes, bool packed,
              int64_t cell, bool reverse, bool saves, const Tensor* used = nullptr,
              int64_t saved_rows = 0, bool only_last = false)
      : layer({x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, batch_sizes, d.reset, cell,
               reverse, packed, false, &d.masks}),
        result(room(layer, saves, used, saved_rows, only_last)),
        save(saves),
        last(only_last) {}

  static ForwardResult room(const CheckedLayer& layer, bool save, const Tensor* used,
                            int64_t saved_rows, bool last) {
    const ScalarType dtype = layer.dtype, kept = accumulator_dtype(dtype);
    const Place at = layer.place;
    const bool fits = used && used->size(used->dim() - 1) == layer.output_size;
    return {last                ? empty({0}, dtype, at)
            : fits              ? *used
            : layer.packed_rows ? empty({layer.rows, layer.output_size}, dtype, at)
                                : empty({layer.seq_len, layer.batch, layer.output_size}, dtype, at),
            empty({layer.batch, layer.output_size}, dtype, at),
            empty({layer.cell.states - 1, layer.batch, layer.hidden_size}, dtype, at),
            save ? empty({std::max(layer.rows, saved_rows), layer.planes(), layer.hidden_size},
                         kept, at)
                 : empty({0}, kept, at)};
  }

  template <class scalar_t>
  ForwardArgs<scalar_t> args() const {
    ForwardArgs<scalar_t> args{};
    layer.fill(args);
    args.y = last ? nullptr : out<scalar_t>(std::get<0>(result));
    args.h_n = out<scalar_t>(std::get<1>(result));
    args.c_n = out<scalar_t>(std::get<2>(result));
    args.saved = save ? out<accumulator_of<scalar_t>>(std::get<3>(result)) : nullptr;
    return args;
  }
};

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

// dgx, dgh, dm: gradients of the pre-activations, and with a projection what arrives at y. dgh has
// no rows where the cell keeps one buffer, dm none without a projection.
using GateResult = std::tuple<Tensor, Tensor, Tensor>;

// What backward is given beside the pass.
struct Incoming {
  OptionalTensor dy, dh_n, dc_n;
  Tensor y, saved;
  int64_t needs;
  bool gates = false;  // whether GateResult is asked for
};

// A checked backward pass with room for its results.
struct BackwardCall {
  CheckedLayer layer;
  Incoming in;
  BackwardResult result;
  std::optional<GateResult> gates;

  // `used`: a dx that nobody reads any more, for this one if it has the same shape.
  BackwardCall(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
               const Incoming& incoming, int64_t cell, bool reverse, const Tensor* used = nullptr)
      : layer({x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, batch_sizes, d.reset, cell,
               reverse, false, false, &d.masks}),
        in(checked(layer, d, incoming)),
        result(room(layer, incoming.needs, used)),
        gates(incoming.gates ? std::optional(room_for_gates(layer)) : std::nullopt) {}

  static Incoming checked(const CheckedLayer& layer, const Pass& d, const Incoming& given) {
    const ScalarType dtype = layer.dtype;
    const auto check_rows = [&](const char* name, const Tensor& tensor) {
      check_same(name, tensor, dtype, layer.place);
      if (layer.packed_rows)
        check_shape(name, tensor, "(N, P)", {layer.rows, layer.output_size});
      else
        check_shape(name, tensor, "(T, B, P)", {layer.seq_len, layer.batch, layer.output_size});
    };
    Incoming in = given;
    if (in.dy) {
      check_rows("dy", *in.dy);
      in.dy = unit_stride(*in.dy);
    }
    if (in.dh_n) {
      check_same("dh_n", *in.dh_n, dtype, layer.place);
      check_shape("dh_n", *in.dh_n, "(B, P)", {layer.batch, layer.output_size});
      in.dh_n = torch_contiguous(*in.dh_n);
    }
    if (in.dc_n) {
      check_same("dc_n", *in.dc_n, dtype, layer.place);
      check_shape("dc_n", *in.dc_n, "(S-1, B, H)",
                  {layer.cell.states - 1, layer.batch, layer.hidden_size});
      in.dc_n = torch_contiguous(*in.dc_n);
    }
    check_rows("y", in.y);
    check_same("saved", in.saved, accumulator_dtype(dtype), layer.place);
    check_shape("saved", in.saved, "(N, planes, H)",
                {layer.rows, layer.planes(), layer.hidden_size});
    const int64_t needs = in.needs;
    if (needs < 0 || needs > 255)
      fail("needs must be a mask of 8 bits, got " + std::to_string(needs));
    if ((needs & kDbIh && !d.b_ih) || (needs & kDbHh && !d.b_hh) || (needs & kDwHr && !d.w_hr))
      fail("needs asks for the gradient of an argument that is None");
    in.y = torch_contiguous(in.y);
    in.saved = torch_contiguous(in.saved);
    return in;
  }

  static BackwardResult room(const CheckedLayer& layer, int64_t needs, const Tensor* used) {
    const int64_t B = layer.batch, I = layer.input_size, H = layer.hidden_size,
                  P = layer.output_size, gates = layer.cell.gates * H;
    const auto if_needed = [&](Needs need, std::initializer_list<int64_t> sizes) {
      return empty(needs & need ? sizes : std::initializer_list<int64_t>{0}, layer.dtype,
                   layer.place);
    };
    const bool fits = used && needs & kDx && used->size(used->dim() - 1) == I;
    return {fits                ? *used
            : layer.packed_rows ? if_needed(kDx, {layer.rows, I})
                                : if_needed(kDx, {layer.seq_len, B, I}),
            if_needed(kDh0, {B, P}),
            if_needed(kDc0, {layer.cell.states - 1, B, H}),
            if_needed(kDwIh, {gates, I}),
            layer.cell.dense      ? if_needed(kDwHh, {gates, P})
            : layer.cell.diagonal ? if_needed(kDwHh, {H})
                                  : empty({0}, layer.dtype, layer.place),
            if_needed(kDbIh, {gates}),
            layer.has_b_hh() ? if_needed(kDbHh, {gates + layer.cell.parameters * H})
                             : empty({0}, layer.dtype, layer.place),
            if_needed(kDwHr, {P, H})};
  }

  static GateResult room_for_gates(const CheckedLayer& layer) {
    const int64_t columns = layer.cell.gates * layer.hidden_size;
    const auto rows = [&](bool needed, int64_t width) {
      return empty({needed ? layer.rows : 0, width}, layer.dtype, layer.place);
    };
    return {rows(true, columns), rows(layer.cell.split_gates, columns),
            rows(layer.projection, layer.output_size)};
  }

  template <class scalar_t>
  BackwardArgs<scalar_t> args() const {
    BackwardArgs<scalar_t> args{};
    layer.fill(args);
    const auto data = [](const Tensor& tensor) {
      return static_cast<const scalar_t*>(tensor.const_data_ptr());
    };
    if (in.dy) args.dy = layer.rows_of<scalar_t>(*in.dy);
    if (in.dh_n) args.dh_n = data(*in.dh_n);
    if (in.dc_n) args.dc_n = data(*in.dc_n);
    args.y = data(in.y);
    args.saved = static_cast<const accumulator_of<scalar_t>*>(in.saved.const_data_ptr());
    const auto wanted = [&](Needs need, const Tensor& tensor) {
      return in.needs & need ? out<scalar_t>(tensor) : nullptr;
    };
    args.dx = wanted(kDx, std::get<0>(result));
    args.dh0 = wanted(kDh0, std::get<1>(result));
    args.dc0 = wanted(kDc0, std::get<2>(result));
    args.dw_ih = wanted(kDwIh, std::get<3>(result));
    const bool has_w_hh = layer.cell.dense || layer.cell.diagonal;
    args.dw_hh = has_w_hh ? wanted(kDwHh, std::get<4>(result)) : nullptr;
    args.db_ih = wanted(kDbIh, std::get<5>(result));
    args.db_hh = layer.has_b_hh() ? wanted(kDbHh, std::get<6>(result)) : nullptr;
    args.dw_hr = wanted(kDwHr, std::get<7>(result));
    if (!gates) return args;
    const auto kept = [](const Tensor& tensor) {
      return tensor.size(0) > 0 ? out<scalar_t>(tensor) : nullptr;
    };
    args.dgx = kept(std::get<0>(*gates));
    args.dgh = kept(std::get<1>(*gates));
    args.dm = kept(std::get<2>(*gates));
    return args;
  }

  // The gradients of a layer without rows.
  void fill_zeros() const {
    std::apply([](const auto&... tensors) { (fill_zero(tensors), ...); }, result);
  }
};

// dgx, dgh, dm, dh0, dc0: backward without the products outside of the loop.
using GateGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
inline GateGradients gates_of(const BackwardCall& call) {
  return std::tuple_cat(*call.gates,
                        std::tuple{std::get<1>(call.result), std::get<2>(call.result)});
}

inline bool is_half(const Tensor& x) {
  const ScalarType dtype = checked_dtype("x", x);
  return accumulator_dtype(dtype) != dtype;
}

}  // namespace rnnfast
