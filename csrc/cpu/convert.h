// Loads and stores of 16-bit numbers: a vector of them is a vector of floats in registers.
#pragma once

#include "../core/half.h"
#include "../core/numbers.h"
#include "vec.h"

#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace rnnfast::RNNFAST_TARGET {
namespace {

typedef uint16_t Bits16Vector __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));
typedef uint32_t Bits32Vector __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

RNNFAST_HD Float32Vector widen(BFloat16, Bits16Vector bits) {
  return bit_cast<Float32Vector>(__builtin_convertvector(bits, Bits32Vector) << 16);
}

RNNFAST_HD Bits16Vector narrow(BFloat16, Float32Vector x) {
  return __builtin_convertvector((narrow_bfloat16<Float32Vector, Bits32Vector>(x)), Bits16Vector);
}

#if defined(__AVX512F__)  // with a mask of ones: GCC 12 warns of a variable inside the others
RNNFAST_HD Float32Vector widen(Float16, Bits16Vector bits) {
  return bit_cast<Float32Vector>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
RNNFAST_HD Bits16Vector narrow(Float16, Float32Vector x) {
  return bit_cast<Bits16Vector>(_mm512_maskz_cvtps_ph(
      0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
RNNFAST_HD Float32Vector widen(Float16, Bits16Vector bits) {
  return bit_cast<Float32Vector>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
RNNFAST_HD Bits16Vector narrow(Float16, Float32Vector x) {
  return bit_cast<Bits16Vector>(
      _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
RNNFAST_HD Float32Vector widen(Float16, Bits16Vector bits) {
  return bit_cast<Float32Vector>(vcvt_f32_f16(bit_cast<float16x4_t>(bits)));
}
RNNFAST_HD Bits16Vector narrow(Float16, Float32Vector x) {
  return bit_cast<Bits16Vector>(vcvt_f16_f32(bit_cast<float32x4_t>(x)));
}
#else
RNNFAST_HD Float32Vector widen(Float16, Bits16Vector bits) {
  return widen_float16<Float32Vector>(__builtin_convertvector(bits, Bits32Vector));
}
RNNFAST_HD Bits16Vector narrow(Float16, Float32Vector x) {
  return __builtin_convertvector((narrow_float16<Float32Vector, Bits32Vector>(x)), Bits16Vector);
}
#endif

// --- the loads and stores of an engine, in the type of its sums ---

RNNFAST_HD Float32Vector load_wide(const float* from) { return load(from); }
RNNFAST_HD Float64Vector load_wide(const double* from) { return load(from); }
template <class half_t>
RNNFAST_HD Float32Vector load_wide(const half_t* from) {
  Bits16Vector bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return widen(half_t{}, bits);
}

RNNFAST_HD void store_narrow(float* to, Float32Vector v) { store(to, v); }
RNNFAST_HD void store_narrow(double* to, Float64Vector v) { store(to, v); }
template <class half_t>
RNNFAST_HD void store_narrow(half_t* to, Float32Vector v) {
  const Bits16Vector bits = narrow(half_t{}, v);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

RNNFAST_HD float widen_scalar(float x) { return x; }
RNNFAST_HD double widen_scalar(double x) { return x; }
template <class half_t>
RNNFAST_HD float widen_scalar(half_t x) {
  return widen(half_t{}, x.bits - Bits16Vector{})[0];
}

// As load_part and store_part.
RNNFAST_HD Float32Vector load_wide_part(const float* from, int64_t count) {
  return load_part(from, count);
}
RNNFAST_HD Float64Vector load_wide_part(const double* from, int64_t count) {
  return load_part(from, count);
}
template <class half_t>
RNNFAST_HD Float32Vector load_wide_part(const half_t* from, int64_t count) {
  if (count >= lanes_of<float>) return load_wide(from);
  half_t lanes[lanes_of<float>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load_wide(lanes);
}

RNNFAST_HD void store_narrow_part(float* to, Float32Vector v, int64_t count) {
  store_part(to, v, count);
}
RNNFAST_HD void store_narrow_part(double* to, Float64Vector v, int64_t count) {
  store_part(to, v, count);
}
template <class half_t>
RNNFAST_HD void store_narrow_part(half_t* to, Float32Vector v, int64_t count) {
  if (count >= lanes_of<float>) return store_narrow(to, v);
  half_t lanes[lanes_of<float>];
  store_narrow(lanes, v);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
}

// out[i] = in[i] in another type.
template <class from_t, class to_t>
__attribute__((noinline)) void convert(int64_t count, const from_t* in, to_t* out) {
  for (int64_t i = 0; i < count; i += lanes_of<accumulator_of<from_t>>)
    store_narrow_part(out + i, load_wide_part(in + i, count - i), count - i);
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
