// Barriers of the whole grid: that of cooperative groups, and one counter that all blocks add to.
#include <cooperative_groups.h>

#include "ops.cuh"

namespace exchanges {
namespace {

// Seldom enough not to be seen in the time.
constexpr int kCheckEvery = 64;

enum class Barrier { kCooperativeGroups, kCounter };

template <Barrier kBarrier>
__global__ void __launch_bounds__(kThreads) barriers(Run run, unsigned* slots, unsigned* counter) {
  Patience patience(run);
  unsigned wrong = 0;
  for (int step = 0; step < run.steps; ++step) {
    // Now and then each block leaves a word, which all read behind the barrier.
    const bool checked = step % kCheckEvery == 0;
    const unsigned word = payload(step, 0);
    if (checked && threadIdx.x == 0) slots[blockIdx.x] = word;

    if constexpr (kBarrier == Barrier::kCooperativeGroups) {
      cooperative_groups::this_grid().sync();
    } else {
      __syncthreads();
      if (threadIdx.x == 0) {
        add_release(counter, 1);
        const unsigned all = gridDim.x * static_cast<unsigned>(step + 1);
        patience.wait([&] { return load_acquire(counter) >= all; });
      }
      __syncthreads();
    }

    if (checked && threadIdx.x < gridDim.x) wrong += __ldcg(slots + threadIdx.x) != word;
  }
  report(run, wrong);
}

template <Barrier kBarrier>
Measured measure(const Gpu& gpu, int blocks) {
  need_blocks(gpu, blocks);
  auto* const kernel = &barriers<kBarrier>;
  allow_shared(gpu, reinterpret_cast<const void*>(kernel), kOneBlockAnSm);
  const Buffer<unsigned> slots(blocks), counter(1);
  const Launch how = {.blocks = blocks, .shared_bytes = kOneBlockAnSm, .cooperative = true};
  return repeat(
      gpu, gpu.options.steps, [&] { counter.fill(0); },
      [&] { launch(how, kernel, gpu.run(gpu.options.steps), slots.get(), counter.get()); });
}

}  // namespace

std::vector<Case> grid_cases(int sms) {
  std::vector<Case> cases;
  for (const int blocks : grid_sizes(sms)) {
    const Parameters parameters = {{"blocks", blocks}, {"threads", kThreads}};
    cases.push_back({"grid barrier, cooperative groups", parameters, [blocks](const Gpu& gpu) {
                       return measure<Barrier::kCooperativeGroups>(gpu, blocks);
                     }});
    cases.push_back({"grid barrier, one counter", parameters,
                     [blocks](const Gpu& gpu) { return measure<Barrier::kCounter>(gpu, blocks); }});
  }
  return cases;
}

}  // namespace exchanges
