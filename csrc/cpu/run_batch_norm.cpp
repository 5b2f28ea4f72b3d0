// The way of the LSTM with recurrent batch normalisation to its kernels: memory and threads.
#include <algorithm>
#include <memory>

#include "../core/batch_norm_args.h"
#include "kernel_of.h"
#include "processors.h"

namespace rnnfast {
namespace {

// Units that are worth a thread, and operations of a step that outweigh its barrier (choose_engine:
// a microsecond or two of one core's).
constexpr int64_t kThreadUnits = 16;
constexpr int64_t kThreadOperations = 300000;

template <class Args>
struct Work {
  const Args& args;
  char* memory;
  void (*kernel)(const Args&, char*, const Worker&);

  static void run(void* context, const Worker& worker) {
    const Work& work = *static_cast<const Work*>(context);
    work.kernel(work.args, work.memory, worker);
  }
};

template <class Args>
void run(const Args& args, int64_t (*bytes)(const Args&, int),
         void (*kernel)(const Args&, char*, const Worker&), const Threads& threads) {
  const int64_t H = args.hidden_size, operations = 8 * args.batch * H * (args.input_size + H + 64);
  int count = static_cast<int>(std::max<int64_t>(
      1, std::min({int64_t{threads.count}, H / kThreadUnits, operations / kThreadOperations})));
  if (count > 1) count = std::min(count, usable_processors());
  const auto memory = std::make_unique_for_overwrite<char[]>(bytes(args, count));
  Work<Args> work{args, memory.get(), kernel};
  run_team(count, threads.parallel_for, Work<Args>::run, &work);
}

}  // namespace

template <class scalar_t>
void run_batch_norm(const BatchNormArgs<scalar_t>& args, const Threads& threads) {
  const auto& kernels = batch_norm_kernels(active_isa(), scalar_t{});
  run(args, kernels.forward_bytes, kernels.forward, threads);
}

template <class scalar_t>
void run_batch_norm(const BatchNormBackwardArgs<scalar_t>& args, const Threads& threads) {
  const auto& kernels = batch_norm_kernels(active_isa(), scalar_t{});
  run(args, kernels.backward_bytes, kernels.backward, threads);
}

#define RNNFAST_INSTANTIATE(scalar_t)                                           \
  template void run_batch_norm(const BatchNormArgs<scalar_t>&, const Threads&); \
  template void run_batch_norm(const BatchNormBackwardArgs<scalar_t>&, const Threads&);
RNNFAST_INSTANTIATE(float)
RNNFAST_INSTANTIATE(double)

}  // namespace rnnfast
