// The operators of the LSTM with recurrent batch normalisation as checked arguments, for the CPU
// and for CUDA.
#pragma once

#include <tuple>

#include "../core/batch_norm_args.h"
#include "results.h"

namespace rnnfast {

constexpr int64_t kBatchNormCell = 0;  // lstm, whose weights and states these are (cells/list.h)

// Gains and biases beside the weights.
struct Gains {
  Tensor ih, hh, c, bias_c;
};

// y, h_n, c_n, mean, var, saved
using BatchNormResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// dx, dh0, dc0, dw_ih, dw_hh, dgain_ih, dgain_hh, dbias, dgain_c, dbias_c
using BatchNormGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A checked call; pointers are valid while it lives.
class BatchNormCall {
 public:
  BatchNormCall(const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih,
                const Tensor& w_hh, const Gains& gains, const OptionalTensor& bias,
                const OptionalTensor& batch_sizes, bool training, double eps)
      : layer(checked(torch_contiguous(x), h0, c0, w_ih, w_hh, batch_sizes)),
        training_(training),
        eps_(eps) {
    const int64_t H = layer.hidden_size;
    gains_ = {checked("gain_ih", gains.ih, "(4*H,)", {4 * H}),
              checked("gain_hh", gains.hh, "(4*H,)", {4 * H}),
              checked("gain_c", gains.c, "(H,)", {H}),
              checked("bias_c", gains.bias_c, "(H,)", {H})};
    if (bias) bias_ = checked("bias", *bias, "(4*H,)", {4 * H});
    if (!(eps > 0)) fail("eps must be positive, got " + std::to_string(eps));
  }

  CheckedLayer layer;

  Tensor checked(const char* name, const Tensor& tensor, const char* letters,
                 std::initializer_list<int64_t> sizes) const {
    check_same(name, tensor, layer.dtype, layer.place);
    check_shape(name, tensor, letters, sizes);
    return torch_contiguous(tensor);
  }
  Tensor rows(const char* name, const Tensor& tensor) const {
    const int64_t H = layer.hidden_size;
    return layer.packed_rows ? checked(name, tensor, "(N, H)", {layer.rows, H})
                             : checked(name, tensor, "(T, B, H)", {layer.seq_len, layer.batch, H});
  }
  Tensor empty(std::initializer_list<int64_t> sizes) const {
    return rnnfast::empty(sizes, layer.dtype, layer.place);
  }
  Tensor empty_rows(int64_t columns) const {
    return layer.packed_rows ? empty({layer.rows, columns})
                             : empty({layer.seq_len, layer.batch, columns});
  }
  template <class scalar_t>
  void fill(LayerArgs<scalar_t>& args, BatchNorm<scalar_t>& norm) const {
    layer.fill(args);
    args.b_ih = bias_ ? data<scalar_t>(*bias_) : nullptr;
    norm = {data<scalar_t>(gains_.ih),
            data<scalar_t>(gains_.hh),
            data<scalar_t>(gains_.c),
            data<scalar_t>(gains_.bias_c),
            training_,
            eps_};
  }
  template <class scalar_t>
  static const scalar_t* data(const Tensor& tensor) {
    return static_cast<const scalar_t*>(tensor.const_data_ptr());
  }
  // Calls use with a number of the type.
  template <class Use>
  void with_number(const Use& use) const {
    if (layer.dtype == ScalarType::Float)
      use(float{});
    else
      use(double{});
  }

 private:
  static CheckedLayer checked(const Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                              const Tensor& w_ih, const Tensor& w_hh,
                              const OptionalTensor& batch_sizes) {
    const OptionalTensor none;
    CheckedLayer layer(
        {x, h0, c0, w_ih, w_hh, none, none, none, batch_sizes, none, kBatchNormCell, false});
    if (layer.dtype != accumulator_dtype(layer.dtype))
      fail(std::string("x must be float32 or float64, got ") + dtype_text(layer.dtype));
    return layer;
  }

  Gains gains_;
  OptionalTensor bias_;
  bool training_;
  double eps_;
};

// The operators by Engine::run(layer, args), args of float or double.
template <class Engine>
struct BatchNormOps {
  static BatchNormResult forward(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh,
                                 Tensor gain_ih, Tensor gain_hh, OptionalTensor bias, Tensor gain_c,
                                 Tensor bias_c, Tensor running_mean, Tensor running_var,
                                 OptionalTensor batch_sizes, bool training, double eps, bool save) {
    const BatchNormCall call(x, h0, c0, w_ih, w_hh, {gain_ih, gain_hh, gain_c, bias_c}, bias,
                             batch_sizes, training, eps);
    const CheckedLayer& layer = call.layer;
    const int64_t H = layer.hidden_size, columns = kBatchNormStatistics * H;
    const int64_t steps = running_mean.dim() == 2 ? running_mean.size(0) : 0;
    if (steps < 1)
      fail("running_mean must have shape (max_steps, 9*H), got " + shape_text(running_mean));
    const Tensor means = call.checked("running_mean", running_mean, "(max_steps, 9*H)",
                                      {steps, columns}),
                 vars =
                     call.checked("running_var", running_var, "(max_steps, 9*H)", {steps, columns});
    const bool tells = save || training;
    const auto statistics = [&] {
      return tells ? call.empty({layer.seq_len, columns}) : call.empty({0});
    };
    const BatchNormResult result{
        call.empty_rows(H),
        call.empty({layer.batch, H}),
        call.empty({1, layer.batch, H}),
        statistics(),
        statistics(),
        save ? call.empty({layer.rows, kBatchNormPlanes, H}) : call.empty({0})};
    const auto& [y, h_n, c_n, mean, var, saved] = result;
    if (layer.empty()) {
      fill_zero(mean);
      fill_zero(var);
      return result;
    }
    call.with_number(
        [&, &y = y, &h_n = h_n, &c_n = c_n, &mean = mean, &var = var, &saved = saved](auto number) {
          using scalar_t = decltype(number);
          BatchNormArgs<scalar_t> args{};
          call.fill(args, args.norm);
          args.running_mean = call.data<scalar_t>(means);
          args.running_var = call.data<scalar_t>(vars);
          args.max_steps = steps;
          args.y = out<scalar_t>(y);
          args.h_n = out<scalar_t>(h_n);
          args.c_n = out<scalar_t>(c_n);
          args.mean = tells ? out<scalar_t>(mean) : nullptr;
          args.var = tells ? out<scalar_t>(var) : nullptr;
          args.saved = save ? out<scalar_t>(saved) : nullptr;
          Engine::run(layer, args);
        });
    return result;
  }

  static BatchNormGradients backward(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                     Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh,
                                     Tensor gain_ih, Tensor gain_hh, OptionalTensor bias,
                                     Tensor gain_c, Tensor bias_c, OptionalTensor batch_sizes,
                                     Tensor y, Tensor mean, Tensor var, Tensor saved, bool training,
                                     double eps, bool needs_dx) {
    const BatchNormCall call(x, h0, c0, w_ih, w_hh, {gain_ih, gain_hh, gain_c, bias_c}, bias,
                             batch_sizes, training, eps);
    const CheckedLayer& layer = call.layer;
    const int64_t H = layer.hidden_size, B = layer.batch, columns = kBatchNormStatistics * H;
    const Tensor all_y = call.rows("y", y),
                 means = call.checked("mean", mean, "(T, 9*H)", {layer.seq_len, columns}),
                 vars = call.checked("var", var, "(T, 9*H)", {layer.seq_len, columns}),
                 kept =
                     call.checked("saved", saved, "(N, 13, H)", {layer.rows, kBatchNormPlanes, H});
    if (dy) dy = call.rows("dy", *dy);
    if (dh_n) dh_n = call.checked("dh_n", *dh_n, "(B, H)", {B, H});
    if (dc_n) dc_n = call.checked("dc_n", *dc_n, "(1, B, H)", {1, B, H});
    const BatchNormGradients result{needs_dx ? call.empty_rows(layer.input_size) : call.empty({0}),
                                    call.empty({B, H}),
                                    call.empty({1, B, H}),
                                    call.empty({4 * H, layer.input_size}),
                                    call.empty({4 * H, H}),
                                    call.empty({4 * H}),
                                    call.empty({4 * H}),
                                    call.empty({4 * H}),
                                    call.empty({H}),
                                    call.empty({H})};
    if (layer.empty()) {
      std::apply([](const auto&... tensors) { (fill_zero(tensors), ...); }, result);
      return result;
    }
    call.with_number([&](auto number) {
      using scalar_t = decltype(number);
      BatchNormBackwardArgs<scalar_t> args{};
      call.fill(args, args.norm);
      args.mean = call.data<scalar_t>(means);
      args.var = call.data<scalar_t>(vars);
      args.y = call.data<scalar_t>(all_y);
      args.saved = call.data<scalar_t>(kept);
      if (dy) args.dy = layer.rows_of<scalar_t>(*dy);
      if (dh_n) args.dh_n = call.data<scalar_t>(*dh_n);
      if (dc_n) args.dc_n = call.data<scalar_t>(*dc_n);
      args.dx = needs_dx ? out<scalar_t>(std::get<0>(result)) : nullptr;
      args.dh0 = out<scalar_t>(std::get<1>(result));
      args.dc0 = out<scalar_t>(std::get<2>(result));
      args.dw_ih = out<scalar_t>(std::get<3>(result));
      args.dw_hh = out<scalar_t>(std::get<4>(result));
      args.dgain_ih = out<scalar_t>(std::get<5>(result));
      args.dgain_hh = out<scalar_t>(std::get<6>(result));
      args.dbias = out<scalar_t>(std::get<7>(result));
      args.dgain_c = out<scalar_t>(std::get<8>(result));
      args.dbias_c = out<scalar_t>(std::get<9>(result));
      Engine::run(layer, args);
    });
    return result;
  }
};

}  // namespace rnnfast
