#include "onchip_tiles.h"

#include "cell_info.h"
#include "choose_cuda.h"
#include "onchip.h"

namespace rnnfast {
namespace {

// Tiles without a kernel, as choose_cuda and the model will see them: use(exchange, gates, operand,
// backward, hidden, blocks, parts, units, splits, kept). Of what fits, the fastest by the model at
// 16 rows, or within 3 % of it what is simpler. A thread's other registers: 40, 20 (5 in cells of
// one gate) for each unit of a row that it owns, and its sums beyond 16, but 72 at least.
// clang-format off
#define RNNFAST_PLANNED_TILES(use)                          \
  use(kCluster, 4, kHalf, false,  256,   8,  1,   8, 1, 16) \
  use(kCluster, 4, kHalf, false,  512,   8,  1,   8, 1, 21) \
  use(kCluster, 4, kHalf, false,  512,  16,  1,   8, 1, 21) \
  use(kCluster, 4, kHalf, false,  768,  16,  1,  24, 4,  7) \
  use(kCluster, 3, kHalf, false,  256,   8,  1,   8, 1, 16) \
  use(kCluster, 3, kHalf, false,  512,   8,  1,  16, 2, 14) \
  use(kCluster, 3, kHalf, false,  640,   8,  1,  16, 2,  7) \
  use(kCluster, 3, kHalf, false,  768,  16,  1,  16, 4,  8) \
  use(kCluster, 1, kHalf, false,  512,   8,  1,  16, 1, 32) \
  use(kCluster, 1, kHalf, false, 1024,   8,  1,  32, 2, 22) \
  use(kCluster, 1, kHalf, false, 1536,  16,  1,  48, 4, 15) \
  use(kCluster, 4, kTf32, false,  256,   8,  1,   8, 1, 21) \
  use(kCluster, 4, kTf32, false,  384,   8,  1,  24, 4,  7) \
  use(kCluster, 4, kTf32, false,  512,  16,  1,   8, 2, 22) \
  use(kCluster, 3, kTf32, false,  256,   8,  1,  16, 4,  8) \
  use(kCluster, 3, kTf32, false,  384,   8,  1,  16, 4,  8) \
  use(kCluster, 3, kTf32, false,  512,  16,  1,  16, 4, 15) \
  use(kCluster, 1, kTf32, false,  512,   8,  1,  32, 2, 22) \
  use(kCluster, 1, kTf32, false,  768,   8,  1,  48, 4, 15) \
  use(kCluster, 1, kTf32, false, 1024,  16,  1,  32, 4, 22) \
  use(kCluster, 4, kHalf, true,   256,   8,  8,  32, 1,  2) \
  use(kCluster, 4, kHalf, true,   512,   8,  4,  32, 1,  5) \
  use(kCluster, 4, kHalf, true,   512,  16,  8,  32, 1,  4) \
  use(kCluster, 4, kHalf, true,   768,  16,  8,  32, 1,  3) \
  use(kCluster, 3, kHalf, true,   256,   8,  8,  32, 1,  2) \
  use(kCluster, 3, kHalf, true,   512,   8,  4,  32, 1,  7) \
  use(kCluster, 3, kHalf, true,   768,  16,  8,  48, 1,  5) \
  use(kCluster, 1, kHalf, true,   512,   8,  1,  16, 1, 32) \
  use(kCluster, 1, kHalf, true,  1024,   8,  1,  32, 2, 22) \
  use(kCluster, 1, kHalf, true,  1536,  16,  4,  48, 1, 15) \
  use(kCluster, 4, kTf32, true,   256,   8,  8,  32, 1,  4) \
  use(kCluster, 4, kTf32, true,   384,   8,  8,  32, 1,  3) \
  use(kCluster, 4, kTf32, true,   512,  16,  8,  32, 1,  5) \
  use(kCluster, 3, kTf32, true,   256,   8,  8,  32, 1,  4) \
  use(kCluster, 3, kTf32, true,   384,   8,  8,  48, 1,  5) \
  use(kCluster, 3, kTf32, true,   512,  16,  8,  32, 1,  7) \
  use(kCluster, 1, kTf32, true,   512,   8,  4,  32, 1, 16) \
  use(kCluster, 1, kTf32, true,   768,   8,  4,  48, 1, 15) \
  use(kCluster, 1, kTf32, true,  1024,  16,  4,  32, 1, 22) \
  use(kGrid,    4, kHalf, false,  512,  16,  1,   8, 1, 21) \
  use(kGrid,    4, kHalf, false,  512,  32,  1,   8, 2, 16) \
  use(kGrid,    4, kHalf, false,  768,  32,  1,   8, 4, 12) \
  use(kGrid,    4, kHalf, false, 1024,  32,  1,   8, 2, 22) \
  use(kGrid,    4, kHalf, false, 1024,  64,  1,   8, 2, 22) \
  use(kGrid,    4, kHalf, false, 1536,  64,  1,  24, 8,  7) \
  use(kGrid,    4, kHalf, false, 2048, 128,  1,   8, 4, 22) \
  use(kGrid,    3, kHalf, false,  512,  16,  1,  16, 4,  8) \
  use(kGrid,    3, kHalf, false,  768,  32,  1,  24, 4,  8) \
  use(kGrid,    3, kHalf, false, 1024,  32,  1,  16, 4, 15) \
  use(kGrid,    3, kHalf, false, 1536,  64,  1,  24, 8,  8) \
  use(kGrid,    3, kHalf, false, 2048, 128,  1,  16, 8, 15) \
  use(kGrid,    1, kHalf, false, 1024,  16,  1,  32, 2, 22) \
  use(kGrid,    1, kHalf, false, 2048,  64,  1,  32, 4, 22) \
  use(kGrid,    4, kTf32, false,  512,  32,  1,   8, 2, 22) \
  use(kGrid,    4, kTf32, false, 1024,  64,  1,   8, 4, 22) \
  use(kGrid,    3, kTf32, false,  512,  16,  1,  16, 4, 15) \
  use(kGrid,    3, kTf32, false,  768,  32,  1,  24, 8,  8) \
  use(kGrid,    3, kTf32, false, 1024,  64,  1,  16, 8, 15) \
  use(kGrid,    1, kTf32, false, 1024,  32,  1,  32, 4, 22) \
  use(kGrid,    1, kTf32, false, 2048, 128,  1,  16, 4, 45) \
  use(kGrid,    4, kHalf, true,   512,  16, 16,  64, 1,  2) \
  use(kGrid,    4, kHalf, true,   512,  32, 32,  32, 1,  1) \
  use(kGrid,    4, kHalf, true,   768,  32,  8,  16, 1,  6) \
  use(kGrid,    4, kHalf, true,  1024,  32, 32, 128, 1,  1) \
  use(kGrid,    4, kHalf, true,  1024,  64,  8,  16, 1,  8) \
  use(kGrid,    4, kHalf, true,  1536,  64,  8,  16, 1,  6) \
  use(kGrid,    4, kHalf, true,  2048, 128, 16,  32, 1,  5) \
  use(kGrid,    3, kHalf, true,   512,  16, 16,  32, 1,  2) \
  use(kGrid,    3, kHalf, true,   768,  32,  8,  16, 1,  6) \
  use(kGrid,    3, kHalf, true,  1024,  32,  1,  32, 8,  7) \
  use(kGrid,    3, kHalf, true,  1536,  64,  8,  32, 2,  4) \
  use(kGrid,    3, kHalf, true,  2048, 128,  8,  16, 1, 15) \
  use(kGrid,    1, kHalf, true,  1024,  16,  1,  32, 2, 22) \
  use(kGrid,    1, kHalf, true,  2048,  64,  1,  32, 4, 22) \
  use(kGrid,    4, kTf32, true,   512,  32, 32,  64, 1,  2) \
  use(kGrid,    4, kTf32, true,  1024,  64, 16,  32, 1,  5) \
  use(kGrid,    4, kTf32, true,  1536, 128, 16,  16, 1,  6) \
  use(kGrid,    3, kTf32, true,   512,  16, 16,  64, 1,  3) \
  use(kGrid,    3, kTf32, true,   768,  32, 32,  64, 1,  2) \
  use(kGrid,    3, kTf32, true,  1024,  64,  8,  16, 1, 15) \
  use(kGrid,    3, kTf32, true,  1536, 128, 16,  32, 2,  4) \
  use(kGrid,    1, kTf32, true,  1024,  32,  1,  32, 4, 22) \
  use(kGrid,    1, kTf32, true,  2048, 128,  8,  16, 1, 32)
// clang-format on

constexpr int kLeastCapability = 80, kClusterCapability = 90;

std::string capability_name(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// Where the weights of a group lie.
std::string place(const OnchipTile& tile) {
  if (tile.exchange == Exchange::kNone) return "one block";
  if (tile.exchange == Exchange::kCluster)
    return "a cluster of " + std::to_string(tile.blocks) + " blocks";
  return std::to_string(tile.blocks) + " blocks";
}

// Why no tile takes the cell and the numbers, whatever the sizes.
std::string why_not_cell(const Shape& shape, Operand operand) {
  if (shape.drops_h) return "the on-chip engine has no dropout of h";
  const CellInfo& cell = cell_info(shape.cell);
  if (shape.cell >= kFirstOwnCell)
    return std::string("the on-chip engine has no cells of load_cell, got ") + cell.name;
  if (!cell.dense)
    return std::string("the on-chip engine needs a dense recurrence, got ") + cell.name +
           ", whose steps have no product";
  if (cell.stages)
    return std::string("the on-chip engine has one product a step and nothing behind it, got ") +
           cell.name + ", whose steps have stages";
  if (cell.states > 2)
    return std::string("the on-chip engine carries h and c, got ") + cell.name + ", which has " +
           std::to_string(cell.states) + " states";
  if (cell.options)
    return std::string("the on-chip engine has no chosen activations and no bound of c, got ") +
           cell.name;
  if (shape.output_size != shape.hidden_size)
    return "the on-chip engine has no projection, got one from H = " +
           std::to_string(shape.hidden_size) + " to P = " + std::to_string(shape.output_size);
  if (operand == Operand::kFloat32)
    return "the on-chip engine has no float32 products without TF32, which "
           "torch.backends.cudnn.rnn.fp32_precision allows";
  if (operand == Operand::kFloat64) return "float64 products are not in the tiles";
  return "";
}

std::string why_not_device(const OnchipTile& tile, const CudaDevice& device) {
  const int least = tile.exchange == Exchange::kCluster ? kClusterCapability : kLeastCapability;
  if (device.capability < least)
    return std::string("the on-chip engine") +
           (least == kClusterCapability ? " with the cluster exchange" : "") +
           " needs compute capability " + capability_name(least) + " or higher, got " +
           capability_name(device.capability);
  if (device.shared_bytes < tile.shared_bytes())
    return "the on-chip engine needs " + std::to_string(tile.shared_bytes()) +
           " bytes of shared memory a block for up to H = " + std::to_string(tile.hidden) +
           " units, the device has " + std::to_string(device.shared_bytes);
  if (device.multiprocessors < tile.blocks)
    return "the on-chip engine needs a multiprocessor for each of " + std::to_string(tile.blocks) +
           " blocks, the device has " + std::to_string(device.multiprocessors);
  return "";
}

// Registers of a thread that hold no weights, at least, and shared memory of a block of Hopper.
constexpr int kOtherRegisters = 72, kMostShared = 227 * 1024, kMostThreads = 1024;

constexpr bool fits(const OnchipTile& t) {
  const bool whole = t.hidden % t.blocks == 0 && t.blocks % t.parts == 0 &&
                     t.own_units() % t.units == 0 &&
                     t.depth_units() % (t.slice() * t.splits) == 0 && t.kept <= t.slices();
  return whole && t.threads() <= kMostThreads &&
         t.weight_registers() + kOtherRegisters <= t.registers() && t.shared_bytes() <= kMostShared;
}

// Smaller ones first.
bool is_smaller(const OnchipTile& a, const OnchipTile& b) {
  return a.hidden != b.hidden ? a.hidden < b.hidden : a.blocks < b.blocks;
}

}  // namespace

#define RNNFAST_TILE(gates, operand, backward, hidden, units, kept) \
  {Exchange::kNone, gates, Operand::operand, backward, hidden, 1, 1, units, kept},
#define RNNFAST_PLANNED_TILE(exchange, gates, operand, backward, hidden, blocks, parts, units, \
                             splits, kept)                                                     \
  {Exchange::exchange,                                                                         \
   gates,                                                                                      \
   Operand::operand,                                                                           \
   backward,                                                                                   \
   hidden,                                                                                     \
   blocks,                                                                                     \
   parts,                                                                                      \
   units,                                                                                      \
   kept,                                                                                       \
   splits},
constexpr OnchipTile kOnchipTiles[] = {RNNFAST_ONCHIP_TILES(RNNFAST_TILE)
                                           RNNFAST_PLANNED_TILES(RNNFAST_PLANNED_TILE)};
#undef RNNFAST_TILE
#undef RNNFAST_PLANNED_TILE

const int kNumOnchipTiles = static_cast<int>(sizeof(kOnchipTiles) / sizeof(kOnchipTiles[0]));

static_assert(
    [] {
      for (const OnchipTile& tile : kOnchipTiles)
        if (!fits(tile)) return false;
      return true;
    }(),
    "a tile has no whole parts, or needs more registers or shared memory than there are");

const char* exchange_name(Exchange exchange) {
  static const char* const names[] = {"none", "cluster", "grid"};
  return names[static_cast<int>(exchange)];
}

std::string why_not_layer(const OnchipTile& tile, const Shape& shape) {
  const std::string why = why_not_cell(shape, tile.operand);
  if (!why.empty()) return why;
  const CellInfo& cell = cell_info(shape.cell);
  if (cell.gates != tile.gates)
    return "the on-chip tile is for cells of G = " + std::to_string(tile.gates) + " gates, got " +
           cell.name + " with " + std::to_string(cell.gates);
  if (shape.itemsize != tile.itemsize())
    return "the on-chip tile is for numbers of " + std::to_string(tile.itemsize()) +
           " bytes, got " + std::to_string(shape.itemsize);
  if (shape.hidden_size > tile.hidden)
    return "the on-chip engine holds w_hh of up to H = " + std::to_string(tile.hidden) +
           " units in " + place(tile) + (tile.backward ? " in backward" : "") +
           ", got H = " + std::to_string(shape.hidden_size);
  return "";
}

std::string why_not_tile(const OnchipTile& tile, const Shape& shape, const CudaDevice& device) {
  const std::string why = why_not_layer(tile, shape);
  if (!why.empty()) return why;
  if (!is_built(tile.exchange))
    return std::string("the on-chip engine has no kernel for the ") + exchange_name(tile.exchange) +
           " exchange yet";
  return why_not_device(tile, device);
}

int find_tile(const Shape& shape, Operand operand, bool backward, Exchange exchange,
              const CudaDevice& device, std::string* why) {
  int found = -1, nearest = -1;
  for (int i = 0; i < kNumOnchipTiles; ++i) {
    const OnchipTile& tile = kOnchipTiles[i];
    if (tile.exchange != exchange || tile.backward != backward || tile.operand != operand ||
        tile.gates != cell_info(shape.cell).gates)
      continue;
    if (nearest < 0 || is_smaller(kOnchipTiles[nearest], tile)) nearest = i;
    if (found >= 0 && !is_smaller(tile, kOnchipTiles[found])) continue;
    if (why_not_tile(tile, shape, device).empty()) found = i;
  }
  if (!why) return found;
  *why = "";
  if (found >= 0) return found;
  *why = why_not_cell(shape, operand);
  if (!why->empty()) return found;
  *why = nearest >= 0 ? why_not_tile(kOnchipTiles[nearest], shape, device)
                      : "the on-chip engine has no tile for cells of G = " +
                            std::to_string(cell_info(shape.cell).gates) + " gates";
  return found;
}

}  // namespace rnnfast
