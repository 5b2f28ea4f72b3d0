// Several passes of one call, as the group operators are given them: the heads of the directions of
// a layer, those of the first direction first, or (`chained`) layers, each over the results of the
// one before.
#pragma once

#include <limits>

#include "layer_calls.h"

namespace rnnfast {

using Tensors = std::vector<OptionalTensor>;

// Of each pass: h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset, then what `forward` or `backward`
// needs.
constexpr size_t kOfForward = 9, kOfBackward = 13;

int count_passes(const Tensors& passes, size_t each, bool chained, int64_t heads);

// Layers that are further apart than this never run at the same time, so that one may write where
// the other wrote what nobody reads any more.
constexpr int kNeverReuse = std::numeric_limits<int>::max();

// Calls of forward, in the order of the passes. `only_last`: without the outputs of the last layer.
std::vector<ForwardCall> forward_calls(const Tensor& x, const Tensors& passes,
                                       const OptionalTensor& batch_sizes, int64_t cell,
                                       bool chained, int64_t heads, bool save, int apart,
                                       bool only_last = false);

// What backward is given, pass by pass, and the order in which it runs them: layers from the last
// to the first.
class BackwardGroup {
 public:
  BackwardGroup(const Tensor& x, const Tensors& passes, const OptionalTensor& batch_sizes,
                int64_t cell, bool chained, int64_t heads, const std::vector<int64_t>& needs);

  int count() const { return count_; }
  int nth(int order) const { return chained_ ? count_ - 1 - order : order; }
  bool reverse(int pass) const { return !chained_ && pass >= heads_; }
  Tensor input_of(int pass) const { return chained_ && pass > 0 ? *more(pass - 1)[0] : x_; }
  Pass pass(int pass) const;
  // `dx`: that of the pass which ran just before.
  Incoming incoming(int order, const Tensor* dx) const;
  // In the order in which they run.
  std::vector<BackwardCall> calls(int apart) const;

 private:
  const OptionalTensor* more(int pass) const { return &passes_[kOfBackward * pass + 8]; }

  const Tensor& x_;
  const Tensors& passes_;
  const OptionalTensor& batch_sizes_;
  int64_t cell_;
  bool chained_;
  int64_t heads_;
  const std::vector<int64_t>& needs_;
  int count_;
};

// All results of all passes in one list.
template <class Result>
void append(std::vector<Tensor>& list, const Result& result) {
  std::apply([&](const auto&... tensors) { (list.push_back(tensors), ...); }, result);
}

}  // namespace rnnfast
