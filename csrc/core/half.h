// 16-bit numbers in plain arithmetic, for a number or a vector of them: where a processor has no
// instruction, and on the host side of device code.
#pragma once

#include "math.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// `bits` hold the 16 bits of a number in 32. Exponent and mantissa are moved into a float's place
// and scaled by 2^112, which makes subnormal numbers right, too.
template <class F, class U>
RNNFAST_HD F widen_float16(U bits) {
  const U body = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const F scaled = bit_cast<F>(body) * splat<F>(0x1p112);
  // An exponent of ones (infinity, NaN) keeps its ones.
  const U value = (bits & 0x7c00u) == 0x7c00u ? body | 0x7f800000u : bit_cast<U>(scaled);
  return bit_cast<F>(value | sign);
}

// Rounded by an addition: to a number whose last place is that of the result.
template <class F, class U>
RNNFAST_HD U narrow_float16(F x) {
  const U bits = bit_cast<U>(x);
  const U sign = (bits >> 16) & 0x8000u, body = bits & 0x7fffffffu;
  // Normal results: ties to even on the 13 bits that go, the exponent's bias from 127 to 15.
  const U normal = (body + 0xfffu + ((body >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14: adding 0.5 leaves the result in the last bits of the sum.
  const F shifted = bit_cast<F>(body) + splat<F>(0.5);
  const U small = bit_cast<U>(shifted) - 0x3f000000u;
  U half = body < (113u << 23) ? small : normal;
  half = body >= 0x477ff000u ? (half & 0u) | 0x7c00u : half;  // rounds to 2^16 and beyond
  half = x == x ? half : (half & 0u) | 0x7e00u;
  return half | sign;
}

// To the nearest, ties to even; a NaN stays one.
template <class F, class U>
RNNFAST_HD U narrow_bfloat16(F x) {
  const U bits = bit_cast<U>(x);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  return x == x ? rounded : quiet;
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
