// SIMD vectors by the GCC/Clang vector extension: one width an ISA, and the loads and stores that
// the engine needs.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "../core/math.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifndef RNNFAST_VECTOR_BYTES
#define RNNFAST_VECTOR_BYTES 16  // SSE2, NEON and every other 128-bit ISA
#endif

namespace rnnfast::RNNFAST_TARGET {
namespace {

typedef float Float32Vector __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
typedef double Float64Vector __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
typedef int32_t Int32Vector __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
typedef int64_t Int64Vector __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

template <>
struct Lanes<Float32Vector> : FloatConstants {
  using int_t = Int32Vector;
#if RNNFAST_VECTOR_BYTES == 64
  // A division of such a vector takes 16 cycles, an estimate of 14 bits and a correction by what
  // remains 3; within 1 ulp where d and the result are normal numbers.
  RNNFAST_HD static Float32Vector quotient(Float32Vector n, Float32Vector d) {
    const __m512 v = bit_cast<__m512>(d);
    const Float32Vector r = bit_cast<Float32Vector>(_mm512_maskz_rcp14_ps(0xffff, v));
    const Float32Vector q = n * r;
    return q + r * (n - q * d);
  }
  // One instruction: if one of them is a NaN, it gives the second.
  RNNFAST_HD static Float32Vector maximum(Float32Vector bound, Float32Vector x) {
    return bit_cast<Float32Vector>(
        _mm512_maskz_max_ps(0xffff, bit_cast<__m512>(bound), bit_cast<__m512>(x)));
  }
  RNNFAST_HD static Float32Vector minimum(Float32Vector bound, Float32Vector x) {
    return bit_cast<Float32Vector>(
        _mm512_maskz_min_ps(0xffff, bit_cast<__m512>(bound), bit_cast<__m512>(x)));
  }
#elif RNNFAST_VECTOR_BYTES == 32
  RNNFAST_HD static Float32Vector maximum(Float32Vector bound, Float32Vector x) {
    return bit_cast<Float32Vector>(_mm256_max_ps(bit_cast<__m256>(bound), bit_cast<__m256>(x)));
  }
  RNNFAST_HD static Float32Vector minimum(Float32Vector bound, Float32Vector x) {
    return bit_cast<Float32Vector>(_mm256_min_ps(bit_cast<__m256>(bound), bit_cast<__m256>(x)));
  }
#endif
};
template <>
struct Lanes<Float64Vector> : DoubleConstants {
  using int_t = Int64Vector;
};

// Two vectors as one. The compiler works on both in turn, so that the long chains of the gate maths
// overlap: one vector's would leave the units idle, and no processor looks far enough ahead.
typedef float Float32Pair __attribute__((vector_size(2 * RNNFAST_VECTOR_BYTES)));
typedef double Float64Pair __attribute__((vector_size(2 * RNNFAST_VECTOR_BYTES)));
typedef int32_t Int32Pair __attribute__((vector_size(2 * RNNFAST_VECTOR_BYTES)));
typedef int64_t Int64Pair __attribute__((vector_size(2 * RNNFAST_VECTOR_BYTES)));

template <class Pair, class Half, class Constants>
struct PairLanes : Constants {
  template <Half (*operation)(Half, Half)>
  RNNFAST_HD static Pair each(Pair a, Pair b) {
    Half x[2], y[2], result[2];
    __builtin_memcpy(x, &a, sizeof(a));
    __builtin_memcpy(y, &b, sizeof(b));
    for (int i = 0; i < 2; ++i) result[i] = operation(x[i], y[i]);
    Pair pair;
    __builtin_memcpy(&pair, result, sizeof(pair));
    return pair;
  }
  RNNFAST_HD static Pair quotient(Pair n, Pair d) { return each<Lanes<Half>::quotient>(n, d); }
  RNNFAST_HD static Pair maximum(Pair bound, Pair x) {
    return each<Lanes<Half>::maximum>(bound, x);
  }
  RNNFAST_HD static Pair minimum(Pair bound, Pair x) {
    return each<Lanes<Half>::minimum>(bound, x);
  }
};
template <>
struct Lanes<Float32Pair> : PairLanes<Float32Pair, Float32Vector, FloatConstants> {
  using int_t = Int32Pair;
};
template <>
struct Lanes<Float64Pair> : PairLanes<Float64Pair, Float64Vector, DoubleConstants> {
  using int_t = Int64Pair;
};

template <class scalar_t>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Float32Vector;
  using pair = Float32Pair;
};
template <>
struct VectorOf<double> {
  using type = Float64Vector;
  using pair = Float64Pair;
};
template <class scalar_t>
using vector_of = typename VectorOf<scalar_t>::type;
template <class scalar_t>
using pair_of = typename VectorOf<scalar_t>::pair;

template <class scalar_t>
constexpr int64_t lanes_of = RNNFAST_VECTOR_BYTES / static_cast<int64_t>(sizeof(scalar_t));

// Registers: 32 with AVX-512 and on arm64, else 16. The
// micro-kernel keeps its accumulators in them.
#if RNNFAST_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// Whether kernels hold what they use several times in registers: where there are few of them, gcc
// loads a factor anew for each of its products, and then waits for loads. (Not without FMA, whose
// products want a register more; not measured with AVX-512.)
constexpr bool kHolds = RNNFAST_VECTOR_BYTES == 32;

// Keeps v in a register.
template <class V>
RNNFAST_HD void hold([[maybe_unused]] V& v) {
#ifdef __x86_64__
  asm("" : "+v"(v));
#endif
}

template <class scalar_t>
RNNFAST_HD vector_of<scalar_t> load(const scalar_t* from) {
  vector_of<scalar_t> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <class scalar_t>
RNNFAST_HD void store(scalar_t* to, vector_of<scalar_t> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

// The first `count` lanes; the others read as zero and are not touched in memory. count >= lanes
// means all of them.
template <class scalar_t>
RNNFAST_HD vector_of<scalar_t> load_part(const scalar_t* from, int64_t count) {
  if (count >= lanes_of<scalar_t>) return load(from);
  scalar_t lanes[lanes_of<scalar_t>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
}

template <class scalar_t>
RNNFAST_HD void store_part(scalar_t* to, vector_of<scalar_t> v, int64_t count) {
  if (count >= lanes_of<scalar_t>) return store(to, v);
  scalar_t lanes[lanes_of<scalar_t>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

template <class scalar_t>
RNNFAST_HD scalar_t sum_lanes(vector_of<scalar_t> v) {
  scalar_t lanes[lanes_of<scalar_t>];
  store(lanes, v);
  RNNFAST_UNROLL
  for (int64_t width = lanes_of<scalar_t> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Bytes as lanes: `set` where one is not 0, else `unset`. As load_part; those beyond count as 0.
typedef uint8_t Float32Flags __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 4)));
typedef uint8_t Float64Flags __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 8)));

template <class scalar_t>
RNNFAST_HD vector_of<scalar_t> where_set(const uint8_t* from, int64_t count,
                                         vector_of<scalar_t> set, vector_of<scalar_t> unset) {
  using Flags = std::conditional_t<sizeof(scalar_t) == 4, Float32Flags, Float64Flags>;
  using Int = typename Lanes<vector_of<scalar_t>>::int_t;
  Flags flags{};
  if (count >= lanes_of<scalar_t>)
    __builtin_memcpy(&flags, from, sizeof(flags));
  else
    for (int64_t i = 0; i < count; ++i) flags[i] = from[i];
  return __builtin_convertvector(flags, Int) != Int{} ? set : unset;
}

// Two vectors in one: the upper half of each group of `group` lanes added to the lower half, those
// of a before those of b.
template <int group, class V, std::size_t... lane>
RNNFAST_HD V fold_pair(V a, V b, std::index_sequence<lane...>) {
  constexpr int n = sizeof...(lane), half = group / 2;
  // Lane i of the result is lane i % half of group i / half of a and b together.
#if defined(__clang__) || __GNUC__ >= 12
  const V low = __builtin_shufflevector(
      a, b, (static_cast<int>(lane) / half * group + static_cast<int>(lane) % half)...);
  const V high = __builtin_shufflevector(
      a, b, (static_cast<int>(lane) / half * group + static_cast<int>(lane) % half + half)...);
#else
  using I = typename Lanes<V>::int_t;
  const V low = __builtin_shuffle(
      a, b, I{(static_cast<int>(lane) / half * group + static_cast<int>(lane) % half)...});
  const V high = __builtin_shuffle(
      a, b, I{(static_cast<int>(lane) / half * group + static_cast<int>(lane) % half + half)...});
#endif
  static_assert(n % group == 0, "groups fill a vector");
  return low + high;
}

// n vectors folded into one: group i of the result holds what is left of vector i.
template <class scalar_t, int n, int group = static_cast<int>(lanes_of<scalar_t>)>
RNNFAST_HD vector_of<scalar_t> fold(const vector_of<scalar_t> (&v)[n]) {
  if constexpr (n == 1) {
    return v[0];
  } else {
    vector_of<scalar_t> half[n / 2];
    RNNFAST_UNROLL
    for (int i = 0; i < n / 2; ++i)
      half[i] =
          fold_pair<group>(v[2 * i], v[2 * i + 1], std::make_index_sequence<lanes_of<scalar_t>>{});
    return fold<scalar_t, n / 2, group / 2>(half);
  }
}

// A number as a type, to hand a template argument to a lambda.
template <int n>
struct Constant {
  static constexpr int value = n;
};

RNNFAST_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RNNFAST_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
RNNFAST_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
