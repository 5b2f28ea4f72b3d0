// The task of every exchange through L2: all blocks gather all of h, a step at a time.
#pragma once
#include "harness.h"

namespace exchanges {

// h is batch x kHidden halves; a block owns a whole number of 8 units, a power of two of them.
struct Tile {
  int blocks, batch;
  int units() const {
    int units = 8;
    while (units * blocks < kHidden) units *= 2;
    return units;
  }
  int bytes() const { return 2 * batch * units(); }
  Parameters parameters() const {
    return {{"blocks", blocks},
            {"threads", kThreads},
            {"batch", batch},
            {"bytes_a_block", bytes()},
            {"bytes_gathered", static_cast<long long>(blocks) * bytes()}};
  }
};

// Batch 32 on every size of the grid, and batch 1 on the usual largest.
inline std::vector<Tile> gather_tiles(int sms) {
  std::vector<Tile> tiles;
  for (const int blocks : grid_sizes(sms)) tiles.push_back({blocks, 32});
  tiles.push_back({132, 1});
  return tiles;
}

}  // namespace exchanges
