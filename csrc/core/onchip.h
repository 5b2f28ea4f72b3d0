// The tiles of the on-chip engine as data, and what each can take: pure functions of numbers.
//
// W_hh stays in the registers and the shared memory of a group of blocks for all steps. A group
// runs one tile of the batch; its blocks own hidden units, with all gates of them, and give each
// other h (forward) or the gates' gradients and parts of dh (backward) every step: the exchange.
#pragma once

#include <cstdint>
#include <string>

#include "choose_engine.h"

namespace rnnfast {

struct CudaDevice;

// How blocks of a group reach each other: they need not (one block holds all of W_hh), through the
// shared memory of a cluster, or through the second cache.
enum class Exchange : int { kNone = 0, kCluster = 1, kGrid = 2 };
constexpr int kNumExchanges = 3;

// Numbers as the products read them. Sums and states are float32.
enum class Operand : int { kHalf = 0, kTf32 = 1, kFloat32 = 2, kFloat64 = 3 };

// Rows of the batch that a group runs: columns of one tensor core product.
constexpr int kBatchTile = 8;
// Hidden rows and bytes of an operand's fragment (16 rows, 32 bytes of each) in such a product.
constexpr int kRowTile = 16, kFragmentBytes = 512;

struct OnchipTile {
  Exchange exchange;
  int gates;  // of the cells that it serves
  Operand operand;
  bool backward;
  int hidden;      // units at most
  int blocks;      // of a group
  int parts;       // backward: sums of dh whose parts lie in so many blocks
  int units;       // of a warp
  int kept;        // slices of the product's depth whose weights stay in registers
  int splits = 1;  // parts of the depth, for as many warps; their sums meet in shared memory

  // A slice is what one product instruction takes of the depth: 16 numbers of 2 bytes, 8 of 4.
  constexpr int slice() const { return operand == Operand::kHalf ? 16 : 8; }
  constexpr int itemsize() const { return operand == Operand::kHalf ? 2 : 4; }
  // Units whose product a block computes, and units (of each gate, in backward) over which it sums.
  constexpr int own_units() const { return backward ? hidden * parts / blocks : hidden / blocks; }
  constexpr int depth_units() const { return backward ? hidden / parts : hidden; }
  // Of a warp.
  constexpr int slices() const { return depth_units() / slice() / splits; }
  constexpr int warps() const { return own_units() / units * splits; }
  constexpr int threads() const { return 32 * warps(); }
  // Fragments of weights of a warp for each slice: of two rows of 8 units, a gate each or one gate
  // of 16 units; in backward one for each gate and 16 units.
  constexpr int row_tiles() const {
    return backward ? gates * (units / kRowTile) : (gates * units + kRowTile - 1) / kRowTile;
  }
  // What the products read of the other side: h, or the gates' gradients; a step's.
  constexpr int operand_bytes() const {
    return (backward ? gates : 1) * depth_units() * kBatchTile * itemsize();
  }
  constexpr int shared_weights() const {
    return warps() * (slices() - kept) * row_tiles() * kFragmentBytes;
  }
  // Sums of the product: those of the other splits, and in backward those of the other parts,
  // twice.
  constexpr int sum_bytes() const { return (backward ? 1 : gates) * own_units() * kBatchTile * 4; }
  constexpr int shared_bytes() const {
    const int sums = (splits - 1 + (backward && parts > 1 ? 2 : 0)) * sum_bytes();
    return shared_weights() + 2 * operand_bytes() + sums;
  }
  constexpr int weight_registers() const { return 4 * kept * row_tiles(); }
  // Sums of a warp that are made beside each other, so that none waits for the product before it.
  constexpr int chains() const {
    if (row_tiles() < 4) return 4 / row_tiles() * row_tiles();
    return !backward ? row_tiles() : units > 4 * kRowTile ? units / kRowTile : 4;
  }
  // Registers that a thread can have when one block fills the multiprocessor, each quarter of which
  // has 16,384 for its warps.
  constexpr int registers() const {
    const int each = 16384 / ((warps() + 3) / 4 * 32) / 8 * 8;
    return each < 255 ? each : 255;
  }
};

// The table, smallest tiles first.
extern const OnchipTile kOnchipTiles[];
extern const int kNumOnchipTiles;
// Whether the engine has a kernel for tiles of this exchange.
constexpr bool is_built(Exchange exchange) { return exchange == Exchange::kNone; }

const char* exchange_name(Exchange exchange);

// Why the tile can't take a layer of these sizes, or an empty string; then why the engine can't run
// it here: no kernel yet, or the device.
std::string why_not_layer(const OnchipTile& tile, const Shape& shape);
std::string why_not_tile(const OnchipTile& tile, const Shape& shape, const CudaDevice& device);

// The index of the smallest tile that serves the pass, or -1 with the reason of the nearest one.
int find_tile(const Shape& shape, Operand operand, bool backward, Exchange exchange,
              const CudaDevice& device, std::string* why = nullptr);

}  // namespace rnnfast
