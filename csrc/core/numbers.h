// Number types that C++ has no name for, and in what an engine adds them up.
#pragma once

#include <cstdint>

namespace rnnfast {

// The upper half of a float's bits.
struct BFloat16 {
  uint16_t bits;
};
// IEEE binary16.
struct Float16 {
  uint16_t bits;
};

// The type of sums, gates and states inside a call: float below float64.
template <class scalar_t>
struct AccumulatorOf {
  using type = scalar_t;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};
template <>
struct AccumulatorOf<Float16> {
  using type = float;
};
template <class scalar_t>
using accumulator_of = typename AccumulatorOf<scalar_t>::type;

}  // namespace rnnfast
