// Where things lie in an on-chip kernel: entries of a warp's product in its lanes, units and gates
// in its rows, operands in shared memory. Pure index maths, the same on the device and in tests.
//
// A warp multiplies weights (rows: gates of its units) with what all units have for 8 rows of the
// batch. It owns kUnits units, in halves of 8; lane l has, of each half, unit l / 4 and the batch
// rows 2 * (l % 4) and the one after.
#pragma once

#include "../cells/cell.h"
#include "../core/onchip.h"
#include "convert.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// The registers of a product of 16 rows, kDepth numbers deep, with 8 columns (PTX ISA, mma.m16n8k16
// of 16 bits and m16n8k8 of TF32): A, row major, in four; B in two; sums in four.
template <class scalar_t>
struct Fragment {
  static constexpr int kEach = 4 / sizeof(scalar_t);  // numbers in a register
  static constexpr int kDepth = 8 * kEach;

  static constexpr RNNFAST_HD int a_half(int i) { return i % 2; }  // rows 0-7 or 8-15
  static constexpr RNNFAST_HD int a_depth(int lane, int i) {
    return kEach * (lane % 4) + kDepth / 2 * (i / 2);
  }
  static constexpr RNNFAST_HD int b_register(int depth) { return depth / (kDepth / 2); }
  static constexpr RNNFAST_HD int b_lane(int depth, int column) {
    return 4 * column + depth % (kDepth / 2) / kEach;
  }
};

constexpr RNNFAST_HD int unit_of_lane(int lane) { return lane / 4; }
constexpr RNNFAST_HD int row_of_lane(int lane, int column) { return 2 * (lane % 4) + column; }

// Sums of a warp: half `h` of its row tiles is gate h / kHalves of units half h % kHalves.
template <int kUnits>
struct Halves {
  static constexpr int kHalves = kUnits / 8;
  static constexpr RNNFAST_HD int gate(int half) { return half / kHalves; }
  static constexpr RNNFAST_HD int units(int half) { return half % kHalves; }
  static constexpr RNNFAST_HD int half(int gate, int units) { return gate * kHalves + units; }
};
constexpr RNNFAST_HD int sum_register(int half, int column) { return 2 * (half % 2) + column; }

// The word of an operand (slices, 32 lanes, 2) that holds what unit `unit` has for a row: read, a
// lane takes its two registers of a slice at once.
template <class scalar_t>
constexpr RNNFAST_HD int operand_word(int unit, int row) {
  using F = Fragment<scalar_t>;
  const int depth = unit % F::kDepth;
  return (unit / F::kDepth * 32 + F::b_lane(depth, row)) * 2 + F::b_register(depth);
}
constexpr int kSliceWords = 64;

struct alignas(8) Words2 {
  uint32_t of[2];
};
struct alignas(16) Words4 {
  uint32_t of[4];
};

// The rows of a launch's steps, in the order in which it takes them.
struct StepAt {
  int64_t first_row;
  int rows;
};
struct OnchipSteps {
  int batch, time, count;  // time: of the first step
  int direction;           // 1, or -1 where time runs down
  const int64_t* offsets;  // (T + 1) on the device; null: every step has the whole batch

  RNNFAST_HD StepAt at(int step) const {
    const int t = time + step * direction;
    if (!offsets) return {static_cast<int64_t>(t) * batch, batch};
    return {offsets[t], static_cast<int>(offsets[t + 1] - offsets[t])};
  }
  // Steps [begin, end) have row `row`: as rows only ever become more, or less, they lie together.
  RNNFAST_HD void steps_of(int row, int& begin, int& end) const {
    begin = 0;
    end = count;
    if (!offsets) return;
    const bool from_start = at(0).rows > row;
    if (from_start && at(count - 1).rows > row) return;
    int low = 0, high = count;  // the first step that is unlike the first one
    while (low < high) {
      const int middle = (low + high) / 2;
      if ((at(middle).rows > row) == from_start)
        low = middle + 1;
      else
        high = middle;
    }
    (from_start ? end : begin) = low;
  }
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
