// The operators that run several passes in one call, so that they may run side by side: the
// directions of a layer, or (`chained`) layers, each over the results of the one before.
#include <algorithm>

#include "layer_calls.h"

namespace rnnfast {
namespace {

using Tensors = std::vector<OptionalTensor>;

// Of each pass: h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset, then what `forward` or `backward`
// needs.
constexpr size_t kOfForward = 9, kOfBackward = 13;

int count_passes(const Tensors& passes, size_t each, bool chained) {
  const size_t count = passes.size() / each;
  if (count * each != passes.size() || count < 1 || (!chained && count != 2))
    fail("passes must hold " + std::to_string(each) + " tensors or None for each " +
         (chained ? "layer" : "of two directions") + ", got " + std::to_string(passes.size()));
  return static_cast<int>(count);
}

Pass pass_of(const Tensors& passes, size_t first) {
  const auto* t = &passes[first];
  if (!t[2] || !t[3])
    fail("passes must hold w_ih and w_hh, got None for one of them at " +
         std::to_string(first + 2));
  return {t[0], t[1], *t[2], *t[3], t[4], t[5], t[6], t[7]};
}

void check_alike(const CheckedLayer& a, const CheckedLayer& b) {
  if (a.hidden_size == b.hidden_size && a.output_size == b.output_size &&
      a.projection == b.projection)
    return;
  fail("the second direction must have the hidden size of the first, (H, P) = (" +
       std::to_string(a.hidden_size) + ", " + std::to_string(a.output_size) + "), got (" +
       std::to_string(b.hidden_size) + ", " + std::to_string(b.output_size) + ")" +
       (a.projection == b.projection ? "" : ", and w_hr in one of them only"));
}

// Layers that run at the same time, at most one a thread, and what the first of them reads, have a
// y (in backward: a dx) each. Beyond these, it is one that nobody reads any more.
int layers_apart(const Threads& threads) { return std::max(1, threads.count) + 1; }

// Gives y, h_n, c_n and saved of each pass; of chained ones that save nothing, only the last y may
// be read.
std::vector<Tensor> forward_group(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                  int64_t cell, bool chained, bool save) {
  const int count = count_passes(passes, kOfForward, chained);
  const Threads threads = torch_threads();
  const int apart = layers_apart(threads);
  std::vector<ForwardCall> calls;
  calls.reserve(count);
  for (int i = 0; i < count; ++i) {
    const size_t first = kOfForward * i;
    calls.emplace_back(
        chained && i > 0 ? std::get<0>(calls[i - 1].result) : x, pass_of(passes, first),
        batch_sizes, passes[first + 8], cell, !chained && i == 1, save,
        chained && !save && i >= apart ? &std::get<0>(calls[i - apart].result) : nullptr);
  }
  if (!chained) check_alike(calls[0].layer, calls[1].layer);
  if (!calls[0].layer.empty()) {
    const Isa isa = active_isa();
    with_type(calls[0].layer.dtype, [&](auto scalar) {
      std::vector<WeightFormat> formats(count);
      std::vector<ForwardArgs<decltype(scalar)>> args;
      for (int i = 0; i < count; ++i)
        args.push_back(calls[i].args<decltype(scalar)>(isa, cell, formats[i]));
      run_forward_group(isa, static_cast<int>(cell), args.data(), formats.data(), count, chained,
                        threads);
    });
  }
  std::vector<Tensor> results;
  for (const ForwardCall& call : calls)
    std::apply([&](const auto&... tensors) { (results.push_back(tensors), ...); }, call.result);
  return results;
}

// Each pass ends with y, saved, dy, dh_n, dc_n; of chained ones only the last has a dy. Gives the
// gradients of each pass as `backward` does; of chained ones only the first dx may be read.
// needs[i] is the i-th's.
std::vector<Tensor> backward_group(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                   int64_t cell, bool chained, std::vector<int64_t> needs) {
  const int count = count_passes(passes, kOfBackward, chained);
  if (needs.size() != static_cast<size_t>(count))
    fail("needs must hold a mask for each of " + std::to_string(count) + " passes, got " +
         std::to_string(needs.size()));
  const auto more = [&](int i) { return &passes[kOfBackward * i + 8]; };
  for (int i = 0; i < count; ++i) {
    if (!more(i)[0] || !more(i)[1]) fail("passes must hold y and saved of each, got None");
    if (chained && i + 1 < count && more(i)[2])
      fail("passes must hold dy of the last layer only, got one of layer " + std::to_string(i));
  }
  // In the order in which they run: layers from the last to the first.
  const auto nth = [&](int order) { return chained ? count - 1 - order : order; };
  const auto input_of = [&](int i) { return chained && i > 0 ? *more(i - 1)[0] : x; };
  const auto needs_of = [&](int i) { return chained && i > 0 ? needs[i] | kDx : needs[i]; };
  const auto incoming = [&](int i, const OptionalTensor& dy) -> Incoming {
    return {dy, more(i)[3], more(i)[4], *more(i)[0], *more(i)[1], needs_of(i)};
  };

  std::vector<BackwardResult> gradients;  // in that order
  if (is_half(x)) {
    for (int order = 0; order < count; ++order) {
      const int i = nth(order);
      OptionalTensor dy = more(i)[2];
      if (chained && order > 0) dy = std::get<0>(gradients.back());
      gradients.push_back(backward_of_half(input_of(i), pass_of(passes, kOfBackward * i),
                                           batch_sizes, incoming(i, dy), cell, !chained && i == 1));
    }
  } else {
    const Threads threads = torch_threads();
    const int apart = layers_apart(threads);
    std::vector<BackwardCall> calls;
    calls.reserve(count);
    for (int order = 0; order < count; ++order) {
      const int i = nth(order);
      OptionalTensor dy = more(i)[2];
      if (chained && order > 0) dy = std::get<0>(calls.back().result);
      calls.emplace_back(
          input_of(i), pass_of(passes, kOfBackward * i), batch_sizes, incoming(i, dy), cell,
          !chained && i == 1,
          chained && i > 0 && order >= apart ? &std::get<0>(calls[order - apart].result) : nullptr);
    }
    if (!chained) check_alike(calls[0].layer, calls[1].layer);
    const auto run = [&](auto scalar) {
      std::vector<BackwardArgs<decltype(scalar)>> args;
      for (const BackwardCall& call : calls) args.push_back(call.args<decltype(scalar)>());
      run_backward_group(active_isa(), static_cast<int>(cell), args.data(), count, chained,
                         threads);
    };
    if (calls[0].layer.empty())
      for (const BackwardCall& call : calls) call.run(cell);
    else if (calls[0].layer.dtype == ScalarType::Float)
      run(float{});
    else
      run(double{});
    for (const BackwardCall& call : calls) gradients.push_back(call.result);
  }
  std::vector<Tensor> results;
  for (int i = 0; i < count; ++i)
    std::apply([&](const auto&... tensors) { (results.push_back(tensors), ...); },
               gradients[nth(i)]);
  return results;
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def(
      "forward_group(Tensor x, Tensor?[] passes, Tensor? batch_sizes, int cell, bool chained, bool "
      "save) -> Tensor[]");
  m.def(
      "backward_group(Tensor x, Tensor?[] passes, Tensor? batch_sizes, int cell, bool chained, "
      "int[] needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("forward_group", TORCH_BOX(&rnnfast::forward_group));
  m.impl("backward_group", TORCH_BOX(&rnnfast::backward_group));
}
