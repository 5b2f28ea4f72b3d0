// The activation functions that a call may choose, with torch's definitions and default
// parameters, and their derivatives from what forward kept: the value, or for functions that are
// not monotone the pre-activation. The choice is the same for all units of a call, so that its
// branch costs little; it is taken once for several vectors.
#pragma once

#include "cell_code.h"
#include "math.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

constexpr double kSeluScale = 1.0507009873554804934, kSeluAlpha = 1.6732632423543772848;
constexpr double kLeakySlope = 0.01;

template <class V>
RNNFAST_HD V magnitude(V x) {
  using I = typename Lanes<V>::int_t;
  return bit_cast<V>(bit_cast<I>(x) & ~Lanes<V>::kSign);
}

// exp(x) - 1 for x <= 0.
template <class V>
RNNFAST_HD V expm1_of_negative(V x) {
  V p;
  const V scale = reduce_exp(Lanes<V>::maximum(splat<V>(Lanes<V>::kExpMin), x), p);
  return scale * p + (scale - splat<V>(1.0));
}

// log(1 + u) for u in [0, 1]: 2*atanh(s) with s = u / (2 + u) <= 1/3, by its series.
template <class V>
RNNFAST_HD V log1p_of_fraction(V u) {
  constexpr int kTerms = sizeof(scalar_of<V>) == 4 ? 8 : 17;
  const V s = Lanes<V>::quotient(u, splat<V>(2.0) + u), square = s * s;
  V sum = splat<V>(1.0 / (2 * kTerms - 1));
  RNNFAST_UNROLL
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * square + splat<V>(1.0 / (2 * k + 1));
  return splat<V>(2.0) * s * sum;
}

template <class V>
RNNFAST_HD V softplus(V x) {
  const V positive = Lanes<V>::maximum(V{}, x);
  return positive + log1p_of_fraction(exp(-magnitude(x)));
}

// sum of terms[k] * u^k
template <class V, int count>
RNNFAST_HD V polynomial(const double (&terms)[count], V u) {
  V sum = splat<V>(terms[count - 1]);
  RNNFAST_UNROLL
  for (int k = count - 2; k >= 0; --k) sum = sum * u + splat<V>(terms[k]);
  return sum;
}

// exp(z^2) * erfc(z) for z >= 0, as (1 - u) * polynomial in u = (z - a) / (z + a): Chebyshev
// interpolation, off by 2e-8 (float) and 2e-17 (double) of its value at most.
template <class V>
RNNFAST_HD V scaled_erfc(V z) {
  constexpr bool kFloat = sizeof(scalar_of<V>) == 4;
  constexpr double kCenter = kFloat ? 2 : 3;
  constexpr double kFloatTerms[] = {0.255395678,     -0.171790159,  0.0698678668,  -0.00911083471,
                                    -0.00537581309,  0.00162172596, 0.00076457858, -0.000215335244,
                                    -0.000149691356, 1.83009385e-5, 2.10805986e-5};
  constexpr double kDoubleTerms[] = {
      0.17900115118138995,       -0.147232408861647244,    0.0983713928506837224,
      -0.0517445436500972038,    0.0199212935478779451,    -0.00447120577067523595,
      -0.00020206943780763867,   0.000505676999343023034,  -0.0000913849490627639385,
      -0.0000461296356703568285, 0.0000179269159546671282, 5.06634193095446807e-6,
      -2.91176331639451874e-6,   -7.91504712683929202e-7,  4.60898914059821527e-7,
      1.66469502381849567e-7,    -6.7992647577299501e-8,   -3.89756133485675406e-8,
      7.67631669904141913e-9,    8.53040366168678302e-9,   -1.63639276759865021e-10,
      -1.44896237817263803e-9,   -1.63052273130677516e-10, 1.35178121603166549e-10,
      2.73685716949049759e-11};
  const V one_minus_u = Lanes<V>::quotient(splat<V>(2 * kCenter), z + splat<V>(kCenter));
  const V u = splat<V>(1.0) - one_minus_u;
  if constexpr (kFloat)
    return one_minus_u * polynomial(kFloatTerms, u);
  else
    return one_minus_u * polynomial(kDoubleTerms, u);
}

// The normal distribution: its density and distribution function at x.
template <class V>
RNNFAST_HD void normal(V x, V& density, V& below) {
  const V z = magnitude(x) * splat<V>(0.70710678118654752440);
  const V bell = exp(-z * z);
  const V tail = splat<V>(0.5) * bell * scaled_erfc(z);  // on the side of x
  density = splat<V>(0.39894228040143267794) * bell;
  below = x > V{} ? splat<V>(1.0) - tail : tail;
}

// exp ends before it vanishes: beyond, a factor x must not bring it back.
constexpr double kFarOut = 40;
template <class V>
RNNFAST_HD V silu(V x, V sigmoid_of_x) {
  return Lanes<V>::maximum(splat<V>(Lanes<V>::kExpMin), x) * sigmoid_of_x;
}

RNNFAST_HD bool keeps_input(Activation activation) {
  return activation == Activation::kGelu || activation == Activation::kSilu;
}

// x[k] becomes its value, kept[k] what backward wants.
template <class V, int count>
RNNFAST_OUTLINE void activate(Activation activation, V (&x)[count], V (&kept)[count]) {
  using L = Lanes<V>;
  const V one = splat<V>(1.0);
  const auto each = [&](const auto& value) {
    RNNFAST_UNROLL
    for (int k = 0; k < count; ++k) kept[k] = x[k] = value(x[k]);
  };
  const auto each_keeping_input = [&](const auto& value) {
    RNNFAST_UNROLL
    for (int k = 0; k < count; ++k) {
      kept[k] = x[k];
      x[k] = value(x[k]);
    }
  };
  switch (activation) {
    case Activation::kSigmoid: return each([](V v) { return sigmoid(v); });
    case Activation::kTanh: return each([](V v) { return tanh(v); });
    case Activation::kRelu: return each([](V v) { return relu(v); });
    case Activation::kHardSigmoid:
      return each([&](V v) {
        const V six = splat<V>(6.0);
        return L::minimum(six, L::maximum(V{}, v + splat<V>(3.0))) * splat<V>(1.0 / 6.0);
      });
    case Activation::kHardTanh:
      return each([&](V v) { return L::minimum(one, L::maximum(-one, v)); });
    case Activation::kSoftsign:
      return each([&](V v) { return L::quotient(v, one + magnitude(v)); });
    case Activation::kElu:
      return each([](V v) { return v > V{} ? v : expm1_of_negative(L::minimum(V{}, v)); });
    case Activation::kSelu:
      return each([](V v) {
        const V below = splat<V>(kSeluAlpha) * expm1_of_negative(L::minimum(V{}, v));
        return splat<V>(kSeluScale) * (v > V{} ? v : below);
      });
    case Activation::kGelu:
      return each_keeping_input([](V v) {
        V density, below;
        normal(v, density, below);
        return L::maximum(splat<V>(-kFarOut), v) * below;
      });
    case Activation::kSilu: return each_keeping_input([](V v) { return silu(v, sigmoid(v)); });
    case Activation::kSoftplus: return each([](V v) { return softplus(v); });
    case Activation::kLeakyRelu:
      return each([](V v) { return v > V{} ? v : splat<V>(kLeakySlope) * v; });
    case Activation::kOwn:
    case Activation::kLinear: return each([](V v) { return v; });
  }
}

// From what was kept to value[k] and its derivative slope[k].
template <class V, int count>
RNNFAST_OUTLINE void differentiate(Activation activation, const V (&kept)[count], V (&value)[count],
                                   V (&slope)[count]) {
  using L = Lanes<V>;
  const V one = splat<V>(1.0);
  const auto each = [&](const auto& slope_at) {
    RNNFAST_UNROLL
    for (int k = 0; k < count; ++k) {
      value[k] = kept[k];
      slope[k] = slope_at(kept[k]);
    }
  };
  switch (activation) {
    case Activation::kSigmoid: return each([&](V y) { return y * (one - y); });
    case Activation::kTanh: return each([&](V y) { return one - y * y; });
    case Activation::kRelu: return each([&](V y) { return y <= V{} ? V{} : one; });
    case Activation::kHardSigmoid:
      return each([&](V y) {
        const V inside = y >= one ? V{} : splat<V>(1.0 / 6.0);
        return y <= V{} ? V{} : inside;
      });
    case Activation::kHardTanh: return each([&](V y) { return magnitude(y) >= one ? V{} : one; });
    case Activation::kSoftsign:
      return each([&](V y) {
        const V rest = one - magnitude(y);
        return rest * rest;
      });
    case Activation::kElu: return each([&](V y) { return y > V{} ? one : y + one; });
    case Activation::kSelu:
      return each([&](V y) {
        return y > V{} ? splat<V>(kSeluScale) : y + splat<V>(kSeluScale * kSeluAlpha);
      });
    case Activation::kGelu:
      RNNFAST_UNROLL
      for (int k = 0; k < count; ++k) {
        V density, below;
        normal(kept[k], density, below);
        value[k] = L::maximum(splat<V>(-kFarOut), kept[k]) * below;
        slope[k] = below +
                   L::minimum(splat<V>(kFarOut), L::maximum(splat<V>(-kFarOut), kept[k])) * density;
      }
      return;
    case Activation::kSilu:
      RNNFAST_UNROLL
      for (int k = 0; k < count; ++k) {
        const V s = sigmoid(kept[k]);
        value[k] = silu(kept[k], s);
        slope[k] = s + value[k] * (one - s);
      }
      return;
    case Activation::kSoftplus: return each([&](V y) { return -expm1_of_negative(-y); });
    case Activation::kLeakyRelu:
      return each([&](V y) { return y > V{} ? one : splat<V>(kLeakySlope); });
    case Activation::kOwn:
    case Activation::kLinear: return each([&](V) { return one; });
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
