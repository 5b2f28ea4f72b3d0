// The two operands of an on-chip product: weights, which stay in registers and shared memory, and
// what the units of a block give each other every step.
#pragma once

#include "onchip_layout.h"
#include "ops/mma.cuh"
#include "ops/tf32.cuh"
#include "ops/transpose.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Numbers as a register of an operand holds them.
__device__ inline uint32_t operand_bits(Float16 x) { return x.bits; }
__device__ inline uint32_t operand_bits(BFloat16 x) { return x.bits; }
__device__ inline uint32_t operand_bits(float x) { return round_to_tf32(x); }

// A lane's weights: kSlices x kTiles fragments, the first kKept slices in registers, the others in
// shared memory, where no other lane reads them.
template <class scalar_t, int kSlices, int kTiles, int kKept>
class Weights {
  using F = Fragment<scalar_t>;

 public:
  static constexpr int kSharedBytes = (kSlices - kKept) * kTiles * kFragmentBytes;  // of a warp
  // Sums beside each other where a warp has few tiles: one product's latency hides another's.
  static constexpr int kChains = kTiles >= 4 ? 1 : 4 / kTiles;
  using Sums = float[kChains][kTiles][4];
  static_assert((kSlices - kKept) % kChains == 0, "the loop over shared memory has no remainder");

  // entry(tile, half, depth): a weight, zero beyond the layer's units.
  template <class Entry>
  __device__ Weights(char* shared, int lane, const Entry& entry)
      : shared_(reinterpret_cast<Words4*>(shared) + lane) {
    RNNFAST_UNROLL
    for (int slice = 0; slice < kKept; ++slice) {
      RNNFAST_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) load(kept_[slice][tile], slice, tile, lane, entry);
    }
    RNNFAST_NO_UNROLL
    for (int slice = kKept; slice < kSlices; ++slice) {
      RNNFAST_UNROLL
      for (int tile = 0; tile < kTiles; ++tile)
        load(rest(slice, tile).of, slice, tile, lane, entry);
    }
  }

  // operand(slice, tile): the lane's words of the other side.
  template <class Operand>
  __device__ void multiply(Sums& sums, const Operand& operand) const {
    RNNFAST_UNROLL
    for (int slice = 0; slice < kKept; ++slice) {
      RNNFAST_UNROLL
      for (int tile = 0; tile < kTiles; ++tile)
        mma<scalar_t>(sums[slice % kChains][tile], kept_[slice][tile], operand(slice, tile).of);
    }
    // A loop, since the compiler would ask for more of these at once than it has registers for.
    RNNFAST_NO_UNROLL
    for (int slice = kKept; slice < kSlices; slice += kChains) {
      RNNFAST_UNROLL
      for (int i = 0; i < kChains * kTiles; ++i) {
        const int chain = i / kTiles, tile = i % kTiles;
        mma<scalar_t>(sums[chain][tile], rest(slice + chain, tile).of,
                      operand(slice + chain, tile).of);
      }
    }
  }

 private:
  template <class Entry>
  static __device__ void load(uint32_t (&words)[4], int slice, int tile, int lane,
                              const Entry& entry) {
    RNNFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int depth = slice * F::kDepth + F::a_depth(lane, i);
      words[i] = operand_bits(entry(tile, F::a_half(i), depth));
      if (F::kEach == 2) words[i] |= operand_bits(entry(tile, F::a_half(i), depth + 1)) << 16;
    }
  }

  __device__ Words4& rest(int slice, int tile) const {
    return shared_[((slice - kKept) * kTiles + tile) * 32];
  }

  uint32_t kept_[at_least_one<kKept>][kTiles][4];
  Words4* shared_;
};

// Numbers of 8 units and 8 rows, on their way from sums to operands and to tensors: narrowed, as
// the tensors hold them.
template <class scalar_t>
struct Octet {
  // Two units of one row, beside each other in memory.
  uint32_t pair;

  // From the layout of sums; all lanes of a warp at the same time.
  __device__ void set(float first, float second) {
    scalar_t a, b;
    narrow(first, a);
    narrow(second, b);
    pair = transpose_8x8(a.bits | static_cast<uint32_t>(b.bits) << 16);
  }
  // Of rows for which keep(row) is false, nothing reaches the product.
  template <class Keep>
  __device__ void publish(uint32_t* operand, int first_unit, int lane, const Keep& keep) const {
    operand[operand_word<scalar_t>(first_unit + 2 * (lane % 4), lane / 4)] =
        keep(lane / 4) ? pair : 0;
  }
  // to(row): where the tensor has unit 0 of the row, or null.
  template <class To>
  __device__ void store(int64_t first_unit, int64_t hidden, int lane, const To& to) const {
    scalar_t* const row = to(lane / 4);
    const int64_t unit = first_unit + 2 * (lane % 4);
    if (!row || unit >= hidden) return;
    if (hidden % 2 == 0) {
      *reinterpret_cast<uint32_t*>(row + unit) = pair;
    } else {
      row[unit].bits = static_cast<uint16_t>(pair);
      if (unit + 1 < hidden) row[unit + 1].bits = static_cast<uint16_t>(pair >> 16);
    }
  }
};
template <>
struct Octet<float> {
  float of[2];  // one unit of two rows, as sums have them

  __device__ void set(float first, float second) {
    of[0] = first;
    of[1] = second;
  }
  template <class Keep>
  __device__ void publish(uint32_t* operand, int first_unit, int lane, const Keep& keep) const {
    RNNFAST_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int row = row_of_lane(lane, j);
      operand[operand_word<float>(first_unit + unit_of_lane(lane), row)] =
          keep(row) ? round_to_tf32(of[j]) : 0;
    }
  }
  template <class To>
  __device__ void store(int64_t first_unit, int64_t hidden, int lane, const To& to) const {
    const int64_t unit = first_unit + unit_of_lane(lane);
    RNNFAST_UNROLL
    for (int j = 0; j < 2; ++j) {
      float* const row = to(row_of_lane(lane, j));
      if (row && unit < hidden) row[unit] = of[j];
    }
  }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
