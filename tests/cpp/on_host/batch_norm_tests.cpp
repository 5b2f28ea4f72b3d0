// The LSTM with recurrent batch normalisation on the device of loops, without torch and Python, for
// the sanitizers: in chunks of any length, against the CPU engine.
#include "../layers.h"
#include "call.h"
#include "cpu/dispatch.h"

using namespace rnnfast;

namespace {

constexpr int kLstm = 0;

// A layer's numbers, and everything that forward and backward give, in buffers of exactly their
// sizes.
struct BatchNormLayer {
  Layer layer;
  int64_t max_steps;
  bool training, statistics;
  Values gain_ih, gain_hh, gain_c, bias_c, running_mean, running_var;
  Values y, h_n, c_n, saved, mean, var;
  Values dx, dh0, dc0, dw_ih, dw_hh, dgain_ih, dgain_hh, dbias, dgain_c, dbias_c;

  BatchNormLayer(const Layer& given, int64_t steps, bool trains, bool asks)
      : layer(given), max_steps(steps), training(trains), statistics(asks) {
    const int64_t H = layer.H, N = layer.rows(), columns = kBatchNormStatistics * H;
    gain_ih = gain_hh = weights_of_sum(4 * H);
    gain_c = bias_c = weights_of_sum(H);
    running_mean = running_var = weights_of_sum(max_steps * columns);
    for (double& v : running_var) v += 1.5;
    y.assign(N * H, -1), h_n.assign(layer.B * H, -1), c_n = h_n;
    saved.assign(N * kBatchNormPlanes * H, -1);
    mean.assign(layer.T * columns, -1), var = mean;
    dx.assign(layer.x.size(), -1), dh0.assign(layer.B * H, -1), dc0 = dh0;
    dw_ih.assign(layer.w_ih.size(), -1), dw_hh.assign(layer.w_hh.size(), -1);
    dgain_ih.assign(4 * H, -1), dgain_hh = dbias = dgain_ih;
    dgain_c.assign(H, -1), dbias_c = dgain_c;
  }
  BatchNorm<double> norm() const {
    return {gain_ih.data(), gain_hh.data(), gain_c.data(), bias_c.data(), training, 1e-5};
  }
  BatchNormArgs<double> forward() {
    BatchNormArgs<double> args{};
    layer.fill(args);
    args.b_hh = nullptr;
    args.norm = norm();
    args.running_mean = running_mean.data(), args.running_var = running_var.data();
    args.max_steps = max_steps;
    args.y = y.data(), args.h_n = h_n.data(), args.c_n = c_n.data();
    if (statistics) args.mean = mean.data(), args.var = var.data(), args.saved = saved.data();
    return args;
  }
  BatchNormBackwardArgs<double> backward(const Cotangents& given, bool needs_dx) {
    BatchNormBackwardArgs<double> args{};
    layer.fill(args);
    args.b_hh = nullptr;
    args.norm = norm();
    args.mean = mean.data(), args.var = var.data();
    args.dy = {given.dy.data(), layer.B * layer.H, layer.H};
    args.dh_n = given.dh.data(), args.dc_n = given.dc.data();
    args.y = y.data(), args.saved = saved.data();
    args.dx = needs_dx ? dx.data() : nullptr;
    args.dh0 = dh0.data(), args.dc0 = dc0.data(), args.dw_ih = dw_ih.data(),
    args.dw_hh = dw_hh.data(), args.dgain_ih = dgain_ih.data(), args.dgain_hh = dgain_hh.data(),
    args.dbias = dbias.data(), args.dgain_c = dgain_c.data(), args.dbias_c = dbias_c.data();
    return args;
  }
  std::vector<std::pair<const char*, const Values*>> results() const {
    return {{"y", &y},
            {"h_n", &h_n},
            {"c_n", &c_n},
            {"saved", &saved},
            {"mean", &mean},
            {"var", &var},
            {"dx", &dx},
            {"dh0", &dh0},
            {"dc0", &dc0},
            {"dw_ih", &dw_ih},
            {"dw_hh", &dw_hh},
            {"dbias", &dbias},
            {"dgain_c", &dgain_c},
            {"dbias_c", &dbias_c},
            {"dgain_ih", &dgain_ih},
            {"dgain_hh", &dgain_hh}};
  }
};

template <class Args>
void on_device(const Args& args, unsigned seed) {
  const CudaChoice choice{Launch::kPlain, 1, std::min<int64_t>(args.seq_len, 1 + seed % 5)};
  call_on_device(kLstm, choice, batch_norm_room(choice, args), seed,
                 [&](const CudaCall& call) { cuda_batch_norm(call, args); });
}

void check_layer(const Layer& layer, int64_t max_steps, bool training, const std::string& what) {
  const Threads one{1, nullptr};
  for (const bool keeps : {true, false}) {
    BatchNormLayer want(layer, max_steps, training, keeps);
    run_batch_norm(want.forward(), one);
    const Outputs outputs{want.y, want.h_n, want.c_n, {}};
    const Cotangents given(outputs);
    if (keeps) run_batch_norm(want.backward(given, true), one);
    for (unsigned seed = 0; seed < 5; ++seed) {
      BatchNormLayer got(layer, max_steps, training, keeps);
      const bool needs_dx = seed > 0;
      on_device(got.forward(), seed);
      if (keeps) on_device(got.backward(given, needs_dx), seed);
      if (!needs_dx) got.dx = want.dx;
      const auto all = got.results(), expected = want.results();
      for (size_t k = 0; k < all.size(); ++k)
        check(near(*all[k].second, *expected[k].second, 1e-9), what + ": " + all[k].first);
    }
  }
}

}  // namespace

int main() {
  for (const bool uneven : {false, true})
    for (const bool training : {false, true}) {
      const std::string what =
          std::string(uneven ? "uneven" : "even") + (training ? ", training" : ", eval");
      check_layer(Layer(kLstm, 7, 5, 3, 6, 0, uneven, false), 3, training, what);
      check_layer(Layer(kLstm, 4, 37, 2, 17, 0, uneven, false), 9, training, what + ", tiles");
      check_layer(Layer(kLstm, 3, 2, 1, 1, 0, uneven, false), 1, training, what + ", one unit");
    }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
