// Threads of one call: they come from torch's pool, start together or not at all, and meet at a
// barrier that cannot hang.
#pragma once

#include <atomic>
#include <cstdint>

namespace rnnfast {

struct Team;

// One member of the team, as a kernel sees it.
struct Worker {
  int index, count;
  Team* team;
};

// All members of the team have called it when it returns; writes before it are visible after it.
void barrier(const Worker& worker);

// Calls run(context, begin, end) for parts of [0, count),
// on several threads if it can: torch's parallel_for.
using ParallelFor = void (*)(int count, void (*run)(long begin, long end, void* context),
                             void* context);

using WorkFn = void (*)(void* context, const Worker& worker);

// Runs `work` once on each of `count` threads that are proved to run at the same time, or once on
// one thread alone (worker.count == 1) when that cannot be had: fewer threads than asked for, a
// nested call, a forked child, or a machine so busy that this thread's last team waited more than
// it worked. Returns the number of workers that ran.
int run_team(int count, ParallelFor parallel_for, WorkFn work, void* context);

// `teams` teams of `each` threads at the same time, each with a barrier of its own;
// work(contexts[i]) is the i-th's. One thread alone does one after the other. Returns the number of
// threads that ran.
int run_teams(int teams, int each, ParallelFor parallel_for, WorkFn work, void* const* contexts);

// The steps that one worker of a team has finished, for a team that follows its own. One a worker.
struct alignas(64) StepsDone {
  std::atomic<int64_t> steps{0};
};

// Writes before it are visible to who waited for them; null: nobody follows, or leads.
void note_done(StepsDone* own, const Worker& worker, int64_t steps);
// Until all workers of the leading team, as many as in this one, have done that many steps.
void wait_for(const StepsDone* leader, const Worker& worker, int64_t steps);

}  // namespace rnnfast
