// The operators that run several passes in one call on the CPU, so that they may run side by side.
#include <algorithm>

#include "cpu_calls.h"
#include "group_calls.h"

namespace rnnfast {
namespace {

// Layers that run at the same time, at most one a thread, and what the first of them reads, have a
// y (in backward: a dx) each. Beyond these, it is one that nobody reads any more.
int layers_apart(const Threads& threads) { return std::max(1, threads.count) + 1; }

// Gives y, h_n, c_n and saved of each pass; of chained ones that save nothing, only the last y may
// be read.
std::vector<Tensor> run_group(const Tensor& x, const Tensors& passes,
                              const OptionalTensor& batch_sizes, int64_t cell, bool chained,
                              int64_t heads, bool save, bool only_last) {
  const Threads threads = torch_threads();
  const auto calls = forward_calls(x, passes, batch_sizes, cell, chained, heads, save,
                                   layers_apart(threads), only_last);
  const int count = static_cast<int>(calls.size());
  const auto packed = [&](int i) -> const OptionalTensor& { return passes[kOfForward * i + 8]; };
  for (int i = 0; i < count; ++i) check_packed(packed(i));
  if (!calls[0].layer.empty()) {
    const Isa isa = active_isa();
    with_type(calls[0].layer.dtype, [&](auto scalar) {
      std::vector<WeightFormat> formats(count);
      std::vector<ForwardArgs<decltype(scalar)>> args;
      for (int i = 0; i < count; ++i)
        args.push_back(cpu_args<decltype(scalar)>(calls[i], packed(i), isa, cell, formats[i]));
      run_forward_group(isa, id_of_code(cell), args.data(), formats.data(), count, chained,
                        threads);
    });
  }
  std::vector<Tensor> results;
  for (const ForwardCall& call : calls) append(results, call.result);
  return results;
}

std::vector<Tensor> forward_group(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                  int64_t cell, bool chained, bool save, int64_t heads) {
  return run_group(x, passes, batch_sizes, cell, chained, heads, save, false);
}

// Saves nothing; the outputs of the last layer are empty.
std::vector<Tensor> forward_group_last(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                       int64_t cell, bool chained, int64_t heads) {
  return run_group(x, passes, batch_sizes, cell, chained, heads, false, true);
}

// Each pass ends with y, saved, dy, dh_n, dc_n; of chained ones only the last has a dy. Gives the
// gradients of each pass as `backward` does; of chained ones only the first dx may be read.
// needs[i] is the i-th's.
std::vector<Tensor> backward_group(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                   int64_t cell, bool chained, std::vector<int64_t> needs,
                                   int64_t heads) {
  const BackwardGroup group(x, passes, batch_sizes, cell, chained, heads, needs);
  const int count = group.count();
  std::vector<BackwardResult> gradients;  // in the order in which they run
  if (is_half(x)) {
    for (int order = 0; order < count; ++order) {
      const int i = group.nth(order);
      const Tensor* dx = order > 0 ? &std::get<0>(gradients.back()) : nullptr;
      gradients.push_back(backward_of_half(group.input_of(i), group.pass(i), batch_sizes,
                                           group.incoming(order, dx), cell, group.reverse(i)));
    }
  } else {
    const Threads threads = torch_threads();
    const auto calls = group.calls(layers_apart(threads));
    const auto run = [&](auto scalar) {
      std::vector<BackwardArgs<decltype(scalar)>> args;
      for (const BackwardCall& call : calls) args.push_back(call.args<decltype(scalar)>());
      run_backward_group(active_isa(), id_of_code(cell), args.data(), count, chained, threads);
    };
    if (calls[0].layer.empty())
      for (const BackwardCall& call : calls) call.fill_zeros();
    else if (calls[0].layer.dtype == ScalarType::Float)
      run(float{});
    else
      run(double{});
    for (const BackwardCall& call : calls) gradients.push_back(call.result);
  }
  std::vector<Tensor> results;
  for (int i = 0; i < count; ++i) append(results, gradients[group.nth(i)]);
  return results;
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def(
      "forward_group(Tensor x, Tensor?[] passes, Tensor? batch_sizes, int cell, bool chained, bool "
      "save, int heads=1) -> Tensor[]");
  m.def(
      "forward_group_last(Tensor x, Tensor?[] passes, Tensor? batch_sizes, int cell, bool chained, "
      "int heads=1) -> Tensor[]");
  m.def(
      "backward_group(Tensor x, Tensor?[] passes, Tensor? batch_sizes, int cell, bool chained, "
      "int[] needs, int heads=1) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("forward_group", TORCH_BOX(&rnnfast::forward_group));
  m.impl("forward_group_last", TORCH_BOX(&rnnfast::forward_group_last));
  m.impl("backward_group", TORCH_BOX(&rnnfast::backward_group));
}
