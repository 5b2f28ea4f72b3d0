// A model of the memory that blocks of a group exchange through, and of warps that run on it in any
// order. A warp is a list of operations; what may happen next is chosen at random, or all of it is
// tried. Every word of a buffer (what a unit has there) carries who wrote it, and when.
//
// Shared memory: a push arrives at any later time, in any order. mbarriers are those of PTX: a
// phase is over when no arrival is pending and the count of bytes, which may be below zero before,
// is zero. Global memory: a store by another warp may be seen or not until barriers, mbarriers,
// flags order it before the load, each word for itself; a load for which two values are possible is
// a fault.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <unordered_set>
#include <vector>

namespace exchange {

enum class Do {
  kInitMbarriers,
  kClusterBarrier,
  kBlockBarrier,
  kArm,
  kPush,
  kWait,
  kStore,
  kRead,
  kPoll,
  kRelease,
  kStoreFlag,
  kAcquire
};

struct Op {
  Do what;
  int iteration = 0;
  int region = 0, first = 0, count = 0;  // words
  int source = 0;                        // of the first word: which number it is
  int block = 0;                         // whose mbarrier
  int number = 0;                        // mbarrier or flag
  int value = 0;                         // bytes, parity or the flag's value
};

constexpr int kNever = -1, kSentinelWritten = -2;  // iterations of words

struct Region {
  int words = 0;
  bool global = false;
  int filled = kNever;
};

struct Programs {
  int blocks = 0, warps = 0;        // warps of each block
  std::vector<std::vector<Op>> of;  // [block * warps + warp]
  std::vector<Region> regions;
  int flags = 0, stale_flag = 0;  // what flags hold when the launch begins
  int mbarriers = 0, most_bytes = 0;
};

// What is a fault: a wrong word, or also a right one that was right by luck.
enum class Look { kValues, kOrder };

using Clocks = std::vector<int>;  // of every warp: how much of it happened before

struct Message {
  int iteration, source;
  int warp, clock;  // -1: before the launch
};
struct Word {
  std::vector<Message> messages;  // in the order in which memory took them; shared: the last
  std::vector<int> read_at;       // clock of each warp's last read
  std::vector<int> seen;          // the message that each warp read last
};
struct FlagMessage {
  int value, warp, clock;
  Clocks carries;  // empty: a plain store
};
struct Mbarrier {
  bool ready = false;
  int phase = 0, pending = 1;
  int64_t bytes = 0;
  Clocks gathered, of_last;
};
struct Push {
  int warp, at;  // the operation
  Clocks carries;
};

class Model {
 public:
  Model(const Programs& programs, Look look) : p_(&programs), look_(look) {
    const int warps = static_cast<int>(programs.of.size());
    next_.assign(warps, 0);
    clocks_.assign(warps, Clocks(warps, 0));
    for (const Region& region : programs.regions)
      words_.emplace_back(region.words, Word{{{region.filled, 0, -1, 0}}, {}, {}});
    flags_.assign(programs.flags, {{programs.stale_flag, -1, 0, {}}});
    const Mbarrier fresh{false, 0, 1, 0, Clocks(warps, 0), Clocks(warps, 0)};
    mbarriers_.assign(programs.blocks * programs.mbarriers, fresh);
  }

  const std::string& fault() const { return fault_; }
  int warps() const { return static_cast<int>(next_.size()); }
  int pushes() const { return static_cast<int>(pushes_.size()); }
  int target(int push) const { return op_of(pushes_[push]).block; }
  const Op* next(int warp) const {
    const auto& ops = p_->of[warp];
    return next_[warp] < static_cast<int>(ops.size()) ? &ops[next_[warp]] : nullptr;
  }
  bool finished() const {
    for (int w = 0; w < warps(); ++w)
      if (next(w)) return false;
    return pushes_.empty();
  }

  bool can_run(int warp) const {
    const Op* op = next(warp);
    if (!op) return false;
    switch (op->what) {
      case Do::kBlockBarrier: return all_at(first_of(warp), p_->warps, op->what);
      case Do::kClusterBarrier: return all_at(0, warps(), op->what);
      case Do::kWait: return mbarrier(block_of(warp), op->number).phase % 2 != op->value;
      case Do::kAcquire: return flag_seen(warp, *op) >= 0;
      case Do::kPoll: return all_came(warp, *op);
      default: return true;
    }
  }

  void run(int warp) {
    const Op& op = *next(warp);
    if (op.what == Do::kBlockBarrier) return meet(first_of(warp), p_->warps);
    if (op.what == Do::kClusterBarrier) return meet(0, warps());
    ++clocks_[warp][warp];
    const Clocks& now = clocks_[warp];
    switch (op.what) {
      case Do::kInitMbarriers:
        for (int n = 0; n < p_->mbarriers; ++n) mbarrier(block_of(warp), n).ready = true;
        break;
      case Do::kArm: {
        Mbarrier& m = mbarrier(block_of(warp), op.number);
        if (!m.ready) fail("arms an mbarrier before it is initialised", warp, op);
        if (m.pending == 0) fail("arms a phase twice", warp, op);
        --m.pending;
        count(m, op.value, now, warp, op);
        break;
      }
      case Do::kPush: pushes_.push_back({warp, next_[warp], now}); break;
      case Do::kWait: join(clocks_[warp], mbarrier(block_of(warp), op.number).of_last); break;
      case Do::kStore: write(op, warp, now); break;
      case Do::kRead:
      case Do::kPoll:
        if (!inside(op)) fail("reads beyond a buffer", warp, op);
        for (int n = 0; n < op.count && inside(op); ++n) read(warp, op, n);
        break;
      case Do::kRelease:
      case Do::kStoreFlag:
        flags_[op.number].push_back(
            {op.value, warp, now[warp], op.what == Do::kRelease ? now : Clocks()});
        break;
      case Do::kAcquire: {
        const FlagMessage& message = flags_[op.number][flag_seen(warp, op)];
        if (!message.carries.empty()) join(clocks_[warp], message.carries);
        break;
      }
      default: break;
    }
    ++next_[warp];
  }

  // The bytes of a push arrive, and the mbarrier counts them.
  void deliver(int index) {
    const Push push = pushes_[index];
    pushes_.erase(pushes_.begin() + index);
    const Op& op = op_of(push);
    bool here = false;
    for (int w = 0; w < p_->warps; ++w) here |= next(op.block * p_->warps + w) != nullptr;
    if (!here) fail("pushes into a block that has left", push.warp, op);
    Mbarrier& m = mbarrier(op.block, op.number);
    if (!m.ready) fail("pushes before the mbarrier is initialised", push.warp, op);
    write(op, push.warp, push.carries);
    count(m, -op.value, push.carries, push.warp, op);
  }

  // Nothing is left over at the end: no phase half way, which the next use would take for its own.
  void finish() {
    for (const Mbarrier& m : mbarriers_)
      if (m.pending != 1 || m.bytes != 0) fault_ = "a phase is left half way";
  }
  void deadlock() {
    fault_ = "deadlock";
    for (int w = 0; w < warps(); ++w)
      if (next(w)) return fail("deadlock", w, *next(w));
  }

  // Equal for states from which the same can happen.
  uint64_t hash() const {
    uint64_t h = 14695981039346656037ull;
    const auto add = [&h](int64_t n) {
      h = (h ^ static_cast<uint64_t>(n)) * 1099511628211ull;
      h ^= h >> 29;
    };
    for (int n : next_) add(n);
    for (const Clocks& clocks : clocks_)
      for (int n : clocks) add(n);
    uint64_t in_flight = 0;  // in any order
    for (const Push& push : pushes_)
      in_flight += (push.warp * 4096 + push.at + 1) * 0x9E3779B97F4A7C15ull;
    add(static_cast<int64_t>(in_flight));
    for (const Mbarrier& m : mbarriers_) {
      add(m.phase * 4 + m.pending * 2 + m.ready), add(m.bytes);
      for (int n : m.gathered) add(n);
      for (int n : m.of_last) add(n);
    }
    for (const auto& region : words_)
      for (const Word& word : region) {
        for (const Message& m : word.messages) add(m.iteration * 4096 + m.source), add(m.clock);
        for (int n : word.read_at) add(n);
        for (int n : word.seen) add(n);
      }
    for (const auto& flag : flags_)
      for (const FlagMessage& message : flag) {
        add(message.value);
        for (int n : message.carries) add(n);
      }
    return h;
  }

 private:
  int block_of(int warp) const { return warp / p_->warps; }
  int first_of(int warp) const { return block_of(warp) * p_->warps; }
  const Op& op_of(const Push& push) const { return p_->of[push.warp][push.at]; }
  const Mbarrier& mbarrier(int block, int n) const { return mbarriers_[block * p_->mbarriers + n]; }
  Mbarrier& mbarrier(int block, int n) { return mbarriers_[block * p_->mbarriers + n]; }

  void fail(const std::string& what, int warp, const Op& op) {
    if (!fault_.empty() && fault_ != "deadlock") return;
    fault_ = what + ": warp " + std::to_string(warp % p_->warps) + " of block " +
             std::to_string(block_of(warp)) + ", iteration " + std::to_string(op.iteration);
  }
  static void join(Clocks& to, const Clocks& from) {
    for (size_t n = 0; n < to.size(); ++n) to[n] = std::max(to[n], from[n]);
  }
  static bool before(const Clocks& now, int warp, int clock) {
    return warp < 0 || now[warp] >= clock;
  }

  bool all_at(int first, int count, Do what) const {
    for (int w = first; w < first + count; ++w)
      if (!next(w) || next(w)->what != what) return false;
    return true;
  }
  void meet(int first, int count) {
    Clocks all(warps(), 0);
    for (int w = first; w < first + count; ++w) ++clocks_[w][w], join(all, clocks_[w]);
    for (int w = first; w < first + count; ++w) clocks_[w] = all, ++next_[w];
  }

  void count(Mbarrier& m, int64_t bytes, const Clocks& now, int warp, const Op& op) {
    m.bytes += bytes;
    if (m.bytes > p_->most_bytes || -m.bytes > p_->most_bytes)
      fail("counts more bytes than an mbarrier can", warp, op);
    join(m.gathered, now);
    if (m.pending > 0 || m.bytes != 0) return;
    ++m.phase;
    m.pending = 1;
    m.of_last = m.gathered;
    m.gathered.assign(warps(), 0);
  }

  // The oldest message that a load may return: nothing newer is known to the warp.
  int oldest(int warp, const Word& word) const {
    int at = word.seen.empty() ? 0 : word.seen[warp];
    for (int n = at + 1; n < static_cast<int>(word.messages.size()); ++n)
      if (before(clocks_[warp], word.messages[n].warp, word.messages[n].clock)) at = n;
    return at;
  }
  bool inside(const Op& op) const {
    return op.first >= 0 && op.first + op.count <= p_->regions[op.region].words;
  }
  bool all_came(int warp, const Op& op) const {
    if (!inside(op)) return true;  // a fault when it reads
    for (int n = 0; n < op.count; ++n) {
      const Word& word = words_[op.region][op.first + n];
      bool came = false;
      for (size_t m = oldest(warp, word); m < word.messages.size(); ++m)
        came |= word.messages[m].iteration != kSentinelWritten;
      if (!came) return false;
    }
    return true;
  }
  int flag_seen(int warp, const Op& op) const {
    const auto& messages = flags_[op.number];
    int at = 0;
    for (int n = 1; n < static_cast<int>(messages.size()); ++n)
      if (before(clocks_[warp], messages[n].warp, messages[n].clock)) at = n;
    for (; at < static_cast<int>(messages.size()); ++at)
      if (messages[at].value >= op.value) return at;
    return -1;
  }

  void write(const Op& op, int warp, const Clocks& now) {
    const bool global = p_->regions[op.region].global;
    if (!inside(op)) return fail("writes beyond a buffer", warp, op);
    for (int n = 0; n < op.count; ++n) {
      Word& word = words_[op.region][op.first + n];
      const Message& last = word.messages.back();
      if (look_ == Look::kOrder) {
        if (!before(now, last.warp, last.clock)) fail("overwrites what is not ordered", warp, op);
        for (size_t w = 0; w < word.read_at.size(); ++w)
          if (!before(now, static_cast<int>(w), word.read_at[w]))
            fail("overwrites what may still be read", warp, op);
      }
      if (!global) word.messages.clear();
      word.messages.push_back({op.iteration, op.source + n, warp, now[warp]});
    }
  }
  void read(int warp, const Op& op, int n) {
    Word& word = words_[op.region][op.first + n];
    const bool global = p_->regions[op.region].global, polls = op.what == Do::kPoll;
    const int last = static_cast<int>(word.messages.size()) - 1;
    const Message& newest = word.messages[last];
    int taken = last;
    for (int m = global ? oldest(warp, word) : last; m <= last; ++m) {
      const Message& message = word.messages[m];
      if (polls && message.iteration == kSentinelWritten) continue;
      taken = std::min(taken, m);
      if (message.iteration != op.iteration || message.source != op.source + n)
        fail(message.iteration < 0 ? "reads what is not written" : "reads another number", warp,
             op);
    }
    if (look_ == Look::kOrder && !polls && !before(clocks_[warp], newest.warp, newest.clock))
      fail("reads what is not ordered", warp, op);
    if (word.seen.empty()) word.seen.assign(warps(), 0), word.read_at.assign(warps(), 0);
    word.seen[warp] = taken;
    word.read_at[warp] = clocks_[warp][warp];
  }

  const Programs* p_;
  Look look_;
  std::string fault_;
  std::vector<int> next_;
  std::vector<Clocks> clocks_;
  std::vector<std::vector<Word>> words_;
  std::vector<std::vector<FlagMessage>> flags_;
  std::vector<Mbarrier> mbarriers_;
  std::vector<Push> pushes_;
};

// One order, drawn at random: anything next, or by priorities that seldom change, or with a warp
// and what is pushed to its block held back for as long as anything else can go on.
inline std::string run_at_random(const Programs& programs, Look look, unsigned seed) {
  Model model(programs, look);
  std::mt19937 random(seed);
  const auto below = [&random](int n) { return static_cast<int>(random() % n); };
  const int how = static_cast<int>(seed % 3), held = below(model.warps());
  std::vector<unsigned> priority(model.warps());
  for (unsigned& p : priority) p = random();
  std::vector<int> ready;
  while (model.fault().empty() && !model.finished()) {
    ready.clear();
    for (int w = 0; w < model.warps(); ++w)
      if (model.can_run(w)) ready.push_back(w);
    const int runs = static_cast<int>(ready.size()), pushes = model.pushes();
    if (runs + pushes == 0) {
      model.deadlock();
      break;
    }
    int choice = below(runs + pushes);
    if (how == 1) {
      if (below(40) == 0) priority[below(model.warps())] = random();
      if (choice < runs || (runs > 0 && below(2) == 0)) {
        choice = 0;
        for (int n = 1; n < runs; ++n)
          if (priority[ready[n]] > priority[ready[choice]]) choice = n;
      }
    } else if (how == 2) {
      const auto is_held = [&](int c) {
        return c < runs ? ready[c] == held
                        : seed % 2 == 0 && model.target(c - runs) == held / programs.warps;
      };
      for (int n = 0; n < runs + pushes && is_held(choice); ++n)
        choice = (choice + 1) % (runs + pushes);
    }
    if (choice < runs)
      model.run(ready[choice]);
    else
      model.deliver(choice - runs);
  }
  if (model.fault().empty()) model.finish();
  return model.fault();
}

// All orders; or, shorter, but for those that differ only in when a warp reads, stores and sends:
// these touch no barrier, and a race between them is found in either order (Look::kOrder).
struct Explored {
  std::string fault;
  size_t states = 0;
};
inline void run_the_free(Model& model) {
  for (int w = 0; w < model.warps(); ++w)
    for (const Op* op = model.next(w);
         op && model.fault().empty() &&
         (op->what == Do::kRead || op->what == Do::kStore || op->what == Do::kPush);
         op = model.next(w))
      model.run(w);
}
inline Explored explore(const Programs& programs, bool shorter, size_t most_states) {
  std::unordered_set<uint64_t> known;
  std::vector<Model> open;
  Explored result;
  const auto visit = [&](Model&& model) {
    if (shorter) run_the_free(model);
    if (known.insert(model.hash()).second || !model.fault().empty()) open.push_back(model);
  };
  visit(Model(programs, Look::kOrder));
  while (!open.empty() && result.fault.empty()) {
    Model model = std::move(open.back());
    open.pop_back();
    bool moved = false;
    if (model.fault().empty() && model.finished()) model.finish(), moved = true;
    for (int w = 0; w < model.warps() && model.fault().empty(); ++w) {
      if (!model.can_run(w)) continue;
      Model copy = model;
      copy.run(w);
      visit(std::move(copy));
      moved = true;
    }
    for (int n = 0; n < model.pushes() && model.fault().empty(); ++n) {
      Model copy = model;
      copy.deliver(n);
      visit(std::move(copy));
      moved = true;
    }
    if (!moved && model.fault().empty()) model.deadlock();
    result.fault = model.fault();
    if (known.size() > most_states) result.fault = "too many states";
  }
  result.states = known.size();
  return result;
}

}  // namespace exchange
