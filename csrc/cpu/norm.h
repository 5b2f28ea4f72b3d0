// Layer normalisation (Ba et al. 2016, arXiv:1607.06450) of parts of rows,
// forward and backward:
//   y = gain * xhat + bias,  xhat = (x - mean) * scale,  scale = 1 /
//   sqrt(variance + kNormEps)
// The mean is taken first, then the squares of what differs from it, so that a
// large mean costs no digits. Sums run over lanes in a fixed order, and bits
// depend on nothing but the row.
#pragma once

#include "../cells/stages.h"
#include "units.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
struct Moments {
  scalar_t mean, scale;
};

// The sum of value(at, left) over vectors: the `left` numbers from `at` on,
// zeros in other lanes.
template <class scalar_t, class Value>
RNNFAST_HD scalar_t sum_of(int64_t count, const Value& value) {
  using V = vector_of<scalar_t>;
  constexpr int64_t kLanes = lanes_of<scalar_t>;
  V sums[4] = {};
  int64_t at = 0;
  for (; at + 4 * kLanes <= count; at += 4 * kLanes) {
    RNNFAST_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] += value(at + i * kLanes, kLanes);
  }
  for (; at < count; at += kLanes) sums[0] += value(at, smaller(kLanes, count - at));
  return sum_lanes<scalar_t>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Lanes beyond the first `left` as zeros.
template <class scalar_t>
RNNFAST_HD vector_of<scalar_t> first_lanes(vector_of<scalar_t> v, int64_t left) {
  if (left >= lanes_of<scalar_t>) return v;
  scalar_t lanes[lanes_of<scalar_t>];
  store(lanes, v);
  return load_part(lanes, left);
}

RNNFAST_HD float square_root(float x) { return __builtin_sqrtf(x); }
RNNFAST_HD double square_root(double x) { return __builtin_sqrt(x); }

template <class scalar_t>
__attribute__((noinline)) Moments<scalar_t> moments_of(const scalar_t* x, int64_t count) {
  using V = vector_of<scalar_t>;
  const scalar_t over = scalar_t(1) / static_cast<scalar_t>(count);
  const scalar_t mean = over * sum_of<scalar_t>(count, [&](int64_t at, int64_t left) {
                          return load_part(x + at, left);
                        });
  const V center = mean - V{};
  const scalar_t variance = over * sum_of<scalar_t>(count, [&](int64_t at, int64_t left) {
                              const V v =
                                  first_lanes<scalar_t>(load_part(x + at, left) - center, left);
                              return v * v;
                            });
  return {mean, scalar_t(1) / square_root(variance + scalar_t(kNormEps))};
}

// Calls use(at, left) for the vectors of `count` numbers; of whole ones the
// compiler knows it.
template <class scalar_t, class Use>
RNNFAST_HD void for_vectors(int64_t count, const Use& use) {
  constexpr int64_t kLanes = lanes_of<scalar_t>;
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) use(at, kLanes);
  if (at < count) use(at, count - at);
}

// to = gain * xhat + bias; x and `to` may be one. Without a gain it is 1,
// without a bias 0.
template <class scalar_t>
__attribute__((noinline)) void normalise(const scalar_t* x, int64_t count, const scalar_t* gain,
                                         const scalar_t* bias, scalar_t* to) {
  using V = vector_of<scalar_t>;
  const Moments<scalar_t> m = moments_of(x, count);
  const V center = m.mean - V{}, scale = m.scale - V{};
  for_vectors<scalar_t>(count, [&](int64_t at, int64_t left) __attribute__((always_inline)) {
    V y = (load_part(x + at, left) - center) * scale;
    if (gain) y *= load_part(gain + at, left);
    if (bias) y += load_part(bias + at, left);
    store_part(to + at, y, left);
  });
}

// dx from dy, which may be one; adds to the gradients of gain and bias.
template <class scalar_t>
__attribute__((noinline)) void normalise_backward(const scalar_t* x, int64_t count,
                                                  const scalar_t* gain, const scalar_t* dy,
                                                  scalar_t* dx, scalar_t* dgain, scalar_t* dbias) {
  using V = vector_of<scalar_t>;
  const Moments<scalar_t> m = moments_of(x, count);
  const V center = m.mean - V{}, scale = m.scale - V{};
  V sum{}, sum_x{};
  for_vectors<scalar_t>(count, [&](int64_t at, int64_t left) __attribute__((always_inline)) {
    const V d = load_part(dy + at, left), xhat = (load_part(x + at, left) - center) * scale;
    const V dxhat = gain ? d * load_part(gain + at, left) : d;  // zero beyond the row
    store_part(dbias + at, load_part(dbias + at, left) + d, left);
    store_part(dgain + at, load_part(dgain + at, left) + d * xhat, left);
    sum += dxhat;
    sum_x += dxhat * xhat;
  });
  const scalar_t over = scalar_t(1) / static_cast<scalar_t>(count);
  const V mean_d = over * sum_lanes<scalar_t>(sum) - V{},
          mean_dx = over * sum_lanes<scalar_t>(sum_x) - V{};
  for_vectors<scalar_t>(count, [&](int64_t at, int64_t left) __attribute__((always_inline)) {
    const V d = load_part(dy + at, left), xhat = (load_part(x + at, left) - center) * scale;
    const V dxhat = gain ? d * load_part(gain + at, left) : d;
    store_part(dx + at, scale * (dxhat - mean_d - xhat * mean_dx), left);
  });
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
