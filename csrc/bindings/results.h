// Room for results, and the step from a tensor's type to a C++ one.
#pragma once

#include "checks.h"

namespace rnnfast {

template <class scalar_t>
scalar_t* out(const Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}

// Calls use with a number of the type.
template <class Use>
void with_type(ScalarType dtype, const Use& use) {
  switch (dtype) {
    case ScalarType::Float: return use(float{});
    case ScalarType::Double: return use(double{});
    case ScalarType::BFloat16: return use(BFloat16{});
    default: return use(Float16{});
  }
}

inline Tensor empty_as(const Tensor& tensor, ScalarType dtype) {
  const Place place = place_of(tensor);
  switch (tensor.dim()) {
    case 1: return empty({tensor.size(0)}, dtype, place);
    case 2: return empty({tensor.size(0), tensor.size(1)}, dtype, place);
    default: return empty({tensor.size(0), tensor.size(1), tensor.size(2)}, dtype, place);
  }
}

}  // namespace rnnfast
