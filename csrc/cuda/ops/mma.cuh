// One product of a warp on the tensor cores: D (16, 8) += A (16, k) B (k, 8), sums in float32. k is
// 16 numbers of 16 bits or 8 of TF32; which entry lies in which lane: onchip_layout.h.
#pragma once

#include <cuda_runtime.h>

#include "../../core/numbers.h"
#include "../../core/target.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

#ifdef __CUDACC__
#define RNNFAST_MMA(shape_and_types)                                              \
  asm volatile("mma.sync.aligned." shape_and_types                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else  // the device on the host
#define RNNFAST_MMA(shape_and_types) on_host::mma(shape_and_types, d, a, b)
#endif

template <class scalar_t>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma<Float16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RNNFAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
__device__ inline void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  RNNFAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
__device__ inline void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RNNFAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef RNNFAST_MMA

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
