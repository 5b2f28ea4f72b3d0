// The exchanges of the on-chip engine as index maths and as the order of a warp's events. No kernel
// calls this yet: tests/cpp/exchange_tests.cpp runs it, warp by warp, on a model of the memory.
//
// A group of blocks runs 8 rows of the batch. Units come in slices, one for each block: of bands x
// parts blocks (forward has one part), (band, part) runs the cells of slice band * parts + part.
//   gather: a slice goes to all blocks of its part, which sum over the units of these slices (h, or
//           the gates' gradients);
//   reduce: block (band, part) has summed for all units of its band, over the slices of its part
//           only: it gives each block of the band its units, and that adds the parts in order.
//
// Buffers are double, and nobody acknowledges anything: who publishes iteration i + 2 has received
// all of i + 1, which its readers published behind their products of i. For this to hold
// (each line is a test that fails without it):
// - a warp that reads what was gathered publishes, itself, something of the same iteration or the
//   next behind it, or a barrier of its block stands between its product and that publishing;
// - the own block is a peer like the others: its slice and part go through the same mbarrier or
//   flag. A slice that is written past them needs a barrier of the block before it is read;
// - cluster: no other barrier inside the loop. One of the cluster before the first push, behind
//   the mbarriers' initialisation. None at the end: each warp that has work waits for all that is
//   pushed to its block;
// - grid, flags: one barrier of the block before each release of a flag, for every warp's stores
//   and loads; a second one where warps read through a copy in shared memory (kStaged);
// - grid, in band: none, or the one of kStaged, whose copy then needs two buffers (flags: one). The
//   buffer is as long as the launch: without order between addresses, a place that is used twice
//   can show its older number after the newer one's neighbours have come.
#pragma once

#include <cstdint>

#include "../core/target.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// What the rows of one product need at least; all spans are whole octets, padded with zeros.
constexpr int kOctet = 8;

constexpr RNNFAST_HD int divide_up(int n, int by) { return (n + by - 1) / by; }
constexpr RNNFAST_HD int least(int a, int b) { return a < b ? a : b; }

struct Span {
  int begin = 0, count = 0;
  constexpr RNNFAST_HD int end() const { return begin + count; }
};
constexpr RNNFAST_HD Span between(int begin, int end) {
  return begin < end ? Span{begin, end - begin} : Span{begin, 0};
}
constexpr RNNFAST_HD Span intersect(Span a, Span b) {
  return between(a.begin > b.begin ? a.begin : b.begin, least(a.end(), b.end()));
}
// The units of a warp when each has `each` of them.
constexpr RNNFAST_HD Span share(Span units, int warp, int each) {
  const int begin = least(units.begin + warp * each, units.end());
  return between(begin, least(begin + each, units.end()));
}

// Ranks in a group are the numbers of the slices. The last slices may be short or empty.
struct BlockGroup {
  int hidden;  // a multiple of 8
  int blocks, parts;
  int slice;  // units; a multiple of 8

  // Slices of one size but for the last. A kernel may take longer ones: those of its tile.
  static constexpr RNNFAST_HD BlockGroup even(int hidden, int blocks, int parts) {
    const int octets = divide_up(hidden, kOctet);
    return {octets * kOctet, blocks, parts, divide_up(octets, blocks) * kOctet};
  }

  constexpr RNNFAST_HD int bands() const { return blocks / parts; }
  constexpr RNNFAST_HD int rank(int band, int part) const { return band * parts + part; }
  constexpr RNNFAST_HD int band_of(int rank) const { return rank / parts; }
  constexpr RNNFAST_HD int part_of(int rank) const { return rank % parts; }

  constexpr RNNFAST_HD Span units(int rank) const {
    return between(least(rank * slice, hidden), least((rank + 1) * slice, hidden));
  }
  // The units for which a block sums: all of its band.
  constexpr RNNFAST_HD Span product_units(int rank) const {
    const int first = band_of(rank) * parts;
    return between(units(first).begin, units(first + parts - 1).end());
  }
  // Slices, bands and parts that have units, and the units of a part over which its blocks sum.
  constexpr RNNFAST_HD int slices_used() const { return divide_up(hidden, slice); }
  constexpr RNNFAST_HD int bands_used() const { return divide_up(slices_used(), parts); }
  constexpr RNNFAST_HD int parts_used() const { return least(parts, slices_used()); }
  constexpr RNNFAST_HD int depth(int part) const {
    int sum = 0;
    for (int band = 0; band < bands_used(); ++band) sum += units(rank(band, part)).count;
    return sum;
  }
  // A block without work leaves at once. One with an empty slice in a band that has units sums.
  constexpr RNNFAST_HD bool works(int rank) const {
    return band_of(rank) < bands_used() && part_of(rank) < parts_used();
  }

  // The n-th block that reads the slice of a rank, of bands_used(); each begins with itself, so
  // that not all push to the same one.
  constexpr RNNFAST_HD int reader(int from, int n) const {
    return rank((band_of(from) + n) % bands_used(), part_of(from));
  }
  // Blocks of the band that own units, and the n-th of them that a block's sums go to.
  constexpr RNNFAST_HD int owners(int of) const {
    return least(parts, slices_used() - band_of(of) * parts);
  }
  constexpr RNNFAST_HD int owner(int from, int n) const {
    return rank(band_of(from), (part_of(from) + n) % owners(from));
  }
};

// A warp of a block. In a product it has `units` of product_units().
struct Place {
  int rank, warp, warps, units;

  constexpr RNNFAST_HD Span product_share(const BlockGroup& group) const {
    return share(group.product_units(rank), warp, units);
  }
  // The same units as in the product where their sums are whole in its registers.
  constexpr RNNFAST_HD Span cell_share(const BlockGroup& group) const {
    const int each = divide_up(group.slice / kOctet, warps) * kOctet;
    return share(group.units(rank), warp, group.parts == 1 ? units : each);
  }
};

// Where slices and parts of sums lie: in the shared memory of each block that reads them (pushed),
// or once for a group, in global memory. Bytes from the start of either.
struct Buffers {
  BlockGroup group;
  int slice_unit, part_unit;  // bytes that a unit has in a slice and in a part: 8 rows of it
  bool pushed;
  int count;  // 2; in band the iterations of the launch

  constexpr RNNFAST_HD int64_t slot_bytes() const { return int64_t{1} * group.slice * slice_unit; }
  constexpr RNNFAST_HD int64_t part_slot_bytes() const {
    return int64_t{1} * group.slice * part_unit;
  }
  constexpr RNNFAST_HD int slots() const { return pushed ? group.bands() : group.blocks; }
  constexpr RNNFAST_HD int part_slots() const {
    return group.parts == 1 ? 0 : (pushed ? 1 : group.blocks) * group.parts;
  }
  constexpr RNNFAST_HD int64_t slice_bytes() const { return count * slots() * slot_bytes(); }
  constexpr RNNFAST_HD int64_t part_bytes() const {
    return count * part_slots() * part_slot_bytes();
  }

  constexpr RNNFAST_HD int64_t slice_at(int iteration, int rank) const {
    const int slot = pushed ? group.band_of(rank) : rank;
    return (int64_t{iteration % count} * slots() + slot) * slot_bytes();
  }
  // What part `part` of the owner's band has summed for the owner's units.
  constexpr RNNFAST_HD int64_t part_at(int iteration, int owner, int part) const {
    const int slot = (pushed ? 0 : owner * group.parts) + part;
    return (int64_t{iteration % count} * part_slots() + slot) * part_slot_bytes();
  }
  // What comes to a block in an iteration. An mbarrier counts no more than kMostBytes.
  constexpr RNNFAST_HD int expected_slices(int rank) const {
    return group.depth(group.part_of(rank)) * slice_unit;
  }
  constexpr RNNFAST_HD int expected_parts(int rank) const {
    return group.parts_used() * group.units(rank).count * part_unit;
  }
  static constexpr int kMostBytes = (1 << 20) - 1;
};

// mbarriers of a block, one pending arrival each: two for slices, then two for parts.
constexpr int kMbarriers = 4;
constexpr RNNFAST_HD int slice_mbarrier(int iteration) { return iteration % 2; }
constexpr RNNFAST_HD int part_mbarrier(int iteration) { return 2 + iteration % 2; }
constexpr RNNFAST_HD int parity_of(int iteration) { return iteration / 2 % 2; }

// Flags of a group, a cache line each: one a slice, then one for the sums of each block. All are
// zero when a launch begins.
constexpr int kFlagWords = 32;
constexpr RNNFAST_HD int slice_flag(int rank) { return rank * kFlagWords; }
constexpr RNNFAST_HD int part_flag(const BlockGroup& group, int rank) {
  return (group.blocks + rank) * kFlagWords;
}
constexpr RNNFAST_HD int flag_words(const BlockGroup& group) {
  return 2 * group.blocks * kFlagWords;
}
constexpr RNNFAST_HD uint32_t flag_value(int iteration) { return iteration + 1; }

// In band: a number's bits before it has come, a NaN that is never written; another NaN for it.
template <class bits_t>
constexpr bits_t kSentinel = static_cast<bits_t>(~bits_t{0});
template <class bits_t>
constexpr RNNFAST_HD bits_t in_band(bits_t bits) {
  return bits == kSentinel<bits_t> ? static_cast<bits_t>(kSentinel<bits_t> >> 1) : bits;
}

// The sum of a unit's parts, always in this order.
template <class acc_t, class Load>
RNNFAST_HD acc_t add_parts(int parts, const Load& load) {
  acc_t sum = load(0);
  for (int part = 1; part < parts; ++part) sum += load(part);
  return sum;
}

// --- a warp's way through a launch, forward and backward ---
//
// `Machine` is the warp in a kernel: all lanes call, and where one is meant it elects that. It
// knows the arithmetic: enter (what is published; the cell in backward), product, sum (of parts),
// leave (the cell in forward). In band, its loads of slices and parts poll.

template <class Machine>
RNNFAST_HD void push_slice(Machine& m, const Buffers& b, const Place& at, int i) {
  const int mbarrier = slice_mbarrier(i);
  const Span units = at.cell_share(b.group);
  // The first warp has waited for the phase before of this mbarrier. Bytes may be here already.
  if (at.warp == 0) m.arm(mbarrier, b.expected_slices(at.rank));
  for (int n = 0; units.count > 0 && n < b.group.bands_used(); ++n)
    m.push_slice(i, b.group.reader(at.rank, n), units, b.slice_at(i, at.rank), mbarrier);
}

// Calls give(owner, units, where) for the warp's sums.
template <class Give>
RNNFAST_HD void each_owner(const Buffers& b, const Place& at, int i, const Give& give) {
  const BlockGroup& group = b.group;
  for (int n = 0; n < group.owners(at.rank); ++n) {
    const int owner = group.owner(at.rank, n);
    const Span units = intersect(at.product_share(group), group.units(owner));
    if (units.count > 0) give(owner, units, b.part_at(i, owner, group.part_of(at.rank)));
  }
}

template <class Machine>
RNNFAST_HD void cluster_pass(Machine& m, const Buffers& b, const Place& at, int iterations) {
  if (at.warp == 0) m.init_mbarriers();
  m.cluster_barrier();
  const BlockGroup& group = b.group;
  if (!group.works(at.rank)) return;
  const bool has_cells = at.cell_share(group).count > 0;
  const bool has_product = at.product_share(group).count > 0;
  for (int i = 0; i < iterations; ++i) {
    if (has_cells) m.enter(i);
    push_slice(m, b, at, i);
    if (has_product) {
      m.wait(slice_mbarrier(i), parity_of(i));
      m.product(i);
    }
    if (group.parts > 1) {
      const int mbarrier = part_mbarrier(i);
      if (at.warp == 0 && has_cells) m.arm(mbarrier, b.expected_parts(at.rank));
      each_owner(b, at, i, [&](int owner, Span units, int64_t where) {
        m.push_part(i, owner, units, where, mbarrier);
      });
      if (has_cells) {
        m.wait(mbarrier, parity_of(i));
        m.sum(i);
      }
    }
    if (has_cells) m.leave(i);
  }
}

enum class Signal : int { kFlags, kInBand };

// The block's stores first, then the barrier, then one flag for all of them.
template <Signal kSignal, class Machine>
RNNFAST_HD void raise_flag(Machine& m, const Place& at, bool stored, int flag, int i) {
  if constexpr (kSignal == Signal::kFlags) {
    m.block_barrier();
    if (at.warp == 0 && stored) m.release(flag, flag_value(i));
  }
}
template <Signal kSignal, class Machine>
RNNFAST_HD void wait_for_flag(Machine& m, int flag, int i) {
  if constexpr (kSignal == Signal::kFlags) m.acquire(flag, flag_value(i));
}

// Every warp multiplies slice by slice, as they come; staged, each copies some into shared memory.
template <Signal kSignal, bool kStaged, class Machine>
RNNFAST_HD void gather(Machine& m, const Buffers& b, const Place& at, int i) {
  const BlockGroup& group = b.group;
  const bool has_product = at.product_share(group).count > 0;
  for (int n = 0; n < group.bands_used(); ++n) {
    const int from = group.reader(at.rank, n);
    if (group.units(from).count == 0) continue;
    if (!(kStaged ? n % at.warps == at.warp : has_product)) continue;
    wait_for_flag<kSignal>(m, slice_flag(from), i);
    if constexpr (kStaged)
      m.copy_slice(i, from);
    else
      m.product_with(i, from);
  }
  if constexpr (kStaged) {
    m.block_barrier();
    if (has_product) m.product(i);
  }
}

template <Signal kSignal, bool kStaged, class Machine>
RNNFAST_HD void grid_pass(Machine& m, const Buffers& b, const Place& at, int iterations) {
  const BlockGroup& group = b.group;
  if (!group.works(at.rank)) return;
  const Span units = at.cell_share(group);
  const bool has_slice = group.units(at.rank).count > 0;
  for (int i = 0; i < iterations; ++i) {
    if (units.count > 0) {
      m.enter(i);
      m.store_slice(i, units, b.slice_at(i, at.rank));
    }
    raise_flag<kSignal>(m, at, has_slice, slice_flag(at.rank), i);
    gather<kSignal, kStaged>(m, b, at, i);
    if (group.parts > 1) {
      each_owner(b, at, i,
                 [&](int owner, Span of, int64_t where) { m.store_part(i, owner, of, where); });
      raise_flag<kSignal>(m, at, true, part_flag(group, at.rank), i);
      if (units.count > 0) {
        for (int part = 0; part < group.parts_used(); ++part)
          wait_for_flag<kSignal>(m, part_flag(group, group.rank(group.band_of(at.rank), part)), i);
        m.sum(i);
      }
    }
    if (units.count > 0) m.leave(i);
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
