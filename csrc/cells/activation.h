// What a cell calls for its activations: fixed ones, compiled into it, or those that the call
// chose. Of several vectors at once:
//   forward(x, kept)            x: in pre-activations, out values; kept: what backward wants
//   backward(kept, value, slope)
//   slope_at(x, value, slope)   from the pre-activation, for what is not kept
#pragma once

#include "../core/activations.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class Function>
struct FixedActivation {
  template <class V, int count>
  RNNFAST_HD static void forward(V (&x)[count], V (&kept)[count]) {
    RNNFAST_UNROLL
    for (int k = 0; k < count; ++k) kept[k] = x[k] = Function::value(x[k]);
  }
  template <class V, int count>
  RNNFAST_HD static void backward(const V (&kept)[count], V (&value)[count], V (&slope)[count]) {
    RNNFAST_UNROLL
    for (int k = 0; k < count; ++k) {
      value[k] = kept[k];
      slope[k] = Function::slope(kept[k]);
    }
  }
  template <class V, int count>
  RNNFAST_HD static void slope_at(const V (&x)[count], V (&value)[count], V (&slope)[count]) {
    RNNFAST_UNROLL
    for (int k = 0; k < count; ++k) {
      value[k] = Function::value(x[k]);
      slope[k] = Function::slope(value[k]);
    }
  }
};

struct TanhFunction {
  template <class V>
  RNNFAST_HD static V value(V x) {
    return tanh(x);
  }
  template <class V>
  RNNFAST_HD static V slope(V y) {  // as a function of the value
    return splat<V>(1.0) - y * y;
  }
};
struct SigmoidFunction {
  template <class V>
  RNNFAST_HD static V value(V x) {
    return sigmoid(x);
  }
  template <class V>
  RNNFAST_HD static V slope(V y) {
    return y * (splat<V>(1.0) - y);
  }
};
struct ReluFunction {
  template <class V>
  RNNFAST_HD static V value(V x) {
    return relu(x);
  }
  template <class V>
  RNNFAST_HD static V slope(V y) {
    return y <= V{} ? V{} : splat<V>(1.0);  // NaN passes, as in torch
  }
};

using Tanh = FixedActivation<TanhFunction>;
using Sigmoid = FixedActivation<SigmoidFunction>;
using Relu = FixedActivation<ReluFunction>;

struct ChosenActivation {
  Activation chosen;

  template <class V, int count>
  RNNFAST_HD void forward(V (&x)[count], V (&kept)[count]) const {
    activate(chosen, x, kept);
  }
  template <class V, int count>
  RNNFAST_HD void backward(const V (&kept)[count], V (&value)[count], V (&slope)[count]) const {
    differentiate(chosen, kept, value, slope);
  }
  template <class V, int count>
  RNNFAST_HD void slope_at(const V (&x)[count], V (&value)[count], V (&slope)[count]) const {
    V kept[count];
    RNNFAST_UNROLL
    for (int k = 0; k < count; ++k) value[k] = x[k];
    activate(chosen, value, kept);
    differentiate(chosen, kept, value, slope);
  }
};

// The activations of a cell with gates, and the bound of its cell state.
struct StandardActivations {
  [[no_unique_address]] Sigmoid gate;
  [[no_unique_address]] Tanh state;
  template <class V>
  RNNFAST_HD static V bounded(V c) {
    return c;
  }
  template <class V>
  RNNFAST_HD static V bounded_gradient(V, V dc) {
    return dc;
  }
};
struct ChosenActivations {
  ChosenActivation gate, state;
  float clip;
  RNNFAST_HD explicit ChosenActivations(const CellOptions& options)
      : gate{options.gate == Activation::kOwn ? Activation::kSigmoid : options.gate},
        state{options.state == Activation::kOwn ? Activation::kTanh : options.state},
        clip(options.clip) {}
  template <class V>
  RNNFAST_HD V bounded(V c) const {
    if (clip == 0) return c;
    return Lanes<V>::minimum(splat<V>(clip), Lanes<V>::maximum(splat<V>(-clip), c));
  }
  // c: before the bound.
  template <class V>
  RNNFAST_HD V bounded_gradient(V c, V dc) const {
    if (clip == 0) return dc;
    return magnitude(c) > splat<V>(clip) ? V{} : dc;
  }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
