// The operators that run a layer, or both directions of one, forward and backward. Allocation,
// checks and the way into the engine; no maths.
#include "../cpu/dispatch.h"
#include "results.h"

namespace rnnfast {
namespace {

Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int count, void (*run)(long, long, void*), void* context) {
            torch::stable::parallel_for(
                0, count, 1, [&](int64_t begin, int64_t end) { run(begin, end, context); });
          }};
}

// y, h_n, c_n, saved
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What a direction of a layer is given, beside x and batch_sizes, which both directions share.
struct Direction {
  OptionalTensor h0, c0;
  Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh, w_hr, reset;
};

// A checked forward pass with room for its results.
struct ForwardCall {
  CheckedLayer layer;
  OptionalTensor packed;
  ForwardResult result;
  bool save;

  ForwardCall(const Tensor& x, const Direction& d, const OptionalTensor& batch_sizes,
              const OptionalTensor& packed_weights, int64_t cell, bool reverse, bool saves)
      : layer({x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, batch_sizes, d.reset, cell,
               reverse, packed_weights.has_value()}),
        packed(packed_weights),
        result(room(layer, saves)),
        save(saves) {
    if (packed && (!packed->is_cpu() || packed->scalar_type() != ScalarType::Byte ||
                   packed->dim() != 1 || !packed->is_contiguous()))
      fail("packed must be a uint8 CPU tensor as pack returned it, got one of shape " +
           shape_text(*packed));
  }

  static ForwardResult room(const CheckedLayer& layer, bool save) {
    const ScalarType dtype = layer.dtype, kept = accumulator_dtype(dtype);
    return {layer.packed_rows ? empty({layer.rows, layer.output_size}, dtype)
                              : empty({layer.seq_len, layer.batch, layer.output_size}, dtype),
            empty({layer.batch, layer.output_size}, dtype),
            empty({layer.cell.states - 1, layer.batch, layer.hidden_size}, dtype),
            save ? empty({layer.rows, layer.planes(), layer.hidden_size}, kept) : empty({0}, kept)};
  }

  template <class scalar_t>
  ForwardArgs<scalar_t> args(Isa isa, int64_t cell, WeightFormat& format) const {
    ForwardArgs<scalar_t> args{};
    layer.fill(args);
    format = WeightFormat::kPlain;
    if (packed && !take_packed(isa, static_cast<int>(cell),
                               static_cast<const char*>(packed->const_data_ptr()), packed->numel(),
                               args, format))
      fail(std::string("packed was made for another ISA, dtype, cell or size of weights than ") +
           layer.cell.name + " on " + isa_name(isa) + "; call pack again");
    args.y = out<scalar_t>(std::get<0>(result));
    args.h_n = out<scalar_t>(std::get<1>(result));
    args.c_n = out<scalar_t>(std::get<2>(result));
    args.saved = save ? out<accumulator_of<scalar_t>>(std::get<3>(result)) : nullptr;
    return args;
  }
};

ForwardResult forward(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh,
                      OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                      OptionalTensor batch_sizes, OptionalTensor reset, OptionalTensor packed,
                      int64_t cell, bool reverse, bool save) {
  const ForwardCall call(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, batch_sizes, packed,
                         cell, reverse, save);
  if (call.layer.empty()) return call.result;
  const Isa isa = active_isa();
  with_type(call.layer.dtype, [&](auto scalar) {
    WeightFormat format;
    auto args = call.args<decltype(scalar)>(isa, cell, format);
    run_forward(isa, static_cast<int>(cell), args, format, torch_threads());
  });
  return call.result;
}

// h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset, as forward_both and backward_both take them.
using Tensors = std::vector<OptionalTensor>;
Direction direction_of(const char* name, const Tensors& tensors, size_t more) {
  if (tensors.size() != 8 + more)
    fail(std::string(name) + " must hold " + std::to_string(8 + more) + " tensors or None, got " +
         std::to_string(tensors.size()));
  if (!tensors[2] || !tensors[3]) fail(std::string(name) + " must hold w_ih and w_hh, got None");
  return {tensors[0], tensors[1], *tensors[2], *tensors[3],
          tensors[4], tensors[5], tensors[6],  tensors[7]};
}

void check_alike(const CheckedLayer& a, const CheckedLayer& b) {
  if (a.hidden_size == b.hidden_size && a.output_size == b.output_size &&
      a.projection == b.projection)
    return;
  fail("second must have the hidden size of first, (H, P) = (" + std::to_string(a.hidden_size) +
       ", " + std::to_string(a.output_size) + "), got (" + std::to_string(b.hidden_size) + ", " +
       std::to_string(b.output_size) + ")" +
       (a.projection == b.projection ? "" : ", and w_hr in one of them only"));
}

// Both directions of a layer; `first` and `second` end with packed weights. Gives y, h_n, c_n and
// saved of the first, then of the second.
std::vector<Tensor> forward_both(Tensor x, Tensors first, Tensors second,
                                 OptionalTensor batch_sizes, int64_t cell, bool save) {
  const ForwardCall calls[] = {
      {x, direction_of("first", first, 1), batch_sizes, first[8], cell, false, save},
      {x, direction_of("second", second, 1), batch_sizes, second[8], cell, true, save}};
  check_alike(calls[0].layer, calls[1].layer);
  if (!calls[0].layer.empty()) {
    const Isa isa = active_isa();
    with_type(calls[0].layer.dtype, [&](auto scalar) {
      using scalar_t = decltype(scalar);
      WeightFormat formats[2];
      ForwardArgs<scalar_t> args[] = {calls[0].args<scalar_t>(isa, cell, formats[0]),
                                      calls[1].args<scalar_t>(isa, cell, formats[1])};
      run_forward_both(isa, static_cast<int>(cell), args, formats, torch_threads());
    });
  }
  std::vector<Tensor> results;
  for (const ForwardCall& call : calls)
    std::apply([&](const auto&... tensors) { (results.push_back(tensors), ...); }, call.result);
  return results;
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

// What backward is given beside the direction.
struct Incoming {
  OptionalTensor dy, dh_n, dc_n;
  Tensor y, saved;
  int64_t needs;
};

// A checked backward pass in float32 or float64 with room for its results.
struct BackwardCall {
  CheckedLayer layer;
  Incoming in;
  BackwardResult result;

  BackwardCall(const Tensor& x, const Direction& d, const OptionalTensor& batch_sizes,
               const Incoming& incoming, int64_t cell, bool reverse)
      : layer({x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, batch_sizes, d.reset, cell,
               reverse}),
        in(checked(layer, d, incoming)),
        result(room(layer, incoming.needs)) {}

  static Incoming checked(const CheckedLayer& layer, const Direction& d, const Incoming& given) {
    const ScalarType dtype = layer.dtype;
    const auto check_rows = [&](const char* name, const Tensor& tensor) {
      check_same(name, tensor, dtype);
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
      check_same("dh_n", *in.dh_n, dtype);
      check_shape("dh_n", *in.dh_n, "(B, P)", {layer.batch, layer.output_size});
      in.dh_n = torch_contiguous(*in.dh_n);
    }
    if (in.dc_n) {
      check_same("dc_n", *in.dc_n, dtype);
      check_shape("dc_n", *in.dc_n, "(S-1, B, H)",
                  {layer.cell.states - 1, layer.batch, layer.hidden_size});
      in.dc_n = torch_contiguous(*in.dc_n);
    }
    check_rows("y", in.y);
    check_same("saved", in.saved, accumulator_dtype(dtype));
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

  static BackwardResult room(const CheckedLayer& layer, int64_t needs) {
    const int64_t B = layer.batch, I = layer.input_size, H = layer.hidden_size,
                  P = layer.output_size, gates = layer.cell.gates * H;
    const auto if_needed = [&](Needs need, std::initializer_list<int64_t> sizes) {
      return needs & need ? empty(sizes, layer.dtype) : empty({0}, layer.dtype);
    };
    return {
        layer.packed_rows ? if_needed(kDx, {layer.rows, I}) : if_needed(kDx, {layer.seq_len, B, I}),
        if_needed(kDh0, {B, P}),
        if_needed(kDc0, {layer.cell.states - 1, B, H}),
        if_needed(kDwIh, {gates, I}),
        layer.cell.diagonal ? if_needed(kDwHh, {H}) : if_needed(kDwHh, {gates, P}),
        if_needed(kDbIh, {gates}),
        if_needed(kDbHh, {gates}),
        if_needed(kDwHr, {P, H})};
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
    args.saved = data(in.saved);
    const auto wanted = [&](Needs need, const Tensor& tensor) {
      return in.needs & need ? out<scalar_t>(tensor) : nullptr;
    };
    args.dx = wanted(kDx, std::get<0>(result));
    args.dh0 = wanted(kDh0, std::get<1>(result));
    args.dc0 = wanted(kDc0, std::get<2>(result));
    args.dw_ih = wanted(kDwIh, std::get<3>(result));
    args.dw_hh = wanted(kDwHh, std::get<4>(result));
    args.db_ih = wanted(kDbIh, std::get<5>(result));
    args.db_hh = wanted(kDbHh, std::get<6>(result));
    args.dw_hr = wanted(kDwHr, std::get<7>(result));
    return args;
  }

  void run(int64_t cell) const {
    if (layer.empty())
      std::apply([](const auto&... tensors) { (fill_zero(tensors), ...); }, result);
    else if (layer.dtype == ScalarType::Float)
      run_backward(active_isa(), static_cast<int>(cell), args<float>(), torch_threads());
    else
      run_backward(active_isa(), static_cast<int>(cell), args<double>(), torch_threads());
  }
};

bool is_half(const Tensor& x) {
  const ScalarType dtype = checked_dtype("x", x);
  return accumulator_dtype(dtype) != dtype;
}

// 16-bit numbers are widened once and their gradients rounded once; all between is float32.
BackwardResult backward_of_half(const Tensor& x, const Direction& d,
                                const OptionalTensor& batch_sizes, const Incoming& in, int64_t cell,
                                bool reverse) {
  // The checks, on the tensors as they came.
  BackwardCall::checked(CheckedLayer({x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr,
                                      batch_sizes, d.reset, cell, reverse}),
                        d, in);
  const BackwardCall wide(
      widened(x),
      {widened(d.h0), widened(d.c0), widened(d.w_ih), widened(d.w_hh), widened(d.b_ih),
       widened(d.b_hh), widened(d.w_hr), d.reset},
      batch_sizes,
      {widened(in.dy), widened(in.dh_n), widened(in.dc_n), widened(in.y), in.saved, in.needs}, cell,
      reverse);
  wide.run(cell);
  return std::apply(
      [&](const auto&... tensors) { return BackwardResult{narrowed(tensors, x.scalar_type())...}; },
      wide.result);
}

BackwardResult backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n, Tensor x,
                        OptionalTensor h0, OptionalTensor c0, Tensor w_ih, Tensor w_hh,
                        OptionalTensor b_ih, OptionalTensor b_hh, OptionalTensor w_hr,
                        OptionalTensor batch_sizes, OptionalTensor reset, Tensor y, Tensor saved,
                        int64_t cell, bool reverse, int64_t needs) {
  const Direction direction{h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset};
  const Incoming incoming{dy, dh_n, dc_n, y, saved, needs};
  if (is_half(x)) return backward_of_half(x, direction, batch_sizes, incoming, cell, reverse);
  const BackwardCall call(x, direction, batch_sizes, incoming, cell, reverse);
  call.run(cell);
  return call.result;
}

// As backward, for both directions; `first` and `second` end with y, saved, dy, dh_n, dc_n. Gives
// the gradients of the first, then of the second.
std::vector<Tensor> backward_both(Tensor x, Tensors first, Tensors second,
                                  OptionalTensor batch_sizes, int64_t cell, int64_t needs_first,
                                  int64_t needs_second) {
  const Direction directions[] = {direction_of("first", first, 5),
                                  direction_of("second", second, 5)};
  const auto incoming = [](const char* name, const Tensors& from, int64_t needs) -> Incoming {
    if (!from[8] || !from[9]) fail(std::string(name) + " must hold y and saved, got None");
    return {from[10], from[11], from[12], *from[8], *from[9], needs};
  };
  const Incoming in[] = {incoming("first", first, needs_first),
                         incoming("second", second, needs_second)};
  std::vector<Tensor> results;
  const auto give = [&](const BackwardResult& result) {
    std::apply([&](const auto&... tensors) { (results.push_back(tensors), ...); }, result);
  };
  if (is_half(x)) {
    for (int i = 0; i < 2; ++i)
      give(backward_of_half(x, directions[i], batch_sizes, in[i], cell, i == 1));
    return results;
  }
  const BackwardCall calls[] = {{x, directions[0], batch_sizes, in[0], cell, false},
                                {x, directions[1], batch_sizes, in[1], cell, true}};
  check_alike(calls[0].layer, calls[1].layer);
  if (calls[0].layer.empty()) {
    for (const BackwardCall& call : calls) call.run(cell);
  } else {
    const auto run = [&](auto scalar) {
      using scalar_t = decltype(scalar);
      const BackwardArgs<scalar_t> args[] = {calls[0].args<scalar_t>(), calls[1].args<scalar_t>()};
      run_backward_both(active_isa(), static_cast<int>(cell), args, torch_threads());
    };
    if (calls[0].layer.dtype == ScalarType::Float)
      run(float{});
    else
      run(double{});
  }
  for (const BackwardCall& call : calls) give(call.result);
  return results;
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
      "backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor "
      "w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor? reset, Tensor y, "
      "Tensor saved, int "
      "cell, bool reverse, "
      "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "forward_both(Tensor x, Tensor?[] first, Tensor?[] second, Tensor? batch_sizes, int cell, "
      "bool save) -> Tensor[]");
  m.def(
      "backward_both(Tensor x, Tensor?[] first, Tensor?[] second, Tensor? batch_sizes, int cell, "
      "int needs_first, int needs_second) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("forward", TORCH_BOX(&rnnfast::forward));
  m.impl("backward", TORCH_BOX(&rnnfast::backward));
  m.impl("forward_both", TORCH_BOX(&rnnfast::forward_both));
  m.impl("backward_both", TORCH_BOX(&rnnfast::backward_both));
}
