// The core alone, without torch and Python, for the sanitizers: every cell, instruction set, kernel
// and split, on buffers of exactly the size that a layer has. Forward is compared between
// instruction sets and kernels, backward with finite differences, one thread with two bit for bit.
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/processors.h"
#include "layers.h"

using namespace rnnfast;

namespace {

void thread_per_part(int count, void (*run)(long, long, void*), void* context) {
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back([=] { run(i, i + 1, context); });
  run(0, 1, context);
  for (auto& thread : threads) thread.join();
}

// A pool that runs everything on the caller, as a nested
// call does: the team must notice and work alone.
void one_thread(int count, void (*run)(long, long, void*), void* context) {
  run(0, count, context);
}

Outputs forward(const Layer& layer, const Threads& threads, bool only_last = false) {
  Outputs out{Values(layer.rows() * layer.P), Values(layer.B * layer.P), Values(layer.c0.size()),
              Values(layer.rows() * layer.planes() * layer.H)};
  ForwardArgs<double> args = forward_args(layer, out);
  if (only_last) args.y = args.saved = nullptr;
  run_forward(active_isa(), layer.cell, args, WeightFormat::kPlain, threads);
  return out;
}

double sum(const Values& values) {
  double total = 0;
  for (size_t i = 0; i < values.size(); ++i)
    total += values[i] * std::sin(1.0 + static_cast<double>(i % 17));
  return total;
}
double loss(const Layer& layer) {
  const Outputs out = forward(layer, {1, nullptr});
  return sum(out.y) + sum(out.h_n) + sum(out.c_n);
}
Gradients backward(const Layer& layer, const Outputs& out, const Threads& threads,
                   const Values* dy = nullptr) {
  Gradients g = room(layer);
  const Cotangents from(out);
  run_backward(active_isa(), layer.cell, backward_args(layer, out, from, dy ? *dy : from.dy, g),
               threads);
  return g;
}

void check_gradient(Layer layer, Values Layer::* member, const Values& gradient,
                    const std::string& what) {
  const size_t size = (layer.*member).size();
  for (size_t i = 0; i < size; i += 1 + size / 5) {
    const double step = 1e-5, value = (layer.*member)[i];
    (layer.*member)[i] = value + step;
    const double above = loss(layer);
    (layer.*member)[i] = value - step;
    const double below = loss(layer);
    (layer.*member)[i] = value;
    const double expected = (above - below) / (2 * step);
    check(std::fabs(expected - gradient[i]) <= 1e-6 * (1 + std::fabs(expected)),
          what + "[" + std::to_string(i) + "]");
  }
}

void check_layer(const Layer& layer, const std::string& what) {
  const Threads one{1, nullptr};
  force_isa(0);
  force_kernel(0);
  const Outputs reference = forward(layer, one);
  for (int isa = 0; isa < kNumIsas; ++isa) {
    if (!isa_available(static_cast<Isa>(isa))) continue;
    for (int kernel = 0; kernel < 2; ++kernel) {
      force_isa(isa);
      force_kernel(kernel);
      const std::string here =
          what + " " + isa_name(static_cast<Isa>(isa)) + (kernel ? " direct" : " packed");
      const Outputs out = forward(layer, one);
      check(last_run().isa == static_cast<Isa>(isa), here + ": the forced ISA ran");
      check(near(out.y, reference.y, 1e-11) && near(out.h_n, reference.h_n, 1e-11) &&
                near(out.c_n, reference.c_n, 1e-11),
            here + ": forward");
      const Gradients g = backward(layer, out, one);
      for (const auto pool : {thread_per_part, one_thread}) {
        const Outputs two = forward(layer, {2, pool});
        check(same_bits(out, two), here + ": 2 threads, forward");
        const Outputs last = forward(layer, {2, pool}, true);
        check(same_bits(out.h_n, last.h_n) && same_bits(out.c_n, last.c_n),
              here + ": the last step alone");
        const Gradients g2 = backward(layer, two, {2, pool});
        check(same_bits(g, g2), here + ": 2 threads, backward");
      }
      check_gradient(layer, &Layer::x, g.x, here + " dx");
      check_gradient(layer, &Layer::h0, g.h0, here + " dh0");
      check_gradient(layer, &Layer::c0, g.c0, here + " dc0");
      check_gradient(layer, &Layer::w_ih, g.w_ih, here + " dw_ih");
      check_gradient(layer, &Layer::w_hh, g.w_hh, here + " dw_hh");
      check_gradient(layer, &Layer::b_ih, g.b_ih, here + " db_ih");
      check_gradient(layer, &Layer::b_hh, g.b_hh, here + " db_hh");
      check_gradient(layer, &Layer::w_hr, g.w_hr, here + " dw_hr");
    }
  }
  force_isa(-1);
  force_kernel(-1);
}

// Fewer rows than threads, in all of a pass or in its last chunk: the bits of one thread.
void check_few_rows(const Layer& layer, int most_threads, const std::string& what) {
  for (int isa = 0; isa < kNumIsas; ++isa) {
    if (!isa_available(static_cast<Isa>(isa))) continue;
    force_isa(isa);
    for (int kernel = 0; kernel < 2; ++kernel) {
      force_kernel(kernel);
      const Outputs one = forward(layer, {1, nullptr});
      const Gradients g = backward(layer, one, {1, nullptr});
      for (int threads = 2; threads <= most_threads; ++threads) {
        assume_processors(threads);
        force_split(static_cast<int>(Split::kUnits));
        const std::string here = what + " " + isa_name(static_cast<Isa>(isa)) +
                                 (kernel ? " direct, " : " packed, ") + std::to_string(threads) +
                                 " threads";
        const Outputs out = forward(layer, {threads, thread_per_part});
        check(same_bits(out, one), here + ": forward");
        const Gradients many = backward(layer, out, {threads, thread_per_part});
        check(last_run().choice.split == Split::kUnits, here + ": divided by units");
        check(same_bits(many, g), here + ": backward");
        force_split(-1);
      }
      assume_processors(0);
    }
  }
  force_isa(-1);
  force_kernel(-1);
}

// Layers that read one another: side by side as one by one, forward and backward, bit for bit.
void check_stack(std::vector<Layer> layers, const std::string& what) {
  const int count = static_cast<int>(layers.size());
  std::vector<Outputs> outs;
  for (int l = 0; l < count; ++l) {
    if (l > 0) layers[l].x = outs[l - 1].y;
    outs.push_back(forward(layers[l], {1, nullptr}));
  }
  std::vector<Gradients> wanted(count);
  for (int l = count - 1; l >= 0; --l) {
    const Values dy = l + 1 < count ? wanted[l + 1].x : weights_of_sum(outs[l].y.size());
    wanted[l] = backward(layers[l], outs[l], {1, nullptr}, &dy);
  }
  for (const auto pool : {thread_per_part, one_thread})
    for (const int threads : {2, 3, 4, 6}) {  // teams of one, two and three
      assume_processors(threads);
      force_split(static_cast<int>(Split::kLayers));
      std::vector<Outputs> got = outs;
      std::vector<ForwardArgs<double>> args(count);
      const std::vector<WeightFormat> formats(count, WeightFormat::kPlain);
      for (int l = 0; l < count; ++l) {
        for (Values* values : {&got[l].y, &got[l].h_n, &got[l].c_n, &got[l].saved})
          std::fill(values->begin(), values->end(), -1.0);
        args[l] = forward_args(layers[l], got[l]);
        if (l > 0) args[l].x.data = got[l - 1].y.data();
      }
      run_forward_group(active_isa(), layers[0].cell, args.data(), formats.data(), count, true,
                        {threads, pool});
      for (int l = 0; l < count; ++l)
        check(same_bits(got[l], outs[l]),
              what + ": side by side, forward of layer " + std::to_string(l));

      // From the last layer to the first, which is the order of the arguments.
      std::vector<Gradients> grads;
      for (const Layer& layer : layers) grads.push_back(room(layer));
      std::vector<Cotangents> cotangents;
      for (const Outputs& out : outs) cotangents.emplace_back(out);
      std::vector<BackwardArgs<double>> back(count);
      for (int i = 0; i < count; ++i) {
        const int l = count - 1 - i;
        const Values& dy = i == 0 ? cotangents[l].dy : grads[l + 1].x;
        back[i] = backward_args(layers[l], outs[l], cotangents[l], dy, grads[l]);
      }
      run_backward_group(active_isa(), layers[0].cell, back.data(), count, true, {threads, pool});
      for (int l = 0; l < count; ++l)
        check(same_bits(grads[l], wanted[l]),
              what + ": side by side, backward of layer " + std::to_string(l));
      force_split(-1);
      assume_processors(0);
    }
}

// Teams: all members run at once, the barrier orders their writes, and a pool that brings fewer
// threads is noticed.
void check_teams() {
  struct Shared {
    int slots[4];
    bool good = true;
  } shared;
  const auto work = [](void* context, const Worker& worker) {
    auto& s = *static_cast<Shared*>(context);
    for (int round = 0; round < 200; ++round) {
      s.slots[worker.index] = round;
      barrier(worker);
      if (worker.index == 0)
        for (int i = 0; i < worker.count; ++i) s.good = s.good && s.slots[i] == round;
      barrier(worker);
    }
  };
  for (int count : {1, 2, 3}) {
    run_team(count, thread_per_part, work, &shared);
    check(shared.good, "barrier of " + std::to_string(count));
  }
  check(run_team(3, one_thread, work, &shared) == 1, "a pool of one thread makes a team of one");
}

// Gradients of samples, on buffers without a number to spare.
void check_samples(int64_t steps, int64_t samples, int64_t batch, int64_t rows, int64_t columns) {
  const int64_t each = steps * samples * batch;
  Values left(each * rows), right(each * columns);
  for (size_t i = 0; i < left.size(); ++i) left[i] = std::sin(1.0 + static_cast<double>(i));
  for (size_t i = 0; i < right.size(); ++i) right[i] = std::cos(2.0 * static_cast<double>(i));
  Values expected(samples * rows * columns);
  for (int64_t k = 0; k < each; ++k)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        expected[(k / batch % samples * rows + i) * columns + j] +=
            left[k * rows + i] * right[k * columns + j];
  const std::string what = "samples of " + std::to_string(rows) + " x " + std::to_string(columns);
  for (int isa = 0; isa < kNumIsas; ++isa) {
    if (!isa_available(static_cast<Isa>(isa))) continue;
    force_isa(isa);
    Values one(expected.size()), two(expected.size());
    run_sample_product<double>(
        {steps, samples, batch, rows, columns, left.data(), right.data(), one.data()},
        {1, nullptr});
    run_sample_product<double>(
        {steps, samples, batch, rows, columns, left.data(), right.data(), two.data()},
        {2, thread_per_part});
    check(near(one, expected, 1e-11), what + ", " + isa_name(static_cast<Isa>(isa)));
    check(same_bits(one, two), what + ": two threads");
  }
  force_isa(-1);
}

}  // namespace

int main() {
  check_teams();
  check_samples(1, 1, 1, 1, 1);
  check_samples(5, 3, 2, 7, 5);
  check_samples(4, 2, 1, 48, 64);
  check_samples(530, 2, 1, 9, 17);
  check_samples(3, 4, 5, 50, 130);
  for (int cell = 0; cell < kNumCells; ++cell)
    for (const bool reverse : {false, true})
      for (const bool uneven : {false, true}) {
        const std::string what = std::string(cell_info(cell).name) + (reverse ? " reverse" : "") +
                                 (uneven ? " uneven" : "");
        const Layer small(cell, 3, 5, 3, 5, 0, uneven, reverse);
        check_layer(small, what + " small");
        check_layer(small.with_resets(), what + " small, resets");
        if (small.may_drop()) check_layer(small.with_masks(), what + " small, masks");
        if (Layer::may_project(cell))
          check_layer(Layer(cell, 3, 4, 3, 7, 3, uneven, reverse), what + " projected");
      }
  for (int cell = 0; cell < kNumCells; ++cell) {
    if (cell_info(cell).stages) continue;  // such are not divided by units
    const std::string name = cell_info(cell).name;
    // Whole vectors of dx, and part of one: products of no rows differ.
    for (const int64_t inputs : {8, 33})
      check_few_rows(Layer(cell, 1, 1, inputs, 130, 0, false, false), 3,
                     name + ", 1 row of " + std::to_string(inputs));
    if (Layer::may_project(cell))
      check_few_rows(Layer(cell, 1, 1, 8, 130, 9, false, false), 3, name + ", 1 row, projected");
    // The last chunk of backward holds one row, of all 513 steps.
    check_few_rows(Layer(cell, 513, 1, 8, 130, 0, false, true), 2, name + ", 512 + 1 rows");
  }
  // Large enough for two threads: by rows of the batch, and by units.
  check_layer(Layer(0, 4, 26, 40, 50, 0, false, false), "lstm by rows");
  check_layer(Layer(1, 6, 26, 40, 50, 0, true, true), "gru by rows, uneven");
  check_layer(Layer(0, 16, 3, 33, 90, 0, false, false), "lstm by units");
  check_layer(Layer(0, 16, 3, 33, 90, 40, false, true), "lstm projected by units");
  check_layer(Layer(1, 6, 26, 40, 50, 0, true, true).with_resets(), "gru by rows, resets");
  check_layer(Layer(0, 16, 3, 33, 90, 0, false, false).with_resets(), "lstm by units, resets");
  check_layer(Layer(0, 16, 3, 33, 90, 40, false, true).with_resets(), "lstm projected, resets");
  check_layer(Layer(0, 16, 3, 33, 90, 40, false, true).with_masks(), "lstm projected, masks");
  check_layer(Layer(1, 6, 26, 40, 50, 0, true, true).with_masks(), "gru by rows, masks");
  for (int cell = 0; cell < kNumCells; ++cell)
    for (const bool uneven : {false, true}) {
      const Layer first(cell, 70, 9, 6, 20, 0, uneven, false),
          above(cell, 70, 9, 20, 20, 0, uneven, false);
      check_stack({first, above, above}, std::string(cell_info(cell).name) + " stack");
      check_stack({first.with_resets(), above.with_resets()},
                  std::string(cell_info(cell).name) + " stack, resets");
      if (Layer::may_project(cell)) {
        const Layer narrow(cell, 70, 9, 6, 20, 7, uneven, false),
            next(cell, 70, 9, 7, 20, 7, uneven, false);
        check_stack({narrow, next}, std::string(cell_info(cell).name) + " stack, projected");
      }
    }
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
