// Backward on chip: a block takes 8 rows of the batch through all steps of a launch, against the
// direction of forward, with w_hh in its registers and shared memory and the carried gradients of
// the states in registers.
#pragma once

#include "onchip_operands.cuh"
#include "ops/shared.cuh"
#include "threads.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// "Before" and "after" are those of the forward pass.
template <class scalar_t>
struct OnchipBackward {
  OnchipSteps steps;  // as this pass takes them: from the last to the first
  // Whether the pass has a step before the last one taken, which then holds the states that
  // entered.
  bool has_before;
  int hidden;
  // Rows of the batch: [0, carried) come from a launch of later steps, [0, taken) have a step in
  // this one, [0, goes_on) have one before it.
  int carried, taken, goes_on;
  Rows<const scalar_t> dy;  // of the whole pass; null data: none came
  const scalar_t *dh_n, *dc_n;
  const uint8_t* reset;  // (N), or null
  const scalar_t *w_hh, *y, *h0, *c0;
  const float* saved;   // (N, K + S - 1, H)
  float *dh, *dc;       // the carry: (B, H), (S-1, B, H)
  scalar_t *dgx, *dgh;  // (N, G*H); the same where the cell keeps one
  scalar_t* h_entered;  // (N, H) or null, as in step_backward.cuh
  scalar_t *dh0, *dc0;  // null: not asked for
};

template <class Cell, class scalar_t, int kHidden, int kKept>
struct BackwardTile {
  static constexpr int kUnits = 16;
  static constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  static constexpr int kHalves = kUnits / 8, kSlices = kHidden / Fragment<scalar_t>::kDepth;
  static constexpr int kWarps = kHidden / kUnits, kThreads = 32 * kWarps;
  using Block = Weights<scalar_t, kSlices, G, kKept>;
  static constexpr int kGateWords = kSlices * kSliceWords, kOperandWords = G * kGateWords;
  static constexpr int kSharedBytes = 2 * 4 * kOperandWords + kWarps * Block::kSharedBytes;
};

// What a step needs of one cell, asked for a step ahead.
template <class Cell>
struct BackwardInputs {
  float saved[at_least_one<Cell::kSaved>], prev[Cell::kStates], next[Cell::kStates], dy;
};

template <class Cell, class scalar_t, int kHidden, int kKept>
__global__ void __launch_bounds__(BackwardTile<Cell, scalar_t, kHidden, kKept>::kThreads, 1)
    onchip_backward(const OnchipBackward<scalar_t> p) {
  using Tile = BackwardTile<Cell, scalar_t, kHidden, kKept>;
  constexpr int G = Tile::G, S = Tile::S, K = Tile::K, kHalves = Tile::kHalves;
  constexpr int kPlanes = K + S - 1, kUnits = Tile::kUnits;
  constexpr int kGateWords = Tile::kGateWords, kOperandWords = Tile::kOperandWords;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int H = p.hidden;
  const int64_t plane = static_cast<int64_t>(p.steps.batch) * H;  // of a state
  const int first_row = static_cast<int>(blockIdx.x) * kBatchTile;
  const int unit0 = warp * kUnits + unit_of_lane(lane);
  uint32_t* const operands = reinterpret_cast<uint32_t*>(shared_memory());

  // Weights come on chip, once: columns of w_hh for the units of the warp, a tile a gate.
  const typename Tile::Block weights(
      shared_memory() + 2 * 4 * kOperandWords + warp * Tile::Block::kSharedBytes, lane,
      [&](int gate, int half, int depth) {
        const int unit = unit0 + 8 * half;
        return unit < H && depth < H ? p.w_hh[(gate * H + depth) * H + unit] : scalar_t{};
      });
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kOperandWords;
       i += static_cast<int>(blockDim.x))
    operands[i] = 0;

  // What arrives at the states: of the launch of later steps, or of the results. Rows that have no
  // step keep theirs.
  float dstate[kHalves][2][S];
  const auto each_cell = [&](const auto& use) {
    RNNFAST_UNROLL
    for (int s = 0; s < kHalves; ++s) {
      use(s, 0, first_row + row_of_lane(lane, 0), unit0 + 8 * s);
      use(s, 1, first_row + row_of_lane(lane, 1), unit0 + 8 * s);
    }
  };
  each_cell([&](int s, int j, int row, int unit) {
    const int64_t at = static_cast<int64_t>(row) * H + unit;
    const bool here = row < p.steps.batch && unit < H, carried = row < p.carried;
    RNNFAST_UNROLL
    for (int k = 0; k < S; ++k) {
      const float* carry = k == 0 ? p.dh : p.dc + (k - 1) * plane;
      const scalar_t* last = k == 0 ? p.dh_n : p.dc_n ? p.dc_n + (k - 1) * plane : nullptr;
      float& to = dstate[s][j][k];
      to = 0;
      if (here && carried)
        to = carry[at];
      else if (here && last)
        to = widen(last[at]);
    }
  });

  int step, end;
  p.steps.steps_of(first_row, step, end);
  // The step before, in the direction of forward, even if this launch does not take it.
  const auto before = [&](int of) {
    return of + 1 < p.steps.count || p.has_before ? p.steps.at(of + 1) : StepAt{};
  };
  const auto is_new = [&](const StepAt& at, int row) {
    return p.reset && row < at.rows && p.reset[at.first_row + row];
  };
  using Inputs = BackwardInputs<Cell>;
  Inputs inputs[kHalves][2];
  const auto load = [&](int of, const StepAt& at, const StepAt& at_before) {
    each_cell([&](int s, int j, int row, int unit) {
      Inputs in{};
      if (row < at.rows && unit < H) {
        const int64_t flat = at.first_row + row, flat_before = at_before.first_row + row;
        const bool anew = is_new(at, row), goes_on = row < at_before.rows;
        const float* const kept = p.saved + flat * kPlanes * H + unit;
        RNNFAST_UNROLL
        for (int k = 0; k < K; ++k) in.saved[k] = kept[k * H];
        in.next[0] = widen(p.y[flat * H + unit]);
        if (!anew && (Cell::kReadsH || p.h_entered)) {
          if (goes_on)
            in.prev[0] = widen(p.y[flat_before * H + unit]);
          else if (p.h0)
            in.prev[0] = widen(p.h0[static_cast<int64_t>(row) * H + unit]);
        }
        RNNFAST_UNROLL
        for (int k = 1; k < S; ++k) {
          in.next[k] = kept[(K + k - 1) * H];
          if (anew) continue;
          if (goes_on)
            in.prev[k] = p.saved[(flat_before * kPlanes + K + k - 1) * H + unit];
          else if (p.c0)
            in.prev[k] = widen(p.c0[(k - 1) * plane + static_cast<int64_t>(row) * H + unit]);
        }
        if (p.dy.data) {
          const int64_t time = p.steps.time + of * p.steps.direction;
          in.dy = widen(p.steps.offsets
                            ? p.dy.data[flat * p.dy.row_stride + unit]
                            : p.dy.data[time * p.dy.step_stride + row * p.dy.row_stride + unit]);
        }
      }
      inputs[s][j] = in;
    });
  };
  StepAt now{}, next{};
  if (step < end) {
    now = p.steps.at(step);
    next = before(step);
    load(step, now, next);
  }
  __syncthreads();

  for (int parity = 0; step < end; ++step, parity ^= 1) {
    uint32_t* const operand = operands + parity * kOperandWords;
    const StepAt after = step + 1 < end ? before(step + 1) : StepAt{};
    // The cell: gradients of the gates, to the tensors and to all warps.
    RNNFAST_UNROLL
    for (int s = 0; s < kHalves; ++s) {
      float dgx[2][G], dgh[2][G];
      RNNFAST_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int row = first_row + row_of_lane(lane, j), unit = unit0 + 8 * s;
        const Inputs& in = inputs[s][j];
        float arrived[S];
        RNNFAST_UNROLL
        for (int k = 0; k < S; ++k) arrived[k] = dstate[s][j][k];
        arrived[0] += in.dy;
        Cell{}.backward(in.saved, in.prev, in.next, arrived, dgx[j], dgh[j]);
        if (row < now.rows) {
          RNNFAST_UNROLL
          for (int k = 0; k < S; ++k) dstate[s][j][k] = arrived[k];
          if (p.h_entered && unit < H)
            narrow(in.prev[0], p.h_entered[(now.first_row + row) * H + unit]);
        }
      }
      const int first_unit = warp * kUnits + 8 * s;
      RNNFAST_UNROLL
      for (int g = 0; g < G; ++g) {
        const auto row_of = [&](scalar_t* tensor) {
          return [&, tensor](int row) -> scalar_t* {
            const int64_t flat = now.first_row + first_row + row;
            return first_row + row < now.rows ? tensor + (flat * G + g) * H : nullptr;
          };
        };
        Octet<scalar_t> gate;
        gate.set(dgh[0][g], dgh[1][g]);
        // Rows that have no step may publish anything: a column of the product is theirs alone.
        gate.publish(operand + g * kGateWords, first_unit, lane, [](int) { return true; });
        gate.store(first_unit, H, lane, row_of(p.dgh));
        if (Cell::kSplitGates) {
          gate.set(dgx[0][g], dgx[1][g]);
          gate.store(first_unit, H, lane, row_of(p.dgx));
        }
      }
    }
    // One barrier a step is enough with two operands: who is here has read the one before.
    __syncthreads();
    if (step + 1 < end) load(step + 1, next, after);

    // The way back through w_hh, a sum a gate.
    typename Tile::Block::Sums sums = {};
    weights.multiply(sums, [&](int slice, int gate) {
      return *reinterpret_cast<const Words2*>(operand + gate * kGateWords + slice * kSliceWords +
                                              2 * lane);
    });
    each_cell([&](int s, int j, int row, int unit) {
      if (row >= now.rows || unit >= H) return;
      RNNFAST_UNROLL
      for (int c = 0; c < Tile::Block::kChains; ++c) {
        RNNFAST_UNROLL
        for (int g = 0; g < G; ++g) dstate[s][j][0] += sums[c][g][sum_register(s, j)];
      }
      // A row that started anew sends nothing back.
      const bool anew = is_new(now, row);
      RNNFAST_UNROLL
      for (int k = 0; k < S; ++k) dstate[s][j][k] = anew ? 0.f : dstate[s][j][k];
    });
    now = next;
    next = after;
  }

  // What goes back leaves: to the launch of earlier steps, or to the initial states.
  each_cell([&](int s, int j, int row, int unit) {
    if (row >= p.taken || unit >= H) return;
    const int64_t at = static_cast<int64_t>(row) * H + unit;
    RNNFAST_UNROLL
    for (int k = 0; k < S; ++k) {
      const float value = dstate[s][j][k];
      if (row < p.goes_on) {
        (k == 0 ? p.dh : p.dc + (k - 1) * plane)[at] = value;
      } else if (k == 0) {
        if (p.dh0) narrow(value, p.dh0[at]);
      } else if (p.dc0) {
        narrow(value, p.dc0[(k - 1) * plane + at]);
      }
    }
  });
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
