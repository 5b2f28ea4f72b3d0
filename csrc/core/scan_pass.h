// The maths of a scan's step, forward and backward, written once for vectors and for the device.
//
//   forward    h_t = a_t * h_{t-1} + b_t                        carries h
//   backward   db_t = dh_t + e_{t+1},  da_t = db_t * h_{t-1},  e_t = a_t * db_t     carries e
//
// Backward is the scan of dh against the direction of forward; what it carries out is dh0. A chunk
// of steps is a map of what is carried, e -> product * e + (its result from zero), which `follow`
// finds without writing anything; chunks are then joined in order. `Memory` loads and stores.
#pragma once

#include "math.h"
#include "scan_args.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Products that small change no digit of a sum with numbers of the size of what they multiply, and
// would become subnormal, which is slow.
template <class V>
RNNFAST_HD V without_dust(V product) {
  const V least = splat<V>(sizeof(scalar_of<V>) == 4 ? 0x1p-100 : 0x1p-900);
  return product < least ? (product > -least ? V{} : product) : product;
}

template <class Args>
RNNFAST_HD int64_t scan_time(const Args& p, bool down, int64_t step) {
  return down ? p.seq_len - 1 - step : step;
}

template <class scalar_t_, class Memory>
struct ForwardScan {
  using scalar_t = scalar_t_;
  ScanArgs<scalar_t> p;

  struct Step {
    const scalar_t *a, *b;
    scalar_t* h;
  };
  RNNFAST_HD Step step(int64_t k, int64_t row) const {
    const int64_t t = scan_time(p, p.reverse, k);
    return {p.a.data + t * p.a.step_stride + row * p.a.row_stride,
            p.b.data + t * p.b.step_stride + row * p.b.row_stride,
            p.h + (t * p.rows + row) * p.columns};
  }
  template <class V>
  RNNFAST_HD V start(int64_t row, int64_t column) const {
    return p.h0 ? Memory::template load<V>(p.h0 + row * p.columns + column) : V{};
  }
  template <class V>
  RNNFAST_HD static V take(const Step& at, int64_t i, V h) {
    h = Memory::template load<V>(at.a + i) * h + Memory::template load<V>(at.b + i);
    Memory::store(at.h + i, h);
    return h;
  }
  RNNFAST_HD static void ask_for(const Step& at, int64_t i) {
    Memory::ask_for(at.a + i), Memory::ask_for(at.b + i), Memory::ask_for(at.h + i);
  }
  template <class V>
  RNNFAST_HD static V follow(const Step& at, int64_t i, V h, V& product) {
    const V a = Memory::template load<V>(at.a + i);
    product = without_dust(product * a);
    return a * h + Memory::template load<V>(at.b + i);
  }
  template <class V>
  RNNFAST_HD void end(int64_t, int64_t, V) const {}
};

template <class scalar_t_, class Memory>
struct BackwardScan {
  using scalar_t = scalar_t_;
  ScanBackwardArgs<scalar_t> p;

  struct Step {
    const scalar_t *a, *dh, *before;  // before: h that enters the step, or null for zeros
    scalar_t *da, *db;
  };
  RNNFAST_HD Step step(int64_t k, int64_t row) const {
    const int64_t t = scan_time(p, !p.reverse, k);
    const int64_t plane = p.rows * p.columns, at = row * p.columns;
    const scalar_t* before = k + 1 < p.seq_len ? p.h + (p.reverse ? t + 1 : t - 1) * plane : p.h0;
    return {p.a.data + t * p.a.step_stride + row * p.a.row_stride,
            p.dh.data + t * p.dh.step_stride + row * p.dh.row_stride, before ? before + at : before,
            p.da ? p.da + t * plane + at : p.da, p.db ? p.db + t * plane + at : p.db};
  }
  template <class V>
  RNNFAST_HD V start(int64_t, int64_t) const {
    return V{};
  }
  template <class V>
  RNNFAST_HD static V take(const Step& at, int64_t i, V e) {
    const V g = Memory::template load<V>(at.dh + i) + e;
    if (at.da)
      Memory::store(at.da + i, at.before ? g * Memory::template load<V>(at.before + i) : V{});
    if (at.db) Memory::store(at.db + i, g);
    return Memory::template load<V>(at.a + i) * g;
  }
  RNNFAST_HD static void ask_for(const Step& at, int64_t i) {
    Memory::ask_for(at.a + i), Memory::ask_for(at.dh + i);
    if (at.before) Memory::ask_for(at.before + i);
    if (at.da) Memory::ask_for(at.da + i);
    if (at.db) Memory::ask_for(at.db + i);
  }
  template <class V>
  RNNFAST_HD static V follow(const Step& at, int64_t i, V e, V& product) {
    const V a = Memory::template load<V>(at.a + i);
    product = without_dust(product * a);
    return a * (Memory::template load<V>(at.dh + i) + e);
  }
  template <class V>
  RNNFAST_HD void end(int64_t row, int64_t column, V e) const {
    if (p.dh0) Memory::store(p.dh0 + row * p.columns + column, e);
  }
};

// Whether a chunk's map may be applied to what is carried. One that multiplies by more than 2 would
// multiply rounding errors too, one that overflowed says nothing, and a product that vanished would
// make a NaN of an infinity: such chunks are gone through again from what really enters them.
template <class acc_t>
RNNFAST_HD bool is_tame(acc_t product, acc_t result, acc_t carried) {
  const acc_t most = 2, not_finite = (result - result) + (carried - carried);
  return product <= most && product >= -most && not_finite == acc_t{};
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
