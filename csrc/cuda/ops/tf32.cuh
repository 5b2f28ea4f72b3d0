// A float as the tensor cores read it: TF32, 10 bits of mantissa, to the nearest.
#pragma once

#include "../../core/math.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

RNNFAST_HD uint32_t round_to_tf32(float x) {
#ifdef __CUDA_ARCH__
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits & ~0x1fffu;
#endif
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
