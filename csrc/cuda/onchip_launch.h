// The on-chip kernels: which one a tile of the table means, how it is launched for some steps of a
// pass, and what a launch needs on the device besides.
#pragma once

#include "../core/onchip_tiles.h"
#include "onchip_backward.cuh"
#include "onchip_forward.cuh"
#include "schedule.h"
#include "stage.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

template <class scalar_t>
constexpr Operand kOperandOf = sizeof(scalar_t) == 2 ? Operand::kHalf : Operand::kTf32;

template <class Cell, class scalar_t, bool backward, int hidden, int units, int kept>
constexpr auto kernel_of_tile() {
  constexpr OnchipTile tile{
      Exchange::kNone, Cell::kGates, kOperandOf<scalar_t>, backward, hidden, 1, 1, units, kept};
  using Forward = ForwardTile<Cell, scalar_t, hidden, backward ? 8 : units, kept>;
  using Backward = BackwardTile<Cell, scalar_t, hidden, kept>;
  using Tile = std::conditional_t<backward, Backward, Forward>;
  static_assert(Tile::kUnits == units && Tile::kThreads == tile.threads() &&
                    Tile::kSharedBytes == tile.shared_bytes(),
                "the table and the kernel mean the same tile");
  if constexpr (backward)
    return &onchip_backward<Cell, scalar_t, hidden, kept>;
  else
    return &onchip_forward<Cell, scalar_t, hidden, units, kept>;
}

template <class Cell, class scalar_t>
constexpr bool has_tiles() {
#ifdef RNNFAST_OWN_CELL
  return false;  // load_cell's user waits for the compiler
#endif
  return Cell::kRecurrence == Recurrence::kDense && Cell::kStates <= 2 && !kHasOptions<Cell> &&
         sizeof(scalar_t) <= 4;
}

// Calls use(kernel) with the one of the tile, if it is for this cell, dtype and direction.
template <class Cell, class scalar_t, bool is_backward, class Use>
void with_onchip_kernel(const OnchipTile& tile, const Use& use) {
#define RNNFAST_USE(gates, operand, backward, hidden_, units, kept)                  \
  if constexpr (gates == Cell::kGates && Operand::operand == kOperandOf<scalar_t> && \
                (backward) == is_backward)                                           \
    if (tile.hidden == hidden_)                                                      \
      return use(kernel_of_tile<Cell, scalar_t, backward, hidden_, units, kept>());
  RNNFAST_ONCHIP_TILES(RNNFAST_USE)
#undef RNNFAST_USE
  throw std::runtime_error("rnnfast: the on-chip engine has no kernel for the tile of H = " +
                           std::to_string(tile.hidden));
}

// First rows of steps, on the device: they come as arguments of launches, since a copy from the
// host would need memory that outlives the call.
struct CopyOffsets {
  static constexpr int kMost = 480;  // a launch has 4 KB of arguments
  int64_t from[kMost];
  int64_t* to;
};
__global__ void __launch_bounds__(kThreads, 1) copy_offsets(const CopyOffsets p) {
  const int64_t at = first_column();
  wait_for_launch_before();
  if (first_row() > 0 || at >= CopyOffsets::kMost) return;
  p.to[at] = p.from[at];
}

// One pass's way onto the chip.
class OnchipRun {
 public:
  // `tile` null: the step engine runs the pass.
  template <class scalar_t>
  OnchipRun(const LayerArgs<scalar_t>& args, const OnchipTile* tile, Arena& arena)
      : tile_(tile), steps_(args.seq_len), offsets_(args.offsets) {
    if (tile_ && offsets_) device_offsets_ = arena.take<int64_t>(whole_launches() * kMost);
  }

  explicit operator bool() const { return tile_ != nullptr; }
  // Before the first launch.
  void begin(Stage& stage) const {
    if (!tile_ || !offsets_) return;
    for (int64_t part = 0; part < whole_launches(); ++part) {
      CopyOffsets p;
      p.to = device_offsets_ + part * kMost;
      for (int64_t i = 0; i < kMost; ++i) p.from[i] = offsets_[std::min(steps_, part * kMost + i)];
      stage.launch("copy_offsets", copy_offsets, p, 1, kMost);
    }
  }
  OnchipSteps steps(const Schedule& schedule, int64_t batch, int64_t order, int64_t count,
                    bool forward) const {
    return {static_cast<int>(batch), static_cast<int>(schedule.time(order)),
            static_cast<int>(count), schedule.reverse() == forward ? -1 : 1, device_offsets_};
  }
  template <class Kernel, class Args>
  void launch(Stage& stage, const char* name, Kernel kernel, const Args& args) const {
    const int64_t blocks = (args.taken + kBatchTile - 1) / kBatchTile;
    const int64_t warps = (args.hidden + tile_->units - 1) / tile_->units;
    stage.launch_blocks(name, kernel, args, blocks, 32 * warps, tile_->shared_bytes());
  }
  const OnchipTile& tile() const { return *tile_; }

 private:
  static constexpr int64_t kMost = CopyOffsets::kMost;
  int64_t whole_launches() const { return (steps_ + 1 + kMost - 1) / kMost; }

  const OnchipTile* tile_;
  int64_t steps_;
  const int64_t* offsets_;
  int64_t* device_offsets_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
