// exp, sigmoid and tanh for float and double, as scalars, SIMD vectors and on the device.
//
// One text for all three: V is float, double or a GCC/Clang vector of them. Error bounds, in ulp of
// the correctly rounded result, held by tests/test_core.py on every ISA, with FMA and without: exp
// 2, sigmoid 3, tanh 3. They hold where exp neither overflows nor becomes subnormal, about [-87,
// 88] (float) and [-708, 709] (double). Outside, exp keeps its value at the end of the range, so
// sigmoid stays in [0, 1], never divides inf by inf, and ends at about 6e-39 (float) or 1e-308
// (double) instead of falling further: no ulp bound there. NaN stays NaN.
#pragma once

#include "target.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// What the maths needs to know of a number type: its
// element, the integer of the same width, and the constants.
template <class V>
struct Lanes;

// A vector may know faster ones. Of minimum and maximum, a NaN in x comes through.
struct PlainOperations {
  template <class V>
  RNNFAST_HD static V quotient(V n, V d) {
    return n / d;
  }
  template <class V>
  RNNFAST_HD static V maximum(V bound, V x) {
    return bound > x ? bound : x;
  }
  template <class V>
  RNNFAST_HD static V minimum(V bound, V x) {
    return bound < x ? bound : x;
  }
};

struct FloatConstants : PlainOperations {
  using scalar_t = float;
  static constexpr int kMantissaBits = 23, kBias = 127, kTerms = 7;
  static constexpr double kRound = 12582912.0;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr double kLn2Hi = 0.693145751953125, kLn2Lo = 1.42860682030941723212e-6;
  static constexpr double kExpMin = -87.0, kExpMax = 88.0, kTanhMax = 9.2;
  static constexpr int32_t kSign = INT32_MIN;
};
struct DoubleConstants : PlainOperations {
  using scalar_t = double;
  static constexpr int kMantissaBits = 52, kBias = 1023, kTerms = 13;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExpMin = -708.0, kExpMax = 709.0, kTanhMax = 19.2;
  static constexpr int64_t kSign = INT64_MIN;
};
template <>
struct Lanes<float> : FloatConstants {
  using int_t = int32_t;
};
template <>
struct Lanes<double> : DoubleConstants {
  using int_t = int64_t;
};

template <class V>
using scalar_of = typename Lanes<V>::scalar_t;

template <class V>
RNNFAST_HD V splat(double value) {
  return static_cast<scalar_of<V>>(value) - V{};  // x - 0 is x to the compiler, 0 + x is not
}

template <class To, class From>
RNNFAST_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// x = n*ln2 + r with |r| <= ln2/2; returns 2^n and, in `p`,
// exp(r) - 1. NOTE: written so that a NaN in x reaches p: the
// rounding trick may give any n, but r = x - n*ln2 stays NaN.
template <class V>
RNNFAST_HD V reduce_exp(V x, V& p) {
  using L = Lanes<V>;
  using I = typename L::int_t;
  const V shift = splat<V>(L::kRound);
  const V shifted = x * splat<V>(1.44269504088896340736) + shift;
  const V n = shifted - shift;
  const V r = (x - n * splat<V>(L::kLn2Hi)) - n * splat<V>(L::kLn2Lo);
  // Taylor: the remainder term r^(kTerms+1)/(kTerms+1)! is below half an ulp of r on this interval.
  constexpr double kFactorial[] = {1.,       1.,        2.,         6.,         24.,
                                   120.,     720.,      5040.,      40320.,     362880.,
                                   3628800., 39916800., 479001600., 6227020800.};
  V q = splat<V>(1.0 / kFactorial[L::kTerms]);
  RNNFAST_UNROLL
  for (int i = L::kTerms - 1; i >= 2; --i) q = q * r + splat<V>(1.0 / kFactorial[i]);
  p = r + (r * r) * q;
  const I bits = bit_cast<I>(shifted) - bit_cast<I>(shift);
  return bit_cast<V>((bits + L::kBias) << L::kMantissaBits);
}

template <class V>
RNNFAST_HD V exp(V x) {
  using L = Lanes<V>;
  x = L::maximum(splat<V>(L::kExpMin), x);
  x = L::minimum(splat<V>(L::kExpMax), x);
  V p;
  const V scale = reduce_exp(x, p);
  return scale + scale * p;
}

template <class V>
RNNFAST_HD V sigmoid(V x) {
  return Lanes<V>::quotient(splat<V>(1.0), splat<V>(1.0) + exp(-x));
}

// tanh|x| = -q / (q + 2) with q = exp(-2|x|) - 1, which keeps the relative accuracy at small x.
template <class V>
RNNFAST_HD V tanh(V x) {
  using L = Lanes<V>;
  using I = typename L::int_t;
  const I sign = bit_cast<I>(x) & L::kSign;
  const V a = L::minimum(splat<V>(L::kTanhMax), bit_cast<V>(bit_cast<I>(x) ^ sign));
  V p;
  const V scale = reduce_exp(splat<V>(-2.0) * a, p);
  const V q = scale * p + (scale - splat<V>(1.0));
  const V t = Lanes<V>::quotient(-q, q + splat<V>(2.0));
  return bit_cast<V>(bit_cast<I>(t) ^ sign);
}

template <class V>
RNNFAST_HD V relu(V x) {
  const V zero = V{};
  return x < zero ? zero : x;  // a NaN compares false, so it passes
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
