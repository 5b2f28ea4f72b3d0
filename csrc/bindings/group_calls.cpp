#include "group_calls.h"

namespace rnnfast {
namespace {

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
  fail("passes side by side must have the hidden size of the first, (H, P) = (" +
       std::to_string(a.hidden_size) + ", " + std::to_string(a.output_size) + "), got (" +
       std::to_string(b.hidden_size) + ", " + std::to_string(b.output_size) + ")" +
       (a.projection == b.projection ? "" : ", and w_hr in one of them only"));
}

}  // namespace

int count_passes(const Tensors& passes, size_t each, bool chained, int64_t heads) {
  const auto count = static_cast<int64_t>(passes.size() / each);
  if (heads < 1 || (chained && heads != 1))
    fail("heads must be at least 1, and 1 for layers, got " + std::to_string(heads));
  // A single pass is no group.
  const bool fits = chained || count == 2 * heads || (count == heads && heads > 1);
  if (count * each != passes.size() || count < 1 || !fits)
    fail("passes must hold " + std::to_string(each) + " tensors or None for each " +
         (chained      ? "layer"
          : heads == 1 ? "of two directions"
                       : "of " + std::to_string(heads) + " heads of one direction or two") +
         ", got " + std::to_string(passes.size()));
  return static_cast<int>(count);
}

std::vector<ForwardCall> forward_calls(const Tensor& x, const Tensors& passes,
                                       const OptionalTensor& batch_sizes, int64_t cell,
                                       bool chained, int64_t heads, bool save, int apart,
                                       bool only_last) {
  const int count = count_passes(passes, kOfForward, chained, heads);
  std::vector<ForwardCall> calls;
  calls.reserve(count);
  for (int i = 0; i < count; ++i) {
    const size_t first = kOfForward * i;
    calls.emplace_back(
        chained && i > 0 ? std::get<0>(calls[i - 1].result) : x, pass_of(passes, first),
        batch_sizes, passes[first + 8].has_value(), cell, !chained && i >= heads, save,
        chained && !save && i >= apart ? &std::get<0>(calls[i - apart].result) : nullptr, 0,
        only_last && (!chained || i + 1 == count));
  }
  for (int i = 1; i < count && !chained; ++i) check_alike(calls[0].layer, calls[i].layer);
  return calls;
}

BackwardGroup::BackwardGroup(const Tensor& x, const Tensors& passes,
                             const OptionalTensor& batch_sizes, int64_t cell, bool chained,
                             int64_t heads, const std::vector<int64_t>& needs)
    : x_(x),
      passes_(passes),
      batch_sizes_(batch_sizes),
      cell_(cell),
      chained_(chained),
      heads_(heads),
      needs_(needs),
      count_(count_passes(passes, kOfBackward, chained, heads)) {
  if (needs.size() != static_cast<size_t>(count_))
    fail("needs must hold a mask for each of " + std::to_string(count_) + " passes, got " +
         std::to_string(needs.size()));
  for (int i = 0; i < count_; ++i) {
    if (!more(i)[0] || !more(i)[1]) fail("passes must hold y and saved of each, got None");
    if (chained && i + 1 < count_ && more(i)[2])
      fail("passes must hold dy of the last layer only, got one of layer " + std::to_string(i));
  }
}

Pass BackwardGroup::pass(int pass) const { return pass_of(passes_, kOfBackward * pass); }

Incoming BackwardGroup::incoming(int order, const Tensor* dx) const {
  const int i = nth(order);
  OptionalTensor dy = more(i)[2];
  if (chained_ && order > 0) dy = *dx;
  return {dy,          more(i)[3],  more(i)[4],
          *more(i)[0], *more(i)[1], chained_ && i > 0 ? needs_[i] | kDx : needs_[i]};
}

std::vector<BackwardCall> BackwardGroup::calls(int apart) const {
  std::vector<BackwardCall> calls;
  calls.reserve(count_);
  for (int order = 0; order < count_; ++order) {
    const int i = nth(order);
    calls.emplace_back(
        input_of(i), pass(i), batch_sizes_,
        incoming(order, order > 0 ? &std::get<0>(calls.back().result) : nullptr), cell_, reverse(i),
        chained_ && i > 0 && order >= apart ? &std::get<0>(calls[order - apart].result) : nullptr);
  }
  for (int i = 1; i < count_ && !chained_; ++i) check_alike(calls[0].layer, calls[i].layer);
  return calls;
}

}  // namespace rnnfast
