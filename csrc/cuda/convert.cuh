// Numbers as tensors hold them, and as kernels compute with them.
#pragma once

#include "../core/half.h"
#include "../core/numbers.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

RNNFAST_HD float widen(float x) { return x; }
RNNFAST_HD double widen(double x) { return x; }
RNNFAST_HD float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
RNNFAST_HD float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return widen_float16<float>(static_cast<uint32_t>(x.bits));
#endif
}

// To the nearest, ties to even.
RNNFAST_HD void narrow(float x, float& to) { to = x; }
RNNFAST_HD void narrow(double x, double& to) { to = x; }
RNNFAST_HD void narrow(float x, BFloat16& to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = static_cast<uint16_t>(narrow_bfloat16<float, uint32_t>(x));
#endif
}
RNNFAST_HD void narrow(float x, Float16& to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
  to.bits = static_cast<uint16_t>(narrow_float16<float, uint32_t>(x));
#endif
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
