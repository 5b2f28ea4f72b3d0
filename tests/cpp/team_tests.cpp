// Teams of threads where they could hang or crawl: more threads than processors, late and stopped
// members, priorities, nesting, forks. Each check is a program run of its own, so that whoever runs
// it can bound its time:
//
//   team_tests CHECK    0: passed, 1: failed and said why; without CHECK the names
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "core/cell_info.h"
#include "cpu/dispatch.h"
#include "cpu/processors.h"

using namespace rnnfast;

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

bool good = true;

void check(bool holds, const std::string& what) {
  if (holds) return;
  good = false;
  std::printf("FAILED: %s\n", what.c_str());
}

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

double processor_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Threads that stay, as those of torch's pool do: making one takes longer than a short call.
class Pool {
 public:
  explicit Pool(int count) : count_(count) {
    for (int i = 1; i < count; ++i)
      threads_.emplace_back([this, i] {
        for (int64_t seen = 0;;) {
          while (turn_.load() == seen) std::this_thread::yield();
          seen = turn_.load();
          if (stop_.load()) return;
          run_(i, i + 1, context_);
          done_.fetch_add(1);
        }
      });
  }
  ~Pool() {
    stop_ = true;
    turn_.fetch_add(1);
    for (auto& thread : threads_) thread.join();
  }
  void parallel_for(void (*run)(long, long, void*), void* context) {
    run_ = run, context_ = context;
    done_ = 0;
    turn_.fetch_add(1);
    run(0, 1, context);
    while (done_.load() != count_ - 1) std::this_thread::yield();
  }

 private:
  const int count_;
  void (*run_)(long, long, void*) = nullptr;
  void* context_ = nullptr;
  std::atomic<int64_t> turn_{0};
  std::atomic<int> done_{0};
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

thread_local Pool* pool = nullptr;
void pooled(int, void (*run)(long, long, void*), void* context) {
  pool->parallel_for(run, context);
}

void thread_per_part(int count, void (*run)(long, long, void*), void* context) {
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back([=] { run(i, i + 1, context); });
  run(0, 1, context);
  for (auto& thread : threads) thread.join();
}

// A team that ran badly makes its thread work alone for a while; a new thread has no such memory.
int fresh_team(int count, ParallelFor parallel_for, WorkFn work, void* context) {
  int ran = 0;
  Pool* const mine = pool;
  std::thread([&] {
    pool = mine;
    ran = run_team(count, parallel_for, work, context);
  }).join();
  return ran;
}

bool pin(int processors) {
#ifdef __linux__
  cpu_set_t allowed, chosen;
  CPU_ZERO(&chosen);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return false;
  for (int cpu = 0, taken = 0; cpu < CPU_SETSIZE && taken < processors; ++cpu)
    if (CPU_ISSET(cpu, &allowed)) {
      CPU_SET(cpu, &chosen);
      ++taken;
    }
  return sched_setaffinity(0, sizeof(chosen), &chosen) == 0;
#else
  (void)processors;
  return false;
#endif
}

// --- a layer with as many workers as a test wants, past the cap of dispatch.cpp ---

struct Layer {
  static constexpr int64_t T = 50, B = 8, H = 256, kGates = 4;
  std::vector<float> x, w_ih, w_hh, y, h_n, c_n;
  ForwardArgs<float> args{};

  Layer()
      : x(T * B * H, 0.1F),
        w_ih(kGates * H * H, 0.01F),
        w_hh(kGates * H * H, 0.01F),
        y(T * B * H),
        h_n(B * H),
        c_n(B * H) {
    args.seq_len = T, args.batch = B, args.input_size = H;
    args.hidden_size = args.output_size = H, args.rows = T * B;
    args.x = {x.data(), B * H, H};
    args.w_ih = w_ih.data(), args.w_hh = w_hh.data();
    args.y = y.data(), args.h_n = h_n.data(), args.c_n = c_n.data();
  }

  int run(int count) {
    const auto& k = kernels(active_isa()).float32[0];
    const Choice choice{count, count > 1 ? Split::kUnits : Split::kSerial, Kernel::kPacked,
                        Kernel::kPacked};
    std::vector<char> memory(static_cast<size_t>(k.scratch(args, choice)) + 64);
    struct Call {
      Layer* layer;
      const Choice* choice;
      char* memory;
    } call{this, &choice,
           memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64};
    return fresh_team(
        count, pooled,
        [](void* context, const Worker& worker) {
          const Call& c = *static_cast<Call*>(context);
          kernels(active_isa()).float32[0].run(c.layer->args, *c.choice, c.memory, worker);
        },
        &call);
  }

  // The quickest of some, and whether all of them were a team.
  double best(int count) {
    Pool mine(count);
    pool = &mine;
    double least = 1e9;
    int together = 0;
    for (int i = 0; i < 9; ++i) {
      const auto start = Clock::now();
      together += run(count) == count;
      least = std::min(least, seconds(Clock::now() - start));
    }
    check(together > 0, std::to_string(count) + " workers must run at once at least once in 9");
    pool = nullptr;
    return least;
  }
};

void crowd(int processors, int workers, double limit) {
  if (!pin(processors)) std::printf("no pinning here: all processors are used\n");
  Layer layer;
  layer.best(1);
  const double alone = layer.best(1);
  const auto expected = layer.y;
  const double crowded = layer.best(workers), ratio = crowded / alone;
  std::printf("%d workers on %d processors: %.2f ms, one worker %.2f ms, %.2f times\n", workers,
              processors, 1e3 * crowded, 1e3 * alone, ratio);
  check(layer.y == expected, "the results must be the same bits");
#ifndef RNNFAST_UNTIMED
  check(ratio <= limit, "more workers than processors must cost at most " + std::to_string(limit) +
                            " times one worker, got " + std::to_string(ratio));
#else
  (void)limit;
#endif
}

// --- teams with work of their own ---

struct Rounds {
  std::vector<std::atomic<int>> at;
  int rounds;
  std::atomic<bool> ordered{true};
  std::function<void(int index, int round)> before;
  Rounds(int count, int n) : at(count), rounds(n) {}
};

void do_rounds(void* context, const Worker& worker) {
  auto& r = *static_cast<Rounds*>(context);
  for (int round = 0; round < r.rounds; ++round) {
    if (r.before) r.before(worker.index, round);
    r.at[worker.index].store(round, std::memory_order_relaxed);
    barrier(worker);
    for (int i = 0; i < worker.count; ++i)
      if (r.at[i].load(std::memory_order_relaxed) != round) r.ordered = false;
    barrier(worker);
  }
}

// A member that sleeps for long stands for one that was stopped or never gets a processor.
void late_member() {
  Rounds rounds(3, 6);
  rounds.before = [](int index, int round) {
    if (index == 1 && round % 2) std::this_thread::sleep_for(milliseconds(150));
  };
  const auto start = Clock::now();
  const double used_before = processor_seconds();
  check(run_team(3, thread_per_part, do_rounds, &rounds) == 3, "three members must run");
  const double took = seconds(Clock::now() - start), used = processor_seconds() - used_before;
  std::printf("%.0f ms with a late member, %.0f ms of processor\n", 1e3 * took, 1e3 * used);
  check(rounds.ordered.load(), "the barrier must wait for the late member");
#ifndef RNNFAST_UNTIMED
  check(used < took / 2, "two that wait for a stopped member must use less than half a processor");
#endif
}

// A member that comes to the meeting too late finds the work done.
void late_pool() {
  const auto late = [](int count, void (*run)(long, long, void*), void* context) {
    std::thread other([=] {
      std::this_thread::sleep_for(milliseconds(100));
      run(1, count, context);
    });
    run(0, 1, context);
    other.join();
  };
  Rounds rounds(2, 10);
  check(run_team(2, late, do_rounds, &rounds) == 1, "who waited in vain must do the work alone");
}

// Short work in a team whose members come late: the thread stops asking for a team, and asks again.
void pause() {
  static std::atomic<int> asked{0};
  static std::atomic<int> delay{20};
  const auto slow = [](int count, void (*run)(long, long, void*), void* context) {
    ++asked;
    std::thread other([=] {
      std::this_thread::sleep_for(milliseconds(delay.load()));
      run(1, count, context);
    });
    run(0, 1, context);
    other.join();
  };
  Rounds rounds(2, 1);
  const auto start = Clock::now();
  const int calls = 1000;
  for (int i = 0; i < calls; ++i) run_team(2, slow, do_rounds, &rounds);
  std::printf("%d short calls with late members: %.1f ms, %d of them asked for a team\n", calls,
              1e3 * seconds(Clock::now() - start), asked.load());
  check(asked.load() <= calls / 10, "at most one call in ten must wait for a team that comes late");
  // Members that come in time are used again.
  delay = 0;
  bool together = false;
  for (int i = 0; i < 100 && !together; ++i) {
    std::this_thread::sleep_for(milliseconds(50));
    rounds.before = [](int, int) { std::this_thread::sleep_for(milliseconds(2)); };
    together = run_team(2, slow, do_rounds, &rounds) == 2;
  }
  check(together, "a team must be tried again after a while");
}

// Members of different real-time priority on one processor: who only yields, starves the others.
void priorities() {
#ifdef __linux__
  if (!pin(1)) return;
  const auto by_priority = [](int count, void (*run)(long, long, void*), void* context) {
    std::vector<std::thread> threads;
    for (int i = 1; i < count; ++i)
      threads.emplace_back([=] {
        sched_param low{10 - i};
        pthread_setschedparam(pthread_self(), SCHED_FIFO, &low);
        run(i, i + 1, context);
      });
    run(0, 1, context);
    for (auto& thread : threads) thread.join();
  };
  sched_param high{20};
  if (pthread_setschedparam(pthread_self(), SCHED_FIFO, &high) != 0) {
    std::printf("no real-time priorities for this user: the members are of one\n");
  }
  Rounds rounds(3, 20);
  const auto start = Clock::now();
  const int ran = run_team(3, by_priority, do_rounds, &rounds);
  std::printf("%d members, %.1f ms\n", ran, 1e3 * seconds(Clock::now() - start));
  check(ran == 3 && rounds.ordered.load(), "members of lower priority must get to run");
#endif
}

// Teams of two, each reading what the one before wrote, a step behind: layers of a stack.
void followers() {
  constexpr int kTeams = 3, kEach = 2, kSteps = 400;
  struct Chain {
    std::vector<int>
        values[kTeams];  // of each step and worker; no atomics: the counters order them
    std::vector<StepsDone> done{static_cast<size_t>(kTeams * kEach)};
    std::atomic<bool> ordered{true};
  } chain;
  struct Mine {
    Chain* chain;
    int team;
  } mine[kTeams];
  void* contexts[kTeams];
  for (int i = 0; i < kTeams; ++i) {
    mine[i] = {&chain, i};
    contexts[i] = &mine[i];
  }
  const auto work = [](void* context, const Worker& worker) {
    const auto& [chain, team] = *static_cast<Mine*>(context);
    StepsDone* own = team + 1 < kTeams ? &chain->done[team * kEach] : nullptr;
    const StepsDone* leader = team > 0 ? &chain->done[(team - 1) * kEach] : nullptr;
    for (int step = 0; step < kSteps; ++step) {
      wait_for(leader, worker, step + 1);
      for (int i = 0; team > 0 && i < worker.count; ++i)
        if (chain->values[team - 1][step * kEach + i] != 1000 * (team - 1) + step)
          chain->ordered = false;
      if (team == 0 && worker.index == 1 && step == kSteps / 2)
        std::this_thread::sleep_for(milliseconds(20));
      chain->values[team][step * kEach + worker.index] = 1000 * team + step;
      if (step % 3 == 0) barrier(worker);
      note_done(own, worker, step + 1);
    }
  };
  for (const auto threads : {thread_per_part, +[](int count, void (*run)(long, long, void*),
                                                  void* context) { run(0, count, context); }}) {
    for (auto& values : chain.values) values.assign(kSteps * kEach, -1);
    for (auto& counter : chain.done) counter.steps = 0;
    const bool all = threads == thread_per_part;
    int ran = 0;
    std::thread([&] { ran = run_teams(kTeams, kEach, threads, work, contexts); }).join();
    check(ran == (all ? kTeams * kEach : 1), "all teams run at once, or one thread runs all");
    check(chain.ordered.load(), "a team must see what the one before it wrote");
  }
}

void many_masters() {
  pin(2);
  std::vector<std::thread> masters;
  std::atomic<bool> ordered{true};
  for (int m = 0; m < 6; ++m)
    masters.emplace_back([&] {
      Pool mine(3);
      pool = &mine;
      for (int i = 0; i < 20; ++i) {
        Rounds rounds(3, 5);
        run_team(3, pooled, do_rounds, &rounds);
        if (!rounds.ordered) ordered = false;
      }
    });
  for (auto& master : masters) master.join();
  check(ordered.load(), "every team must meet at its own barrier");
}

void nested() {
  struct Inner {
    std::atomic<int> teams{0}, ran{0};
  } inner;
  const auto outer = [](void* context, const Worker&) {
    auto& in = *static_cast<Inner*>(context);
    for (const ParallelFor parallel_for :
         {ParallelFor(thread_per_part),
          ParallelFor([](int count, void (*run)(long, long, void*), void* c) {
            run(0, count, c);  // a pool that is busy
          })}) {
      Rounds rounds(2, 5);
      in.ran += run_team(2, parallel_for, do_rounds, &rounds);
      in.teams += rounds.ordered.load();
    }
  };
  check(run_team(3, thread_per_part, outer, &inner) == 3, "the outer team must run");
  check(inner.teams == 6 && inner.ran >= 6, "each member must get its inner teams done");
}

void forked() {
  // A team is in the middle of its work when the process forks.
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) {
      Rounds rounds(2, 50);
      run_team(2, thread_per_part, do_rounds, &rounds);
    }
  });
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      Rounds rounds(2, 5);
      const auto nobody = [](int, void (*)(long, long, void*), void*) { _exit(7); };
      _exit(run_team(2, nobody, do_rounds, &rounds) == 1 ? 0 : 8);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child must not ask for a pool");
  }
  stop = true;
  busy.join();
  Rounds rounds(2, 5);
  check(fresh_team(2, thread_per_part, do_rounds, &rounds) == 2, "the parent must keep its teams");
}

// Runs until it is told to stop by a signal's end: the caller stops and continues the process.
void long_run() {
  Rounds rounds(2, 20000);
  rounds.before = [](int, int round) {
    if (round % 100 == 0) std::this_thread::sleep_for(milliseconds(2));
  };
  std::printf("running\n");
  std::fflush(stdout);
  check(run_team(2, thread_per_part, do_rounds, &rounds) == 2 && rounds.ordered.load(),
        "a stopped and continued team must end in order");
}

void quota() {
  namespace fs = std::filesystem;
  const fs::path root = fs::temp_directory_path() / ("rnnfast-" + std::to_string(getpid()));
  const auto write = [&](const std::string& path, const std::string& text) {
    fs::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text;
  };
  write("cpu.max", "max 100000\n");
  write("a/cpu.max", "250000 100000\n");
  write("a/b/cpu.max", "max 100000\n");
  write("a/c/cpu.max", "50000 100000\n");
  write("cpu,cpuacct/d/cpu.cfs_quota_us", "-1\n");
  write("cpu,cpuacct/d/cpu.cfs_period_us", "100000\n");
  write("cpu,cpuacct/e/cpu.cfs_quota_us", "400000\n");
  write("cpu,cpuacct/e/cpu.cfs_period_us", "100000\n");
  const auto expect = [&](const std::string& groups, int processors) {
    const int got = processors_by_quota(groups, root.string());
    check(got == processors, groups + " must leave " + std::to_string(processors) +
                                 " processors, got " + std::to_string(got));
  };
  expect("", 0);
  expect("nonsense\n", 0);
  expect("0::/\n", 0);
  expect("0::/a\n", 3);    // 2.5, rounded up
  expect("0::/a/b\n", 3);  // from above
  expect("0::/a/c\n", 1);
  expect("0::/elsewhere/on/the/host\n", 0);
  expect("4:cpu,cpuacct:/d\n0::/\n", 0);
  expect("4:cpu,cpuacct:/e\n0::/a\n", 3);
  expect("4:cpu,cpuacct:/e\n", 4);
  expect("3:cpuset:/e\n", 0);
  fs::remove_all(root);
  check(usable_processors() >= 1, "at least one processor must be usable");
  if (pin(1)) check(usable_processors() == 1, "a pinned process must use one processor");
}

struct Check {
  const char* name;
  void (*run)();
};
const Check kChecks[] = {
    {"four_on_two", [] { crowd(2, 4, 3); }},
    {"eight_on_two", [] { crowd(2, 8, 6); }},
    {"two_on_one", [] { crowd(1, 2, 6); }},
    {"late_member", late_member},
    {"late_pool", late_pool},
    {"pause", pause},
    {"priorities", priorities},
    {"followers", followers},
    {"many_masters", many_masters},
    {"nested", nested},
    {"forked", forked},
    {"long_run", long_run},
    {"quota", quota},
};

}  // namespace

int main(int argc, char** argv) {
  for (const Check& each : kChecks) {
    if (argc < 2) std::printf("%s\n", each.name);
    if (argc < 2 || std::string(argv[1]) != each.name) continue;
    each.run();
    return good ? 0 : 1;
  }
  return argc < 2 ? 0 : 2;
}
