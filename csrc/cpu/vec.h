// SIMD vectors by the GCC/Clang vector extension: one width an ISA, and the loads and stores that
// the engine needs.
#pragma once

#include "../core/math.h"

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
};
template <>
struct Lanes<Float64Vector> : DoubleConstants {
  using int_t = Int64Vector;
};

template <class scalar_t>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Float32Vector;
};
template <>
struct VectorOf<double> {
  using type = Float64Vector;
};
template <class scalar_t>
using vector_of = typename VectorOf<scalar_t>::type;

template <class scalar_t>
constexpr int64_t lanes_of = RNNFAST_VECTOR_BYTES / static_cast<int64_t>(sizeof(scalar_t));

// Registers: 32 with AVX-512 and on arm64, else 16. The
// micro-kernel keeps its accumulators in them.
#if RNNFAST_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

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
