// The units of a row, as the gate maths takes them: pairs of vectors as long as there are two, then
// vectors. W is either; a vector has `left` lanes of the layer, a pair is whole.
#pragma once

#include <type_traits>

#include "vec.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// All lanes, of rows that have room for them.
template <class W, class scalar_t>
RNNFAST_HD W load_whole(const scalar_t* from) {
  W values;
  __builtin_memcpy(&values, from, sizeof(values));
  return values;
}
template <class W, class scalar_t>
RNNFAST_HD void store_whole(scalar_t* to, W values) {
  __builtin_memcpy(to, &values, sizeof(values));
}

template <class W, class scalar_t>
RNNFAST_HD W load_units(const scalar_t* from, int64_t left) {
  if constexpr (std::is_same_v<W, vector_of<scalar_t>>)
    return load_part(from, left);
  else
    return load_whole<W>(from);
}
template <class W, class scalar_t>
RNNFAST_HD void store_units(scalar_t* to, W values, int64_t left) {
  if constexpr (std::is_same_v<W, vector_of<scalar_t>>)
    store_part(to, values, left);
  else
    store_whole(to, values);
}

// Calls use(W{}, unit, left) for all units of a row.
template <class scalar_t, class Use>
RNNFAST_HD void for_units(int64_t units, const Use& use) {
  constexpr int64_t kLanes = lanes_of<scalar_t>;
  int64_t unit = 0;
  for (; units - unit >= 2 * kLanes; unit += 2 * kLanes) use(pair_of<scalar_t>{}, unit, 2 * kLanes);
  for (; unit < units; unit += kLanes)
    use(vector_of<scalar_t>{}, unit, smaller(kLanes, units - unit));
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
