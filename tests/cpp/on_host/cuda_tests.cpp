// The CUDA engine on the device of loops, without torch and Python, for the sanitizers: a kernel
// that reads or writes beside a buffer is found here. Results are compared with the CPU engine's.
#include "../layers.h"
#include "call.h"
#include "cpu/dispatch.h"
#include "cuda/convert.cuh"

using namespace rnnfast;

namespace {

template <class Args, class Room, class Run>
void on_device(int cell, std::vector<Args>& passes, bool chained, bool backward, unsigned seed,
               const Room& room_of, const Run& run, CudaKernel kernel = CudaKernel::kStep,
               int itemsize = 8) {
  const int count = static_cast<int>(passes.size());
  std::vector<Shape> shapes;
  for (const Args& a : passes)
    shapes.push_back(
        {cell, a.seq_len, a.batch, a.input_size, a.hidden_size, a.output_size, a.rows, itemsize});
  CudaChoice choice =
      choose_cuda({shapes.data(), count, chained, backward},
                  {90, 132, on_host::settings.shared_bytes}, {-1, static_cast<int>(kernel), true});
  check((choice.tile != nullptr) == (kernel == CudaKernel::kOnchip), "the wished kernel");
  choice.chunk_steps = std::min<int64_t>(choice.chunk_steps, 1 + seed % 5);
  call_on_device(cell, choice, room_of(cell, choice, passes.data(), count), seed,
                 [&](const CudaCall& call) { run(call, passes.data(), count, chained); });
}

void forward_on_device(std::vector<ForwardArgs<double>>& passes, int cell, bool chained,
                       unsigned seed) {
  on_device(cell, passes, chained, false, seed, forward_room<double>, cuda_forward<double>);
}
void backward_on_device(std::vector<BackwardArgs<double>>& passes, int cell, bool chained,
                        unsigned seed) {
  on_device(cell, passes, chained, true, seed, backward_room<double>, cuda_backward<double>);
}

Outputs room_for_outputs(const Layer& layer) {
  return {Values(layer.rows() * layer.P, -1), Values(layer.B * layer.P, -1),
          Values(layer.c0.size(), -1), Values(layer.rows() * layer.planes() * layer.H, -1)};
}

void check_gradients(const Gradients& a, const Gradients& b, const std::string& what) {
  check(near(a.x, b.x, 1e-10), what + ": dx");
  check(near(a.h0, b.h0, 1e-10), what + ": dh0");
  check(near(a.c0, b.c0, 1e-10), what + ": dc0");
  check(near(a.w_ih, b.w_ih, 1e-10), what + ": dw_ih");
  check(near(a.w_hh, b.w_hh, 1e-10), what + ": dw_hh");
  check(near(a.b_ih, b.b_ih, 1e-10), what + ": db_ih");
  check(near(a.b_hh, b.b_hh, 1e-10), what + ": db_hh");
  check(near(a.w_hr, b.w_hr, 1e-10), what + ": dw_hr");
}

// Passes of one call as the CPU engine takes them one by one: the directions of a layer, or layers.
void check_passes(std::vector<Layer> layers, bool chained, const std::string& what) {
  const Threads one{1, nullptr};
  const int count = static_cast<int>(layers.size()), cell = layers[0].cell;
  std::vector<Outputs> wanted;
  for (int i = 0; i < count; ++i) {
    if (chained && i > 0) layers[i].x = wanted[i - 1].y;
    wanted.push_back(room_for_outputs(layers[i]));
    auto args = forward_args(layers[i], wanted[i]);
    run_forward(active_isa(), cell, args, WeightFormat::kPlain, one);
  }
  std::vector<Cotangents> cotangents;
  for (const Outputs& out : wanted) cotangents.emplace_back(out);
  // In the order in which they run: layers from the last to the first.
  const auto nth = [&](int order) { return chained ? count - 1 - order : order; };
  std::vector<Gradients> gradients;
  for (const Layer& layer : layers) gradients.push_back(room(layer));
  const auto dy_of = [&](std::vector<Gradients>& g, int order) -> const Values& {
    return chained && order > 0 ? g[nth(order) + 1].x : cotangents[nth(order)].dy;
  };
  for (int order = 0; order < count; ++order) {
    const int i = nth(order);
    run_backward(
        active_isa(), cell,
        backward_args(layers[i], wanted[i], cotangents[i], dy_of(gradients, order), gradients[i]),
        one);
  }

  for (unsigned seed = 0; seed < 6; ++seed) {
    std::vector<Outputs> got;
    for (const Layer& layer : layers) got.push_back(room_for_outputs(layer));
    std::vector<ForwardArgs<double>> forward;
    for (int i = 0; i < count; ++i) {
      forward.push_back(forward_args(layers[i], got[i]));
      if (chained && i > 0) forward[i].x.data = got[i - 1].y.data();
    }
    forward_on_device(forward, cell, chained, seed);
    for (int i = 0; i < count; ++i) {
      const std::string here = what + ", pass " + std::to_string(i);
      check(near(got[i].y, wanted[i].y, 1e-12), here + ": y");
      check(near(got[i].h_n, wanted[i].h_n, 1e-12), here + ": h_n");
      check(near(got[i].c_n, wanted[i].c_n, 1e-12), here + ": c_n");
      check(near(got[i].saved, wanted[i].saved, 1e-12), here + ": saved");
    }
    std::vector<Gradients> g;
    for (const Layer& layer : layers) g.push_back(room(layer));
    std::vector<BackwardArgs<double>> backward;
    for (int order = 0; order < count; ++order) {
      const int i = nth(order);
      backward.push_back(backward_args(layers[i], wanted[i], cotangents[i], dy_of(g, order), g[i]));
    }
    backward_on_device(backward, cell, chained, seed);
    for (int i = 0; i < count; ++i)
      check_gradients(g[i], gradients[i], what + ", pass " + std::to_string(i));
  }
}

template <class scalar_t>
std::vector<scalar_t> narrowed(const Values& values) {
  std::vector<scalar_t> to(values.size());
  for (size_t i = 0; i < values.size(); ++i)
    RNNFAST_TARGET::narrow(static_cast<float>(values[i]), to[i]);
  return to;
}
template <class scalar_t>
void append(Values& to, const std::vector<scalar_t>& values) {
  for (const scalar_t& value : values) to.push_back(RNNFAST_TARGET::widen(value));
}

// Everything that forward and backward of a type give, in buffers of exactly their sizes.
template <class scalar_t>
Values results(const Layer& layer, CudaKernel kernel, unsigned seed) {
  using acc_t = accumulator_of<scalar_t>;
  const auto of = [](const Values& values) { return narrowed<scalar_t>(values); };
  auto x = of(layer.x), h0 = of(layer.h0), c0 = of(layer.c0), w_ih = of(layer.w_ih),
       w_hh = of(layer.w_hh), b_ih = of(layer.b_ih), b_hh = of(layer.b_hh), w_hr = of(layer.w_hr);
  std::vector<scalar_t> y(layer.rows() * layer.P), h_n(layer.B * layer.P), c_n(layer.c0.size());
  std::vector<acc_t> saved(layer.rows() * layer.planes() * layer.H);
  LayerArgs<double> sizes{};
  layer.fill(sizes);
  const auto fill = [&](LayerArgs<scalar_t>& args) {
    args.seq_len = sizes.seq_len, args.batch = sizes.batch, args.input_size = sizes.input_size,
    args.hidden_size = sizes.hidden_size, args.output_size = sizes.output_size,
    args.rows = sizes.rows, args.batch_sizes = sizes.batch_sizes, args.offsets = sizes.offsets,
    args.reverse = sizes.reverse, args.reset = sizes.reset;
    args.x = {x.data(), layer.B * layer.I, layer.I};
    args.h0 = h0.data(), args.c0 = c0.data(), args.w_ih = w_ih.data(), args.w_hh = w_hh.data(),
    args.b_ih = b_ih.data(), args.b_hh = b_hh.data(),
    args.w_hr = layer.w_hr.empty() ? nullptr : w_hr.data();
  };
  std::vector<ForwardArgs<scalar_t>> forward(1);
  fill(forward[0]);
  forward[0].y = y.data(), forward[0].h_n = h_n.data(), forward[0].c_n = c_n.data(),
  forward[0].saved = saved.data();
  on_device(layer.cell, forward, false, false, seed, forward_room<scalar_t>, cuda_forward<scalar_t>,
            kernel, sizeof(scalar_t));
  auto dx = of(layer.x), dh0 = of(layer.h0), dc0 = of(layer.c0), dw_ih = of(layer.w_ih),
       dw_hh = of(layer.w_hh), db_ih = of(layer.b_ih), db_hh = of(layer.b_hh),
       dw_hr = of(layer.w_hr);
  std::vector<BackwardArgs<scalar_t>> backward(1);
  auto& b = backward[0];
  fill(b);
  b.dy = {y.data(), layer.B * layer.P, layer.P};
  b.dh_n = h_n.data(), b.dc_n = c_n.data(), b.y = y.data(), b.saved = saved.data();
  b.dx = dx.data(), b.dh0 = dh0.data(), b.dc0 = dc0.data(), b.dw_ih = dw_ih.data(),
  b.dw_hh = dw_hh.data(), b.db_ih = db_ih.data(), b.db_hh = db_hh.data(),
  b.dw_hr = layer.w_hr.empty() ? nullptr : dw_hr.data();
  on_device(layer.cell, backward, false, true, seed, backward_room<scalar_t>,
            cuda_backward<scalar_t>, kernel, sizeof(scalar_t));
  Values all;
  for (const auto* part : {&y, &h_n, &c_n, &dx, &dh0, &dc0, &dw_ih, &dw_hh, &db_ih, &db_hh, &dw_hr})
    append(all, *part);
  append(all, saved);
  return all;
}

// Other types: either kernel, in chunks of any length.
template <class scalar_t>
void check_type(const Layer& layer, const std::string& what) {
  const Values step = results<scalar_t>(layer, CudaKernel::kStep, 3);
  const CellInfo& info = cell_info(layer.cell);
  if (!info.dense || info.options || info.stages || info.states > 2 || !layer.w_hr.empty()) return;
  for (unsigned seed = 0; seed < 5; ++seed)
    check(near(results<scalar_t>(layer, CudaKernel::kOnchip, seed), step, 2e-2),
          what + ": on chip, " + std::to_string(sizeof(scalar_t)) + " bytes");
}

}  // namespace

int main() {
  for (int cell = 0; cell < kNumCells; ++cell)
    for (const bool uneven : {false, true}) {
      const std::string name = cell_info(cell).name + std::string(uneven ? " uneven" : "");
      const Layer down(cell, 7, 5, 3, 6, 0, uneven, false), up(cell, 7, 5, 3, 6, 0, uneven, true),
          above(cell, 7, 5, 6, 6, 0, uneven, false);
      check_passes({down}, false, name);
      check_passes({up.with_resets()}, false, name + " reverse, resets");
      check_passes({down.with_masks(), up.with_resets().with_masks()}, false, name + " masks");
      check_passes({down, up}, false, name + " directions");
      check_passes({down.with_resets(), up.with_resets()}, false, name + " directions, resets");
      check_passes({down, above, above.with_resets()}, true, name + " layers");
      for (const Layer& layer : {down, up.with_resets()}) {
        check_type<float>(layer, name);
        check_type<Float16>(layer, name);
        check_type<BFloat16>(layer, name);
      }
      if (!Layer::may_project(cell)) continue;
      const Layer narrow(cell, 7, 5, 3, 6, 2, uneven, false),
          back(cell, 7, 5, 3, 6, 2, uneven, true), next(cell, 7, 5, 2, 6, 2, uneven, false);
      check_passes({narrow.with_resets(), back}, false, name + " projected directions");
      check_passes({narrow, next.with_resets()}, true, name + " projected layers");
      check_passes({narrow.with_masks(), back.with_masks()}, false, name + " projected, masks");
      check_type<BFloat16>(back, name);
    }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
