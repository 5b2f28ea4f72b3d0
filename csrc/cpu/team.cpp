#include "team.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace rnnfast {
namespace {

using Clock = std::chrono::steady_clock;

enum Decision : int { kUndecided, kTogether, kAlone };

// How long the first member waits for the others before it does the whole work alone.
constexpr auto kRendezvousLimit = std::chrono::milliseconds(10);
// Looks at what is waited for before the processor is offered to whoever else wants it: 20 to 200
// us, by how long the processor pauses. Fewer while that does not help: see wait_until.
constexpr int kSpins = 4000, kLeastSpins = 60;
// Then it is left for good and asked for again now and then: a thread that only yields starves
// those below its priority, and one that waits for a stopped member heats the room.
constexpr auto kYieldLimit = std::chrono::milliseconds(1);
constexpr auto kSleep = std::chrono::microseconds(50);
// After a call that lost more to waiting than its team can have saved, the calling thread works
// alone for so many times what it lost: a busy machine costs no more than that share.
constexpr int kPauseFactor = 10;
// Waking a thread that went to sleep takes up to so long on an idle machine, too.
constexpr auto kUsualWait = std::chrono::microseconds(1000);
// But never for long: one lost second must not make ten slow ones.
constexpr auto kLongestPause = std::chrono::milliseconds(50);

thread_local Clock::time_point alone_until{};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Returns how long it waited beyond spinning. Threads that share a processor only delay each other
// by spinning, so a wait that outlasts it halves the next one's.
template <class Ready>
Clock::duration wait_until(const Ready& ready) {
  thread_local int spins = kSpins;
  for (int spin = 0; spin < spins; ++spin) {
    if (ready()) {
      if (spins < kSpins) spins = spins * 2 < kSpins ? spins * 2 : kSpins;
      return {};
    }
    relax();
  }
  spins = spins / 2 > kLeastSpins ? spins / 2 : kLeastSpins;
  const auto start = Clock::now();
  auto now = start;
  while (!ready()) {
    if (now - start < kYieldLimit)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(kSleep);
    now = Clock::now();
  }
  return now - start;
}

// After fork the pool's threads are gone in the child, and waiting for them would never end.
std::atomic<bool> forked_child{false};
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked_child.store(true); });

}  // namespace

struct Team {
  int count;
  WorkFn work;
  void* context;
  std::atomic<int> ran{0};
  alignas(64) std::atomic<int> decision{kUndecided};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> waiting{0};
  alignas(64) std::atomic<unsigned> phase{0};
  // Of the first member: what it waited in vain, and when its own part was done.
  alignas(64) Clock::duration lost{};
  Clock::time_point finished{};
  // Where members do different work, each its own slot: how long it lasted is no waiting in vain.
  std::vector<Clock::time_point> ends{};
};

namespace {

void run_alone(Team& team) {
  team.ran.store(1, std::memory_order_relaxed);
  team.work(team.context, Worker{0, 1, &team});
}

void run_member(long begin, long end, void* context) {
  Team& team = *static_cast<Team*>(context);
  int expected = kUndecided;
  // A range of several members means that fewer threads came than were asked for.
  if (end - begin != 1) {
    if (begin == 0 && team.decision.compare_exchange_strong(expected, kAlone)) run_alone(team);
    return;
  }
  if (begin == 0) {
    team.arrived.fetch_add(1, std::memory_order_acq_rel);
    const auto deadline = Clock::now() + kRendezvousLimit;
    team.lost += wait_until([&] {
      return team.arrived.load(std::memory_order_acquire) == team.count || Clock::now() > deadline;
    });
    if (team.arrived.load(std::memory_order_acquire) != team.count) {
      team.decision.store(kAlone, std::memory_order_release);
      run_alone(team);
      team.finished = Clock::now();
      return;
    }
    team.ran.store(team.count, std::memory_order_relaxed);
    team.decision.store(kTogether, std::memory_order_release);
  } else {
    team.arrived.fetch_add(1, std::memory_order_acq_rel);
    // The first member decides within its deadline; it runs on the calling thread, so it does come.
    wait_until([&] { return team.decision.load(std::memory_order_acquire) != kUndecided; });
    if (team.decision.load(std::memory_order_acquire) == kAlone) return;
  }
  team.work(team.context, Worker{static_cast<int>(begin), team.count, &team});
  if (begin == 0) team.finished = Clock::now();
}

// Whether the next calls had better be spared a team: this one's members came late or lost the
// processor in the middle, as they do on a busy machine.
void judge(const Team& team, Clock::time_point start) {
  thread_local int judged = 0;  // the first team of a size waits for its threads to be made
  const bool first = team.count != judged;
  judged = team.count;
  if (first) return;
  const auto now = Clock::now();
  auto finished = team.finished;
  for (const auto end : team.ends) finished = std::max(finished, end);
  const auto lost = team.lost + (now - finished), worked = now - start - lost;
  const auto saved = team.ran.load() == 1 ? Clock::duration{} : worked * (team.count - 1);
  if (lost > std::max<Clock::duration>(saved, kUsualWait))
    alone_until = now + std::min<Clock::duration>(lost * kPauseFactor, kLongestPause);
}

}  // namespace

void barrier(const Worker& worker) {
  if (worker.count == 1) return;
  Team& team = *worker.team;
  const unsigned phase = team.phase.load(std::memory_order_acquire);
  if (team.waiting.fetch_add(1, std::memory_order_acq_rel) == worker.count - 1) {
    team.waiting.store(0, std::memory_order_relaxed);
    team.phase.store(phase + 1, std::memory_order_release);
  } else {
    const auto lost =
        wait_until([&] { return team.phase.load(std::memory_order_acquire) != phase; });
    if (worker.index == 0) team.lost += lost;
  }
}

namespace {

int run_as(Team& team, ParallelFor parallel_for) {
  if (team.count < 2 || parallel_for == nullptr || forked_child.load(std::memory_order_relaxed)) {
    run_alone(team);
    return 1;
  }
  const auto start = Clock::now();
  if (start < alone_until) {
    run_alone(team);
    return 1;
  }
  parallel_for(team.count, run_member, &team);
  if (team.ran.load() == 0) run_alone(team);
  if (team.finished != Clock::time_point{}) judge(team, start);
  return team.ran.load();
}

}  // namespace

int run_team(int count, ParallelFor parallel_for, WorkFn work, void* context) {
  Team team;
  team.count = count;
  team.work = work;
  team.context = context;
  return run_as(team, parallel_for);
}

namespace {

struct Teams {
  int each;
  WorkFn work;
  void* const* contexts;
  std::vector<Team> teams;
};

void work_of_teams(void* context, const Worker& worker) {
  auto& all = *static_cast<Teams*>(context);
  if (worker.count == 1) {
    for (size_t i = 0; i < all.teams.size(); ++i)
      all.work(all.contexts[i], Worker{0, 1, &all.teams[i]});
    return;
  }
  const int mine = worker.index / all.each;
  all.work(all.contexts[mine], Worker{worker.index % all.each, all.each, &all.teams[mine]});
  worker.team->ends[worker.index] = Clock::now();
  if (worker.index == 0) worker.team->lost += all.teams[0].lost;
}

}  // namespace

int run_teams(int teams, int each, ParallelFor parallel_for, WorkFn work, void* const* contexts) {
  Teams all{each, work, contexts, std::vector<Team>(teams)};
  Team team;
  team.count = teams * each;
  team.work = work_of_teams;
  team.context = &all;
  team.ends.resize(team.count);
  return run_as(team, parallel_for);
}

void note_done(StepsDone* own, const Worker& worker, int64_t steps) {
  if (own) own[worker.index].steps.store(steps, std::memory_order_release);
}

void wait_for(const StepsDone* leader, const Worker& worker, int64_t steps) {
  for (int i = 0; leader && i < worker.count; ++i)
    wait_until([&] { return leader[i].steps.load(std::memory_order_acquire) >= steps; });
}

}  // namespace rnnfast
