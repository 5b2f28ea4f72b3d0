// The schedules of csrc/cuda/exchange.h as lists of operations for the model, and ways to spoil
// them.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/exchange.h"
#include "exchange_simulator.h"
#include "layers.h"

namespace exchange {
namespace {

using namespace rnnfast::RNNFAST_TARGET;
using rnnfast::check;

constexpr int kSliceUnit = 64, kPartUnit = 32;  // 8 rows: 4 gates of 16 bits, sums of 32

struct Case {
  int hidden, blocks, parts = 1, warps = 2, iterations = 5;
  int slice = 0;  // of a tile for more units; 0: the units evenly
  BlockGroup group() const {
    const BlockGroup even = BlockGroup::even(hidden, blocks, parts);
    return slice ? BlockGroup{even.hidden, blocks, parts, slice} : even;
  }
  std::string name() const {
    return "H " + std::to_string(hidden) + ", " + std::to_string(blocks / parts) + " x " +
           std::to_string(parts) + " blocks of " + std::to_string(warps) + " warps" +
           (slice ? ", slices of " + std::to_string(slice) : "");
  }
};

// What a grid's schedule reads through: the numbers of its buffers, of copies in shared memory too.
struct Grid {
  bool in_band = false, staged = false;
  int buffers = 2, copies = 1;
};

// Regions: slices, parts and copies in the shared memory of each block, then global ones.
class Recorder {
 public:
  Recorder(const Buffers& buffers, const Place& at, const Grid& grid)
      : b_(buffers),
        copies_{buffers.group, buffers.slice_unit, buffers.part_unit, true, grid.copies},
        at_(at),
        grid_(grid) {}
  std::vector<Op> ops;

  void init_mbarriers() { add({Do::kInitMbarriers}); }
  void cluster_barrier() { add({Do::kClusterBarrier}); }
  void block_barrier() { add({Do::kBlockBarrier}); }
  void arm(int mbarrier, int bytes) { add({.what = Do::kArm, .number = mbarrier, .value = bytes}); }
  void wait(int mbarrier, int parity) {
    add({.what = Do::kWait, .number = mbarrier, .value = parity});
  }
  void release(int flag, uint32_t value) {
    add({.what = Do::kRelease, .number = flag / kFlagWords, .value = static_cast<int>(value)});
  }
  void acquire(int flag, uint32_t value) {
    add({.what = Do::kAcquire, .number = flag / kFlagWords, .value = static_cast<int>(value)});
  }
  void enter(int i) { i_ = i; }
  void leave(int) {}

  void push_slice(int i, int to, Span units, int64_t where, int mbarrier) {
    Op op = slice(Do::kPush, i, to, at_.rank, units, where);
    op.block = to, op.number = mbarrier, op.value = units.count * kSliceUnit;
    add(op);
  }
  void store_slice(int i, Span units, int64_t where) {
    add(slice(Do::kStore, i, global(), at_.rank, units, where));
  }
  void push_part(int i, int owner, Span units, int64_t where, int mbarrier) {
    Op op = part(Do::kPush, i, blocks() + owner, owner, group().part_of(at_.rank), units, where);
    op.block = owner, op.number = mbarrier, op.value = units.count * kPartUnit;
    add(op);
  }
  void store_part(int i, int owner, Span units, int64_t where) {
    add(part(Do::kStore, i, global() + 1, owner, group().part_of(at_.rank), units, where));
  }
  void product(int i) {
    const Buffers& from = grid_.staged ? copies_ : b_;
    const int region = grid_.staged ? 2 * blocks() + at_.rank : at_.rank;
    for (int band = 0; band < group().bands_used(); ++band) {
      const int rank = group().rank(band, group().part_of(at_.rank));
      const Span units = group().units(rank);
      if (units.count > 0) add(slice(Do::kRead, i, region, rank, units, from.slice_at(i, rank)));
    }
  }
  void product_with(int i, int rank) {
    add(slice(loads(), i, global(), rank, group().units(rank), b_.slice_at(i, rank)));
  }
  void copy_slice(int i, int rank) {
    product_with(i, rank);
    add(slice(Do::kStore, i, 2 * blocks() + at_.rank, rank, group().units(rank),
              copies_.slice_at(i, rank)));
  }
  void sum(int i) {
    const int region = b_.pushed ? blocks() + at_.rank : global() + 1;
    add_parts<int>(group().parts_used(), [&](int k) {
      add(part(loads(), i, region, at_.rank, k, at_.cell_share(group()),
               b_.part_at(i, at_.rank, k)));
      return 0;
    });
  }

 private:
  const BlockGroup& group() const { return b_.group; }
  int blocks() const { return group().blocks; }
  int global() const { return 3 * blocks(); }
  Do loads() const { return grid_.in_band ? Do::kPoll : Do::kRead; }
  void add(Op op) {
    op.iteration = i_;
    ops.push_back(op);
  }
  Op slice(Do what, int i, int region, int rank, Span units, int64_t where) {
    return words(what, i, region, where / kSliceUnit + units.begin - group().units(rank).begin,
                 units, 0);
  }
  Op part(Do what, int i, int region, int owner, int part, Span units, int64_t where) {
    return words(what, i, region, where / kPartUnit + units.begin - group().units(owner).begin,
                 units, 1 + part);
  }
  // A word is an octet of units.
  Op words(Do what, int i, int region, int64_t first, Span units, int kind) {
    i_ = i;
    if (first % kOctet + units.begin % kOctet + units.count % kOctet != 0)
      check(false, "spans are whole octets");
    return {.what = what,
            .iteration = i,
            .region = region,
            .first = static_cast<int>(first) / kOctet,
            .count = units.count / kOctet,
            .source = (kind * group().hidden + units.begin) / kOctet};
  }

  Buffers b_, copies_;
  Place at_;
  Grid grid_;
  int i_ = 0;
};

Programs record(const Case& c, const Buffers& b, const Grid& grid,
                const std::function<void(Recorder&, const Place&)>& pass) {
  Programs p{.blocks = c.blocks,
             .warps = c.warps,
             .of = {},
             .regions = {},
             .flags = flag_words(b.group) / kFlagWords,
             .stale_flag = 0,
             .mbarriers = kMbarriers,
             .most_bytes = Buffers::kMostBytes};
  const int slices = static_cast<int>(b.slice_bytes() / kSliceUnit / kOctet);
  const int parts = static_cast<int>(b.part_bytes() / kPartUnit / kOctet);
  for (const int words : {b.pushed ? slices : 0, b.pushed ? parts : 0,
                          grid.staged ? grid.copies * b.group.bands() * b.group.slice / kOctet : 0})
    for (int block = 0; block < c.blocks; ++block) p.regions.push_back({words});
  const int filled = grid.in_band ? kSentinelWritten : kNever;
  for (const int words : {slices, parts}) p.regions.push_back({b.pushed ? 0 : words, true, filled});
  const int octets = c.parts * b.group.slice / kOctet;
  for (int rank = 0; rank < c.blocks; ++rank)
    for (int warp = 0; warp < c.warps; ++warp) {
      const Place at{rank, warp, c.warps, divide_up(octets, c.warps) * kOctet};
      Recorder recorder(b, at, grid);
      pass(recorder, at);
      p.of.push_back(std::move(recorder.ops));
    }
  return p;
}
Programs cluster(const Case& c) {
  const Buffers b{c.group(), kSliceUnit, kPartUnit, true, 2};
  return record(c, b, {},
                [&](Recorder& m, const Place& at) { cluster_pass(m, b, at, c.iterations); });
}
Programs grid(const Case& c, const Grid& how) {
  const Buffers b{c.group(), kSliceUnit, kPartUnit, false, how.buffers};
  return record(c, b, how, [&](Recorder& m, const Place& at) {
    const int n = c.iterations;
    if (how.in_band && how.staged) grid_pass<Signal::kInBand, true>(m, b, at, n);
    if (how.in_band && !how.staged) grid_pass<Signal::kInBand, false>(m, b, at, n);
    if (!how.in_band && how.staged) grid_pass<Signal::kFlags, true>(m, b, at, n);
    if (!how.in_band && !how.staged) grid_pass<Signal::kFlags, false>(m, b, at, n);
  });
}
Programs in_band_long(const Case& c, bool staged) {
  return grid(c, {true, staged, c.iterations, 2});
}

// --- ways to spoil a schedule ---

using Spoil = std::function<void(Op&)>;
Programs each(Programs p, const Spoil& spoil) {
  for (auto& ops : p.of)
    for (Op& op : ops) spoil(op);
  return p;
}
Programs without(Programs p, const std::function<bool(const Op&)>& leaves) {
  for (auto& ops : p.of) std::erase_if(ops, leaves);
  return p;
}
Programs without(Programs p, Do what) {
  return without(std::move(p), [what](const Op& op) { return op.what == what; });
}
// Of each warp, the operations of the kinds `late` come behind those of `early` that follow them.
Programs swapped(Programs p, Do late, Do early) {
  for (auto& ops : p.of)
    for (size_t n = 0; n + 1 < ops.size(); ++n)
      for (size_t m = n + 1; m > 0 && ops[m - 1].what == late && ops[m].what == early; --m)
        std::swap(ops[m - 1], ops[m]);
  return p;
}

// Puts an operation before each of those for which `here` holds.
std::vector<Op> before_each(const std::vector<Op>& ops, const std::function<bool(const Op&)>& here,
                            const std::function<Op(const Op&)>& make) {
  std::vector<Op> longer;
  for (const Op& op : ops) {
    if (here(op)) longer.push_back(make(op));
    longer.push_back(op);
  }
  return longer;
}
Programs before_each(Programs p, const std::function<bool(const Op&)>& here,
                     const std::function<Op(const Op&)>& make) {
  for (auto& ops : p.of) ops = before_each(ops, here, make);
  return p;
}
Op a_barrier(const Op&) { return {Do::kBlockBarrier}; }
auto is(Do what) {
  return [what](const Op& op) { return op.what == what; };
}
bool touches(const Op& op) {
  return op.what == Do::kPush || op.what == Do::kStore || op.what == Do::kRead ||
         op.what == Do::kPoll;
}
// Slices (which = 0), parts (1) or copies (2) in single buffers.
Programs single(Programs p, int which) {
  return each(p, [&p, which](Op& op) {
    const int kind = p.regions[op.region].global ? op.region - 3 * p.blocks : op.region / p.blocks;
    if (touches(op) && kind == which) op.first %= p.regions[op.region].words / 2;
  });
}
// Warps but the first read, and the first one publishes what is theirs.
Programs first_publishes(Programs p) {
  for (int block = 0; block < p.blocks; ++block) {
    auto& first = p.of[block * p.warps];
    for (int warp = 1; warp < p.warps; ++warp) {
      auto& ops = p.of[block * p.warps + warp];
      for (const Op& op : ops)
        if (op.what == Do::kPush)
          first.insert(std::find_if(first.begin(), first.end(),
                                    [&](const Op& other) {
                                      return other.what == Do::kPush &&
                                             other.iteration == op.iteration;
                                    }),
                       op);
      std::erase_if(ops, is(Do::kPush));
    }
  }
  return p;
}
// The own slice goes to shared memory by plain stores, past the mbarrier.
Programs own_is_stored(Programs p, int bytes) {
  for (int warp = 0; warp < static_cast<int>(p.of.size()); ++warp)
    for (Op& op : p.of[warp]) {
      if (op.what == Do::kArm) op.value -= bytes;
      if (op.what == Do::kPush && op.block == warp / p.warps) op.what = Do::kStore;
    }
  return p;
}
// In band in `buffers` places, which are cleared as soon as everyone has read them.
Programs in_band_again(const Case& c, int buffers) {
  Programs p = grid(c, {true, false, buffers, 1});
  const int words = p.regions[3 * c.blocks].words;
  for (auto& ops : p.of) {
    std::vector<Op> longer;
    for (Op& op : ops) {
      Op clear = op;
      clear.iteration = kSentinelWritten;
      if (buffers > 2) clear.first = (op.first + buffers / 2 * words / buffers) % words;
      if (op.what == Do::kStore && buffers == 2 && op.iteration >= 2) longer.push_back(clear);
      longer.push_back(op);
      if (op.what == Do::kStore && buffers > 2) longer.push_back(clear);
    }
    ops = std::move(longer);
  }
  return p;
}

// A flag for each warp instead of one for its block, and no barrier. Forward only.
Programs flags_of_warps(Programs p) {
  p.flags = static_cast<int>(p.of.size());
  for (int warp = 0; warp < p.flags; ++warp) {
    std::vector<Op> changed;
    for (const Op& op : p.of[warp]) {
      if (op.what == Do::kBlockBarrier || op.what == Do::kRelease) continue;
      Op flag = op;
      if (op.what == Do::kAcquire)
        for (int n = 0; n < p.warps; ++n) {
          flag.number = op.number * p.warps + n;
          changed.push_back(flag);
        }
      else
        changed.push_back(op);
      if (op.what == Do::kStore)
        changed.push_back({.what = Do::kRelease,
                           .iteration = op.iteration,
                           .number = warp,
                           .value = static_cast<int>(flag_value(op.iteration))});
    }
    p.of[warp] = std::move(changed);
  }
  return p;
}

}  // namespace
}  // namespace exchange
