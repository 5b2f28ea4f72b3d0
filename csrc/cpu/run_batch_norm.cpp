// The way of the LSTM with recurrent batch normalisation to its kernels: memory and threads.
#include <algorithm>
#include <memory>

#include "../core/batch_norm_args.h"
#include "batch_norm_threads.h"
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
  const int count =
      batch_norm_threads(args.batch, args.input_size, args.hidden_size, threads.count);
  const auto memory = std::make_unique_for_overwrite<char[]>(bytes(args, count));
  Work<Args> work{args, memory.get(), kernel};
  const int ran = run_team(count, threads.parallel_for, Work<Args>::run, &work);
  note_plain_run(
      ran, {count, ran > 1 ? Split::kUnits : Split::kSerial, Kernel::kPacked, Kernel::kPacked});
}

}  // namespace

int batch_norm_threads(int64_t batch, int64_t input_size, int64_t hidden_size, int offered) {
  const int64_t operations = 8 * batch * hidden_size * (input_size + hidden_size + 64);
  const int count = static_cast<int>(std::max<int64_t>(
      1, std::min({int64_t{offered}, hidden_size / kThreadUnits, operations / kThreadOperations})));
  return count > 1 ? std::min(count, usable_processors()) : count;
}

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
