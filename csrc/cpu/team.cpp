#include "team.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace rnnfast {
namespace {

enum Decision : int { kUndecided, kTogether, kAlone };

// How long the first member waits for the others before it does the whole work alone.
constexpr auto kRendezvousLimit = std::chrono::milliseconds(10);
// Some 20 to 50 us, then the processor is offered to whoever else wants it.
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

template <class Ready>
void wait_until(const Ready& ready) {
  for (int spin = 0; !ready(); ++spin) {
    if (spin < kSpins)
      relax();
    else
      std::this_thread::yield();
  }
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
    const auto deadline = std::chrono::steady_clock::now() + kRendezvousLimit;
    wait_until([&] {
      return team.arrived.load(std::memory_order_acquire) == team.count ||
             std::chrono::steady_clock::now() > deadline;
    });
    if (team.arrived.load(std::memory_order_acquire) != team.count) {
      team.decision.store(kAlone, std::memory_order_release);
      run_alone(team);
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
    wait_until([&] { return team.phase.load(std::memory_order_acquire) != phase; });
  }
}

int run_team(int count, ParallelFor parallel_for, WorkFn work, void* context) {
  Team team;
  team.count = count;
  team.work = work;
  team.context = context;
  if (count < 2 || parallel_for == nullptr || forked_child.load(std::memory_order_relaxed)) {
    run_alone(team);
  } else {
    parallel_for(count, run_member, &team);
    if (team.ran.load() == 0) run_alone(team);
  }
  return team.ran.load();
}

int usable_processors() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return count;
  }
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

}  // namespace rnnfast
