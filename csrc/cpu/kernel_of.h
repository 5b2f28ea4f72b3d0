// Which entries of a kernel table a call needs, and the format of its packed weights.
#pragma once

#include <type_traits>

#include "../core/cell_info.h"
#include "dispatch.h"
#include "dot.h"
#include "own_cell.h"

namespace rnnfast {

inline const ForwardKernels<float>& forward_kernels(Isa isa, int cell, WeightFormat format, float) {
  if (cell >= kFirstOwnCell) return own_kernels(isa, cell).forward32;
  return format == WeightFormat::kInt8 ? kernels(isa).int8[cell].forward
                                       : kernels(isa).float32[cell];
}
inline const ForwardKernels<double>& forward_kernels(Isa isa, int cell, WeightFormat, double) {
  if (cell >= kFirstOwnCell) return own_kernels(isa, cell).forward64;
  return kernels(isa).float64[cell];
}
inline const ForwardKernels<BFloat16>& forward_kernels(Isa isa, int cell, WeightFormat format,
                                                       BFloat16) {
  return (format == WeightFormat::kDot ? kernels(isa).dot_bfloat16 : kernels(isa).bfloat16)[cell];
}
inline const ForwardKernels<Float16>& forward_kernels(Isa isa, int cell, WeightFormat, Float16) {
  return kernels(isa).float16[cell];
}

inline const BackwardKernels<float>& backward_kernels(Isa isa, int cell, float) {
  if (cell >= kFirstOwnCell) return own_kernels(isa, cell).backward32;
  return kernels(isa).backward32[cell];
}
inline const BackwardKernels<double>& backward_kernels(Isa isa, int cell, double) {
  if (cell >= kFirstOwnCell) return own_kernels(isa, cell).backward64;
  return kernels(isa).backward64[cell];
}

inline const SampleKernel<float>& sample_kernel(Isa isa, float) { return kernels(isa).samples32; }
inline const SampleKernel<double>& sample_kernel(Isa isa, double) { return kernels(isa).samples64; }

inline const ScanKernels<float>& scan_kernels(Isa isa, float) { return kernels(isa).scan32; }
inline const ScanKernels<double>& scan_kernels(Isa isa, double) { return kernels(isa).scan64; }
inline const ScanKernels<BFloat16>& scan_kernels(Isa isa, BFloat16) {
  return kernels(isa).scan_bfloat16;
}
inline const ScanKernels<Float16>& scan_kernels(Isa isa, Float16) {
  return kernels(isa).scan_float16;
}

inline const BatchNormKernels<float>& batch_norm_kernels(Isa isa, float) {
  return *kernels(isa).batch_norm32;
}
inline const BatchNormKernels<double>& batch_norm_kernels(Isa isa, double) {
  return *kernels(isa).batch_norm64;
}

// The layout in which weights of a type are packed.
template <class scalar_t>
WeightFormat packed_format(Isa isa, int cell) {
  const bool dot = std::is_same_v<scalar_t, BFloat16> && cell_info(cell).dot_kernels &&
                   dot_kernels(isa, 1).bfloat16 != nullptr;
  return dot ? WeightFormat::kDot : WeightFormat::kPlain;
}

}  // namespace rnnfast
