#include "choose_engine.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cell_info.h"

namespace rnnfast {
namespace {

// Rates of one core, in units a microsecond, of a common core with AVX-512 (docs/architecture.md).
// Only their ratios decide.
constexpr double kOperations = 170e3;  // float32 operations of the micro-kernel
// From the private cache: weights that fill a small part of it, and more.
constexpr double kPrivateBytes = 110e3, kPrivateBytesFull = 60e3, kSmallPart = 0.25;
constexpr double kSharedBytes = 28e3;  // from beyond it
constexpr double kPackedBytes = 6e3;   // read, transposed and written
constexpr double kGateElements = 2e3;  // gate maths, for each gate and unit
// Of h, from the cores that wrote it: bytes a microsecond, and the wait for each row.
constexpr double kExchangeBytes = 6e3, kExchangeRow = 0.03;
// Waking the pool's threads, and a barrier; microseconds.
constexpr double kWake = 6, kWakeEach = 0.5, kBarrier = 0.5, kBarrierEach = 0.04;
// What sweeps over the weights leave in the private cache; the rest is for everything else.
constexpr double kCacheShare = 0.75;
constexpr int64_t kRowsPerTile = 6;
// A layer that follows another starts a chunk later: the shorter, the sooner, but the more often
// is w_ih read.
constexpr int64_t kFollowingChunks = 16, kLeastChunkRows = 8;
// Packing reads and writes the weights once, and a packed product is so much faster than a direct
// one that this many rows repay it.
constexpr int64_t kPackingRows = 80;

double divide_up(double a, double b) {
  return static_cast<double>((static_cast<int64_t>(a) + static_cast<int64_t>(b) - 1) /
                             static_cast<int64_t>(b));
}

Kernel choose_kernel(int64_t rows, int forced) {
  if (forced >= 0) return static_cast<Kernel>(forced);
  return rows >= kPackingRows ? Kernel::kPacked : Kernel::kDirect;
}

// Units that one panel holds: 16 with all their gates, or 64.
int64_t panels_of(const CellInfo& cell, int64_t units) {
  const int64_t width = cell.gates == 1 ? 64 : 16;
  return (units + width - 1) / width;
}

// `passes` products of `rows` rows with a matrix of `bytes`, of which `cached` bytes stay in the
// private cache from one pass to the next.
double product_time(double passes, double rows, double bytes, double cached, double private_cache,
                    int itemsize) {
  const double numbers = bytes / itemsize;
  const double operations = 2 * rows * numbers / kOperations * std::max(1.0, itemsize / 4.0);
  const double private_rate =
      bytes <= kSmallPart * private_cache ? kPrivateBytes : kPrivateBytesFull;
  // The first tile of rows brings a panel near, the others find it there.
  const double private_way =
      bytes / private_rate + (divide_up(rows, kRowsPerTile) - 1) * bytes / kPrivateBytes;
  const double shared_way = std::max(0.0, bytes - cached) / kSharedBytes;
  // They overlap, but not wholly.
  constexpr double kLeft = 0.25;
  const double longest = std::max({operations, private_way, shared_way});
  return passes * (longest + kLeft * (operations + private_way + shared_way - longest));
}

}  // namespace

double wake_time(int threads) { return kWake + kWakeEach * threads; }

Estimate estimate(const Shape& s, const Machine& machine, const Choice& choice) {
  const CellInfo& cell = cell_info(s.cell);
  const double threads = choice.threads, steps = s.seq_len;
  const double mean_rows = std::max(1.0, static_cast<double>(s.rows) / steps);
  // The largest share of a worker.
  double units = 1, rows = mean_rows;
  if (choice.split == Split::kUnits) {
    const double panels = static_cast<double>(panels_of(cell, s.hidden_size));
    units = divide_up(panels, threads) / panels;
  } else if (choice.split == Split::kBatch) {
    rows = std::max(1.0, mean_rows * divide_up(static_cast<double>(s.batch), threads) /
                             static_cast<double>(std::max<int64_t>(1, s.batch)));
  }
  const double gate_rows = static_cast<double>(cell.gates) * s.hidden_size;
  const double ih_bytes = gate_rows * s.input_size * s.itemsize;
  const double hh_bytes = !cell.dense ? 0 : gate_rows * s.output_size * s.itemsize;

  Estimate e{};
  // w_hh is swept once a step, w_ih once a chunk; what is swept more often stays in the cache.
  const double whole_cache = static_cast<double>(machine.private_cache);
  const double cache = kCacheShare * whole_cache;
  const bool everything = (ih_bytes + hh_bytes) * units <= cache;
  const double chunk =
      std::min(steps * rows, std::max(static_cast<double>(choice.chunk_rows), rows));
  const double chunks = std::max(1.0, steps * rows / chunk);
  e.products = product_time(steps, rows, hh_bytes * units, cache, whole_cache, s.itemsize) +
               product_time(chunks, chunk, ih_bytes * units,
                            everything ? cache : std::max(0.0, cache - hh_bytes * units),
                            whole_cache, s.itemsize);
  e.cells = steps * rows * units * gate_rows / kGateElements * std::max(1.0, s.itemsize / 4.0);
  // All threads pack.
  e.packing = s.packed ? 0
                       : ((choice.kernel_ih == Kernel::kPacked ? ih_bytes : 0) +
                          (choice.kernel_hh == Kernel::kPacked ? hh_bytes : 0)) /
                             threads / kPackedBytes;
  if (choice.threads > 1) {
    e.meetings = wake_time(choice.threads);
    if (choice.split == Split::kUnits && cell.dense) {
      const double others = mean_rows * s.output_size * s.itemsize * (1 - 1 / threads);
      e.meetings += steps * (kBarrier + kBarrierEach * threads + kExchangeRow * mean_rows +
                             others / kExchangeBytes);
    }
  }
  return e;
}

Choice choose_engine(const Shape& s, const Machine& machine, const Wish& wish) {
  const CellInfo& cell = cell_info(s.cell);
  const Kernel kernel = s.packed ? Kernel::kPacked : choose_kernel(s.rows, wish.kernel);
  Choice best{1, Split::kSerial, kernel, cell.dense ? kernel : Kernel::kNone};
  // Splits of several passes leave the choice within one free.
  const int wanted = wish.split > static_cast<int>(Split::kUnits) ? -1 : wish.split;
  if (machine.max_threads < 2 || wanted == static_cast<int>(Split::kSerial)) return best;
  double least = estimate(s, machine, best).total();
  // More threads must be worth it.
  constexpr double kWorth = 0.97;
  const int64_t panels = panels_of(cell, s.hidden_size);
  for (int64_t threads = 2;; threads = std::min<int64_t>(2 * threads, machine.max_threads)) {
    for (const Split split : {Split::kBatch, Split::kUnits}) {
      // Stages want whole rows, so that nothing has to meet between them.
      if (split == Split::kUnits && cell.stages) continue;
      const int64_t parts = split == Split::kBatch ? s.batch : panels;
      if (wanted >= 0) {
        if (static_cast<int>(split) == wanted && parts > 1)
          best = {static_cast<int>(std::min(threads, parts)), split, best.kernel_ih,
                  best.kernel_hh};
        continue;
      }
      if (threads > parts) continue;
      const Choice choice{static_cast<int>(threads), split, best.kernel_ih, best.kernel_hh};
      const double time = estimate(s, machine, choice).total();
      if (time >= least * (threads > best.threads ? kWorth : 1)) continue;
      best = choice;
      least = time;
    }
    if (threads >= machine.max_threads) break;
  }
  return best;
}

GroupChoice choose_group(const Group& group, const Machine& machine, const Wish& wish) {
  const Shape& last = group.passes[group.count - 1];
  const Split own = group.chained ? Split::kLayers : Split::kDirections;
  const bool forced = wish.split == static_cast<int>(own);
  // A split of single passes leaves none side by side.
  const bool refused = wish.split >= 0 && wish.split <= static_cast<int>(Split::kUnits);
  GroupChoice best{1, choose_engine(last, machine, wish)};
  if (machine.max_threads < 2 || group.count < 2 || refused) return best;
  if (group.chained && last.seq_len == 1 && !forced) return best;  // the others would only wait

  std::vector<double> one_by_one;
  for (int i = 0; i < group.count; ++i) {
    const Shape& pass = group.passes[i];
    one_by_one.push_back(estimate(pass, machine, choose_engine(pass, machine, wish)).total());
  }
  best.one_by_one = std::accumulate(one_by_one.begin(), one_by_one.end(), 0.0);
  double least = best.one_by_one;
  for (int teams = 2; teams <= std::min(group.count, machine.max_threads); ++teams) {
    const Machine part{machine.max_threads / teams, machine.private_cache};
    Choice each = choose_engine(last, part, wish);
    if (group.chained && !group.backward)
      each.chunk_rows =
          std::clamp(last.rows / kFollowingChunks, kLeastChunkRows, kForwardChunkRows);
    const int64_t chunk_rows = group.backward ? kBackwardChunkRows : each.chunk_rows;
    const double chunks =
        std::min(std::max(1.0, static_cast<double>(last.rows) / static_cast<double>(chunk_rows)),
                 static_cast<double>(last.seq_len));
    double time = 0;
    for (int begin = 0; begin < group.count; begin += teams) {
      const int end = std::min(group.count, begin + teams);
      if (end - begin == 1) {
        time += one_by_one[begin];
        continue;
      }
      double longest = 0;
      for (int i = begin; i < end; ++i)
        longest = std::max(longest, estimate(group.passes[i], part, each).total());
      // The last one starts a chunk later for each that it follows.
      time += longest * (group.chained ? 1 + (end - begin - 1) / chunks : 1);
      // All teams are woken as one.
      if (each.threads == 1) time += wake_time(machine.max_threads);
    }
    if (best.side_by_side == 0 || time < best.side_by_side) best.side_by_side = time;
    if (!forced && time >= least) continue;
    best.teams = teams;
    best.each = each;
    least = time;
  }
  return best;
}

}  // namespace rnnfast
