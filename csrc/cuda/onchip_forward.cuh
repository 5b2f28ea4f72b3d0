// Forward on chip: a block takes 8 rows of the batch through all steps of a launch, with w_hh in
// its registers and shared memory and the states in registers.
#pragma once

#include "onchip_operands.cuh"
#include "ops/shared.cuh"
#include "threads.cuh"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
struct OnchipForward {
  OnchipSteps steps;
  int hidden;
  // Rows of the batch: [0, carried) come from a launch before this one, [0, taken) have a step in
  // it, [0, goes_on) have one after it.
  int carried, taken, goes_on;
  const float* gx;  // (rows, G*H) from row gx_row on
  int64_t gx_row;
  const scalar_t *w_hh, *b_ih, *b_hh;
  const scalar_t *h0, *c0;  // (B, H), (S-1, B, H); null: zeros
  const uint8_t* reset;     // (N), or null
  float* carry;             // (S, B, H): the states but h, then h
  scalar_t *y, *h_n, *c_n;
  float* saved;  // (N, K + S - 1, H), or null
};

template <class Cell, class scalar_t, int kHidden, int kUnits_, int kKept>
struct ForwardTile {
  static constexpr int G = Cell::kGates, S = Cell::kStates, K = Cell::kSaved;
  static constexpr int kHalves = kUnits_ / 8, kSlices = kHidden / Fragment<scalar_t>::kDepth;
  static constexpr int kTiles = (G * kHalves + 1) / 2;
  static constexpr int kWarps = kHidden / kUnits_, kThreads = 32 * kWarps;
  static constexpr int kUnits = kUnits_;
  using At = Halves<kUnits>;
  using Block = Weights<scalar_t, kSlices, kTiles, kKept>;
  static constexpr int kOperandWords = kSlices * kSliceWords;
  static constexpr int kSharedBytes = 2 * 4 * kOperandWords + kWarps * Block::kSharedBytes;
};

template <class Cell, class scalar_t, int kHidden, int kUnits, int kKept>
__global__ void __launch_bounds__(ForwardTile<Cell, scalar_t, kHidden, kUnits, kKept>::kThreads, 1)
    onchip_forward(const OnchipForward<scalar_t> p) {
  using Tile = ForwardTile<Cell, scalar_t, kHidden, kUnits, kKept>;
  using At = typename Tile::At;
  constexpr int G = Tile::G, S = Tile::S, K = Tile::K, kHalves = Tile::kHalves;
  constexpr int kOperandWords = Tile::kOperandWords;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int H = p.hidden;
  const int64_t plane = static_cast<int64_t>(p.steps.batch) * H;  // of a state
  const int first_row = static_cast<int>(blockIdx.x) * kBatchTile;
  const int unit0 = warp * kUnits + unit_of_lane(lane);  // of half 0; the next one is 8 further
  uint32_t* const operands = reinterpret_cast<uint32_t*>(shared_memory());

  // Weights come on chip, once.
  const typename Tile::Block weights(
      shared_memory() + 2 * 4 * kOperandWords + warp * Tile::Block::kSharedBytes, lane,
      [&](int tile, int half, int depth) {
        const int at = 2 * tile + half, gate = At::gate(at);
        const int unit = unit0 + 8 * At::units(at);
        return gate < G && unit < H && depth < H ? p.w_hh[(gate * H + unit) * H + depth]
                                                 : scalar_t{};
      });
  // Units beyond the layer's stay zero in the operands.
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kOperandWords;
       i += static_cast<int>(blockDim.x))
    operands[i] = 0;
  float bias[G][kHalves], bias_hh[G][kHalves];  // one sum where the cell adds both sides anyway
  RNNFAST_UNROLL
  for (int s = 0; s < kHalves; ++s) {
    const int unit = unit0 + 8 * s;
    RNNFAST_UNROLL
    for (int g = 0; g < G; ++g) {
      bias[g][s] = p.b_ih && unit < H ? widen(p.b_ih[g * H + unit]) : 0.f;
      bias_hh[g][s] = p.b_hh && unit < H ? widen(p.b_hh[g * H + unit]) : 0.f;
      if (!Cell::kSplitGates) bias[g][s] += bias_hh[g][s];
    }
  }

  // States: of the launch before, or the initial ones. Rows that have no step keep theirs.
  float state[kHalves][2][S];
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
      const scalar_t* initial = k == 0 ? p.h0 : p.c0 ? p.c0 + (k - 1) * plane : nullptr;
      float& to = state[s][j][k];
      to = 0;
      if (here && carried)
        to = p.carry[(k == 0 ? S - 1 : k - 1) * plane + at];
      else if (here && initial)
        to = widen(initial[at]);
    }
  });
  Octet<scalar_t> h[kHalves];
  RNNFAST_UNROLL
  for (int s = 0; s < kHalves; ++s) h[s].set(state[s][0][0], state[s][1][0]);

  int step, end;
  p.steps.steps_of(first_row, step, end);
  const auto is_new = [&](const StepAt& at, int row) {
    return p.reset && first_row + row < at.rows && p.reset[at.first_row + first_row + row];
  };
  float gx[kHalves][2][G];
  const auto load_gx = [&](const StepAt& at) {
    each_cell([&](int s, int j, int row, int unit) {
      const float* const from = p.gx + (at.first_row - p.gx_row + row) * G * H + unit;
      RNNFAST_UNROLL
      for (int g = 0; g < G; ++g) gx[s][j][g] = row < at.rows && unit < H ? from[g * H] : 0.f;
    });
  };
  // Two steps ahead where a step's rows lie, one step ahead its gx: no load waits for another.
  StepAt now{}, next{};
  if (step < end) {
    now = p.steps.at(step);
    next = p.steps.at(step + 1 < end ? step + 1 : step);
    load_gx(now);
  }
  __syncthreads();

  for (int parity = 0; step < end; ++step, parity ^= 1) {
    // The states enter, zero where the row starts anew, and every warp tells its h to the others.
    uint32_t* const operand = operands + parity * kOperandWords;
    if (p.reset) {
      each_cell([&](int s, int j, int, int) {
        const bool anew = is_new(now, row_of_lane(lane, j));
        RNNFAST_UNROLL
        for (int k = 0; k < S; ++k) state[s][j][k] = anew ? 0.f : state[s][j][k];
      });
    }
    RNNFAST_UNROLL
    for (int s = 0; s < kHalves; ++s)
      h[s].publish(operand, warp * kUnits + 8 * s, lane,
                   [&](int row) { return !is_new(now, row); });
    const StepAt after = p.steps.at(step + 2 < end ? step + 2 : end - 1);
    // One barrier a step is enough with two operands: who is here has read the one before.
    __syncthreads();

    // gh of the warp's units. Where the cell only adds gx and gh, sums start from gx, which frees
    // its registers for the next step's; else those are asked for behind the cell.
    typename Tile::Block::Sums sums = {};
    each_cell([&](int s, int j, int, int) {
      RNNFAST_UNROLL
      for (int g = 0; g < G; ++g) {
        const int half = At::half(g, s);
        sums[0][half / 2][sum_register(half, j)] =
            Cell::kSplitGates ? bias_hh[g][s] : gx[s][j][g] + bias[g][s];
      }
    });
    if (!Cell::kSplitGates) load_gx(next);
    weights.multiply(sums, [&](int slice, int) {
      return *reinterpret_cast<const Words2*>(operand + slice * kSliceWords + 2 * lane);
    });

    // The cell, in registers.
    each_cell([&](int s, int j, int row, int unit) {
      float x[G], gh[G], saved[at_least_one<K>] = {};
      RNNFAST_UNROLL
      for (int g = 0; g < G; ++g) {
        const int half = At::half(g, s);
        float sum = sums[0][half / 2][sum_register(half, j)];
        RNNFAST_UNROLL
        for (int c = 1; c < Tile::Block::kChains; ++c)
          sum += sums[c][half / 2][sum_register(half, j)];
        x[g] = Cell::kSplitGates ? gx[s][j][g] + bias[g][s] : sum;
        gh[g] = Cell::kSplitGates ? sum : 0.f;
      }
      float entered[S];
      RNNFAST_UNROLL
      for (int k = 0; k < S; ++k) entered[k] = state[s][j][k];
      Cell{}.forward(x, gh, state[s][j], saved);
      // A unit beyond the layer's stays zero, whatever an infinite h made of its zero weights.
      if (row >= now.rows || unit >= H) {
        RNNFAST_UNROLL
        for (int k = 0; k < S; ++k) state[s][j][k] = entered[k];
      } else if (p.saved) {
        float* const to = p.saved + (now.first_row + row) * (K + S - 1) * H + unit;
        RNNFAST_UNROLL
        for (int k = 0; k < K; ++k) to[k * H] = saved[k];
        RNNFAST_UNROLL
        for (int k = 1; k < S; ++k) to[(K + k - 1) * H] = state[s][j][k];
      }
    });
    if (Cell::kSplitGates) load_gx(next);
    RNNFAST_UNROLL
    for (int s = 0; s < kHalves; ++s) {
      h[s].set(state[s][0][0], state[s][1][0]);
      h[s].store(warp * kUnits + 8 * s, H, lane, [&](int row) -> scalar_t* {
        const bool here = first_row + row < now.rows;
        return here ? p.y + (now.first_row + first_row + row) * H : nullptr;
      });
    }
    now = next;
    next = after;
  }

  // States leave: to the next launch, or out.
  each_cell([&](int s, int j, int row, int unit) {
    if (row >= p.taken || unit >= H) return;
    const int64_t at = static_cast<int64_t>(row) * H + unit;
    RNNFAST_UNROLL
    for (int k = 0; k < S; ++k) {
      const float value = state[s][j][k];
      if (row < p.goes_on)
        p.carry[(k == 0 ? S - 1 : k - 1) * plane + at] = value;
      else
        narrow(value, k == 0 ? p.h_n[at] : p.c_n[(k - 1) * plane + at]);
    }
  });
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
