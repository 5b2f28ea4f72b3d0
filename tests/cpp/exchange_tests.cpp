// The exchanges of csrc/cuda/exchange.h, whose kernels are not written yet: index maths, and every
// schedule on a model of the memory, in many orders. What each schedule needs is also left out
// once, and the model must find the fault: a check that cannot fail is worth nothing.
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "exchange_programs.h"
#include "layers.h"

using namespace rnnfast;
using namespace rnnfast::RNNFAST_TARGET;
using namespace exchange;

namespace {

int orders = 0;
bool talks = false;  // says what each fault was

void check_sound(const Programs& programs, const std::string& what, int seeds) {
  std::string fault;
  for (int seed = 0; seed < seeds && fault.empty(); ++seed, ++orders)
    fault = run_at_random(programs, Look::kOrder, seed);
  check(fault.empty(), what + ": " + fault);
}

// What a fault says first.
const std::string kUnwritten = "reads what is not written", kAnother = "reads another number",
                  kUnordered = "reads what is not ordered",
                  kOverRead = "overwrites what may still be read",
                  kOverUnordered = "overwrites what is not ordered",
                  kNoBarrier = "pushes before the mbarrier is initialised",
                  kLeft = "pushes into a block that has left", kDeadlock = "deadlock";

// The fault must show as such, and not only as something that is not ordered; and it is the one
// that was meant, not what else a spoilt program may do. Orders are the same in every run.
void check_found(const Programs& programs, const std::string& what, const std::string& in_order,
                 const std::string& in_values) {
  for (const Look look : {Look::kOrder, Look::kValues}) {
    std::string fault;
    int seed = 0;
    for (; seed < 2000 && fault.empty(); ++seed, ++orders)
      fault = run_at_random(programs, look, seed);
    const std::string how = look == Look::kOrder ? "order" : "values";
    const std::string& wanted = look == Look::kOrder ? in_order : in_values;
    check(fault.starts_with(wanted + ":"),
          what + ", in " + how + ": expected \"" + wanted + "\", found \"" + fault + "\"");
    if (talks) std::printf("%-66s %6s %3d  %s\n", what.c_str(), how.c_str(), seed, fault.c_str());
  }
}

constexpr BlockGroup kExample =
    BlockGroup::even(100, 8, 2);  // 13 octets: slices of 2, one short, one empty
static_assert(kExample.hidden == 104 && kExample.slice == 16 && kExample.bands() == 4);
static_assert(kExample.units(6).count == 8 && kExample.units(7).count == 0 && kExample.works(7));
static_assert(kExample.product_units(7).begin == 96 && kExample.product_units(7).count == 8);
static_assert(kExample.depth(0) == 56 && kExample.depth(1) == 48 && kExample.owners(7) == 1);
static_assert(parity_of(1) == 0 && parity_of(2) == 1 && parity_of(4) == 0);
static_assert(flag_value(0) == 1 && slice_mbarrier(3) == 1 && part_mbarrier(3) == 3);

void check_group(int hidden, int blocks, int parts) {
  const BlockGroup g = BlockGroup::even(hidden, blocks, parts);
  const std::string what = "group of H " + std::to_string(hidden) + ", " + std::to_string(blocks) +
                           " blocks, " + std::to_string(parts) + " parts";
  int units = 0, depth = 0, sums = 0;
  bool good = g.slice % kOctet == 0 && g.hidden % kOctet == 0 && g.hidden - hidden < kOctet;
  for (int rank = 0; rank < blocks; ++rank) {
    const Span own = g.units(rank), product = g.product_units(rank);
    good &= own.count == 0 || own.begin == units;
    good &= intersect(own, product).count == own.count && (own.count == 0 || g.works(rank));
    good &= g.rank(g.band_of(rank), g.part_of(rank)) == rank;
    units += own.count;
    if (!g.works(rank)) continue;
    good &= g.depth(g.part_of(rank)) > 0 && product.count > 0;
    if (g.band_of(rank) == 0) depth += g.depth(g.part_of(rank));
    if (g.part_of(rank) == 0) sums += product.count;
    std::vector<bool> reads(blocks), owns(blocks);
    for (int n = 0; n < g.bands_used(); ++n) reads[g.reader(rank, n)] = true;
    for (int n = 0; n < g.owners(rank); ++n) owns[g.owner(rank, n)] = true;
    for (int other = 0; other < blocks; ++other) {
      good &= reads[other] == (g.works(other) && g.part_of(other) == g.part_of(rank));
      good &= owns[other] == (g.units(other).count > 0 && g.band_of(other) == g.band_of(rank));
    }
  }
  check(good && units == g.hidden && depth == g.hidden && sums == g.hidden, what);
  // No two slices or parts of sums at one place, and none beyond the end.
  for (const bool pushed : {true, false}) {
    const Buffers b{g, kSliceUnit, kPartUnit, pushed, 2};
    std::vector<char> slices(b.slice_bytes()), parts_of(b.part_bytes());
    bool apart = true;
    const auto take = [&](std::vector<char>& bytes, int64_t at, int64_t size) {
      for (int64_t n = at; n < at + size; ++n) apart &= !bytes.at(n), bytes.at(n) = 1;
    };
    for (int i = 0; i < 2; ++i)
      for (int rank = 0; rank < blocks; ++rank) {
        if (!pushed || g.part_of(rank) == parts - 1)
          take(slices, b.slice_at(i, rank), b.slot_bytes());
        for (int part = 0; part < parts && parts > 1 && (!pushed || rank == 0); ++part)
          take(parts_of, b.part_at(i, rank, part), b.part_slot_bytes());
      }
    check(apart && b.slice_at(2, 0) == b.slice_at(0, 0), what + ": places");
  }
}

void check_numbers() {
  for (const int hidden : {1, 8, 24, 100, 128, 200, 512, 1000, 1024})
    for (const auto& [blocks, parts] : std::vector<std::pair<int, int>>{
             {1, 1}, {2, 1}, {2, 2}, {8, 1}, {8, 2}, {8, 4}, {16, 4}, {16, 2}, {32, 1}, {132, 4}})
      check_group(hidden, blocks, parts);
  bool good = true;
  for (int bits = 0; bits < 65536; ++bits) {
    const auto written = in_band(static_cast<uint16_t>(bits));
    good &= written != kSentinel<uint16_t> && (written == bits || bits == 0xFFFF);
  }
  check(good && in_band(0xFFFFFFFFu) == 0x7FFFFFFFu && in_band(1u) == 1u, "numbers in band");
  const std::vector<float> values = {1e8f, 1.f, -1e8f, 1.f};
  std::vector<int> order;
  const float sum =
      add_parts<float>(4, [&](int part) { return order.push_back(part), values[part]; });
  check(sum == ((1e8f + 1.f) + -1e8f) + 1.f && order == std::vector<int>{0, 1, 2, 3},
        "parts are added in order");
}

void check_sums() {
  const Case c{64, 8, 4};  // an octet a block, for its first warp
  for (const Programs& p : {cluster(c), grid(c, {})})
    for (size_t warp = 0; warp < p.of.size(); ++warp) {
      bool good = true;
      int part = 0;
      for (const Op& op : p.of[warp])
        if (op.what == Do::kRead && op.source >= c.hidden / kOctet)
          good &= op.source / (c.hidden / kOctet) == 1 + part++ % c.parts;
      const int adds = warp % c.warps == 0 ? c.iterations : 0;
      check(good && part == adds * c.parts, "blocks add all parts in order");
    }
}

// Some sizes divide evenly, some leave slices short, blocks without a slice, or without work.
void check_schedules() {
  const std::vector<std::pair<int, int>> tilings = {{1, 1}, {2, 1}, {8, 1}, {16, 1}, {1, 2},
                                                    {4, 2}, {2, 4}, {4, 4}, {8, 2}};
  for (const auto& [bands, parts] : tilings) {
    const int blocks = bands * parts, seeds = blocks < 16 ? 42 : 12;
    for (const auto& [hidden, slice] : std::vector<std::pair<int, int>>{{8 * blocks, 0},
                                                                        {16 * blocks, 0},
                                                                        {16 * blocks - 8, 0},
                                                                        {8 * blocks + 8, 0},
                                                                        {24, 0},
                                                                        {8, 0},
                                                                        {12 * blocks, 24},
                                                                        {20, 24}})
      for (const int warps : {1, 2, 3}) {
        const Case c{hidden, blocks, parts, warps, 5, slice};
        check_sound(cluster(c), "cluster " + c.name(), seeds);
        for (const bool staged : {false, true}) {
          check_sound(grid(c, {false, staged}), "flags " + c.name(), seeds / 3);
          check_sound(in_band_long(c, staged), "in band " + c.name(), seeds / 3);
        }
      }
  }
  for (const int blocks : {5, 32})
    for (const int hidden : {16 * blocks, 8 * blocks + 8})
      for (const bool staged : {false, true}) {
        const Case c{hidden, blocks};
        check_sound(grid(c, {false, staged}), "flags " + c.name(), 12);
        check_sound(in_band_long(c, staged), "in band " + c.name(), 12);
      }
}

void check_faults_of_clusters() {
  const Case c{64, 4};  // a slice is 16 units, 8 a warp
  const Programs p = cluster(c);
  const int slice = 16 * kSliceUnit;
  check_found(single(p, 0), "cluster, single buffers", kOverRead, kAnother);
  check_found(each(p,
                   [](Op& op) {
                     if (op.what == Do::kWait) op.value ^= 1;
                   }),
              "cluster, wrong parity", kUnwritten, kUnwritten);
  check_found(each(p,
                   [&](Op& op) {
                     if (op.what == Do::kArm) op.value -= slice;
                   }),
              "cluster, a slice less expected", kUnordered, kUnwritten);
  check_found(without(p, Do::kArm), "cluster, nobody arms", kDeadlock, kDeadlock);
  check_found(without(p, Do::kClusterBarrier), "cluster, no barrier before the first push",
              kNoBarrier, kNoBarrier);
  check_found(without(p,
                      [&](const Op& op) {
                        return op.iteration == c.iterations - 1 &&
                               (op.what == Do::kWait || op.what == Do::kRead);
                      }),
              "cluster, leaves before all has come", kLeft, kLeft);
  Programs early = p;
  for (size_t warp = 1; warp < early.of.size(); warp += c.warps)
    std::erase_if(early.of[warp],
                  [](const Op& op) { return op.what == Do::kWait || op.what == Do::kRead; });
  check_found(early, "cluster, a warp publishes before all has come", kAnother, kAnother);
  const Programs helped = first_publishes(p);
  check_found(helped, "cluster, a warp reads and publishes nothing", kOverRead, kAnother);
  const auto arms = [](const Op& op) { return op.what == Do::kArm; };
  Programs met = before_each(helped, arms, a_barrier);
  for (size_t warp = 1; warp < met.of.size(); warp += c.warps)
    met.of[warp] = before_each(met.of[warp], is(Do::kWait), a_barrier);
  check_sound(met, "cluster, a barrier stands between", 300);
  const Programs stored = own_is_stored(p, slice);
  check_found(stored, "cluster, the own slice past the mbarrier", kUnordered, kUnwritten);
  check_sound(before_each(stored, is(Do::kWait), a_barrier),
              "cluster, the own slice behind a barrier", 300);

  const Case tiled{128, 8, 2};
  const int units = tiled.hidden;
  const Programs t = cluster(tiled);
  check_found(single(t, 0), "cluster 4 x 2, single buffers of slices", kOverRead, kAnother);
  check_found(single(t, 1), "cluster 4 x 2, single buffers of parts", kOverRead, kAnother);
  check_found(each(t,
                   [&](Op& op) {
                     if (touches(op) && op.source >= 2 * units / kOctet)
                       op.first -= tiled.group().slice / kOctet;
                   }),
              "cluster 4 x 2, two parts in one place", kOverUnordered, kAnother);
  check_found(each(t,
                   [&](Op& op) {
                     if (op.what == Do::kArm && op.number >= 2) op.value -= 16 * kPartUnit;
                   }),
              "cluster 4 x 2, a part less expected", kUnwritten, kUnwritten);
  check_found(without(t, [](const Op& op) { return op.what == Do::kWait && op.number >= 2; }),
              "cluster 4 x 2, sums before all parts have come", kUnwritten, kUnwritten);
}

void check_faults_of_grids() {
  const Case c{64, 4}, tiled{128, 8, 2};
  for (const bool backward : {false, true}) {
    const Case& of = backward ? tiled : c;
    const std::string name = backward ? "flags 4 x 2, " : "flags, ";
    const Programs p = grid(of, {});
    check_found(single(p, 0), name + "single buffers of slices", kOverRead, kAnother);
    if (backward) check_found(single(p, 1), name + "single buffers of parts", kOverRead, kAnother);
    check_found(without(p, Do::kBlockBarrier), name + "no barrier before a flag", kUnwritten,
                kUnwritten);
    check_found(swapped(swapped(p, Do::kStore, Do::kBlockBarrier), Do::kStore, Do::kRelease),
                name + "the flag before the data", kUnwritten, kUnwritten);
    check_found(each(p,
                     [](Op& op) {
                       if (op.what == Do::kRelease) op.what = Do::kStoreFlag;
                     }),
                name + "flags without release", kUnwritten, kUnwritten);
    Programs stale = p;
    stale.stale_flag = of.iterations;
    check_found(stale, name + "flags of the launch before", kUnwritten, kUnwritten);
  }
  check_sound(flags_of_warps(grid(c, {})), "flags, one for each warp", 300);
  Programs ahead = grid(c, {});
  for (int warp = 0; warp < c.warps; ++warp)
    std::erase_if(ahead.of[warp], [&](const Op& op) {
      return (op.what == Do::kAcquire && op.number == 1) ||
             (op.what == Do::kRead && op.source == c.group().units(1).begin / kOctet);
    });
  check_found(ahead, "flags, a block publishes before all has come", kOverRead, kAnother);
  const Programs staged = grid(c, {false, true});
  for (const int which : {0, 1}) {  // before the flag; before the product
    Programs p = staged;
    for (auto& ops : p.of)
      std::erase_if(ops, [&, n = 0](const Op& op) mutable {
        return op.what == Do::kBlockBarrier && n++ % 2 == which;
      });
    check_found(p,
                which ? "flags, copies, no barrier before the product"
                      : "flags, copies, no barrier before the flag",
                kUnwritten, kUnwritten);
  }
  check_found(grid(c, {true, true, c.iterations, 1}), "in band, one copy in shared memory",
              kOverRead, kAnother);
  for (const int buffers : {2, 3, 4})
    check_found(in_band_again(c, buffers),
                "in band, " + std::to_string(buffers) + " places cleared", kOverRead, kAnother);
  const Programs in_band = in_band_long(c, false);
  check_found(grid(c, {true, false, 2, 1}), "in band, 2 places, not cleared", kOverRead, kAnother);
  Programs unfilled = in_band;
  for (Region& region : unfilled.regions) region.filled = kNever;
  check_found(unfilled, "in band, not filled before the launch", kUnwritten, kUnwritten);
  check_found(each(in_band,
                   [](Op& op) {
                     if (op.what == Do::kStore && op.iteration == 2 && op.source == 0)
                       op.iteration = kSentinelWritten;
                   }),
              "in band, a number equal to the sentinel", kDeadlock, kDeadlock);
}

void check_all_orders() {
  using Words = std::vector<std::string>;  // of one of these faults; none: it is sound
  const auto all = [](const Programs& p, const std::string& what, const Words& faults,
                      bool shorter = true) {
    const Explored explored = explore(p, shorter, 100000);
    if (talks)
      std::printf("all orders, %-40s %8zu states  %s\n", what.c_str(), explored.states,
                  explored.fault.c_str());
    bool good = faults.empty() && explored.fault.empty();
    for (const std::string& words : faults) good |= explored.fault.starts_with(words + ":");
    check(good, "all orders, " + what + ": " + explored.fault);
  };
  // hidden, blocks, parts, warps, iterations
  for (const Case& c : {Case{16, 2, 1, 1, 4}, Case{16, 2, 2, 1, 4}, Case{32, 2, 1, 2, 2}}) {
    all(cluster(c), "cluster " + c.name(), {}, false);
    all(grid(c, {}), "flags " + c.name(), {}, false);
    all(grid(c, {false, true}), "flags, copies " + c.name(), {}, false);
    all(in_band_long(c, false), "in band " + c.name(), {}, false);
  }
  for (const Case& c : {Case{32, 2, 1, 2, 4}, Case{32, 2, 2, 2, 3}, Case{24, 3, 1, 1, 4},
                        Case{32, 4, 2, 1, 3}, Case{24, 4, 2, 1, 3}}) {
    const int reused = c.blocks == c.parts ? 1 : 0;  // parts, where no slice travels
    all(cluster(c), "cluster " + c.name(), {});
    all(single(cluster(c), reused), "single buffers " + c.name(), {kAnother, kOverRead});
    all(grid(c, {}), "flags " + c.name(), {});
    all(grid(c, {false, true}), "flags, copies " + c.name(), {});
    all(in_band_long(c, false), "in band " + c.name(), {});
  }
}

}  // namespace

// With any argument it says what each fault was, and after how many orders it was found.
int main(int count, char**) {
  talks = count > 1;
  check_numbers();
  check_sums();
  check_schedules();
  check_faults_of_clusters();
  check_faults_of_grids();
  check_all_orders();
  if (talks) std::printf("%d orders at random\n", orders);
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
