#include "choose_engine.h"

#include <algorithm>

#include "cell_info.h"

namespace rnnfast {
namespace {

// Below this many operations in a call, waking a second thread costs more than it saves (a wake-up
// is 5 to 20 us).
constexpr double kParallelFlops = 4e6;
// A step split by units ends in a barrier of about 0.2 us, worth it from this many operations a
// step and thread.
constexpr double kUnitFlopsPerStep = 6e4;
// Each thread of a batch split reads all of w_hh every
// step, which is free while that fits its private cache.
constexpr int64_t kPrivateCacheBytes = 1 << 20;
constexpr int64_t kRowsPerTile = 6;
// Packing reads and writes the weights once, about as long
// as this many tiles of rows take to pass through them.
constexpr int64_t kPackingTiles = 3;

Kernel choose_kernel(int64_t passes, int forced) {
  if (forced >= 0) return static_cast<Kernel>(forced);
  return passes >= kPackingTiles ? Kernel::kPacked : Kernel::kDirect;
}

int64_t tiles(int64_t rows) { return (rows + kRowsPerTile - 1) / kRowsPerTile; }

}  // namespace

Choice choose_engine(const Shape& s, int max_threads, int forced_kernel) {
  const CellInfo& cell = cell_info(s.cell);
  const int64_t recurrent = cell.diagonal ? 1 : s.output_size;
  const double flops_per_row = 2.0 * cell.gates * s.hidden_size * (s.input_size + recurrent);
  const int64_t mean_rows = std::max<int64_t>(1, s.rows / std::max<int64_t>(1, s.seq_len));

  Choice choice;
  choice.kernel_ih = choose_kernel(tiles(s.rows), forced_kernel);
  choice.kernel_hh =
      cell.diagonal ? Kernel::kNone : choose_kernel(s.seq_len * tiles(mean_rows), forced_kernel);
  choice.threads = 1;
  choice.split = Split::kSerial;
  if (max_threads < 2 || flops_per_row * s.rows < kParallelFlops) return choice;

  const int64_t w_hh_bytes = cell.gates * s.hidden_size * recurrent * s.itemsize;
  const int64_t row_tiles = tiles(s.batch), units = (s.hidden_size + 15) / 16;
  const bool rows_suffice = row_tiles >= max_threads && s.batch >= 4 * max_threads;
  if (cell.diagonal || (rows_suffice && w_hh_bytes <= kPrivateCacheBytes)) {
    const int64_t parts = rows_suffice ? row_tiles : units;
    choice.split = rows_suffice ? Split::kBatch : Split::kUnits;
    choice.threads = static_cast<int>(std::min<int64_t>(max_threads, parts));
  } else {
    const double step_flops = 2.0 * cell.gates * s.hidden_size * recurrent * mean_rows;
    const int64_t worth = static_cast<int64_t>(step_flops / kUnitFlopsPerStep);
    const int64_t by_units =
        std::min<int64_t>({max_threads, units, s.seq_len == 1 ? max_threads : worth});
    choice.split = Split::kUnits;
    choice.threads = static_cast<int>(by_units);
    if (by_units < max_threads && rows_suffice) {
      choice.split = Split::kBatch;
      choice.threads = max_threads;
    }
  }
  if (choice.threads < 2) {
    choice.threads = 1;
    choice.split = Split::kSerial;
  }
  return choice;
}

}  // namespace rnnfast
