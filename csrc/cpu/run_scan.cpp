// A scan's way to its kernels: whether its steps are cut, its memory and its threads.
#include <algorithm>
#include <memory>

#include "kernel_of.h"
#include "processors.h"

namespace rnnfast {
namespace {

// Columns that are enough to be divided. One thread takes a vector of them as fast as memory gives
// it, and so does twice the work in chunks for nothing where others have their share of the
// columns.
constexpr int64_t kEnoughColumns = 32;
constexpr int64_t kChunks = 16;
// Of what a chunk reads, which should still be in the second cache when it is read again; all
// chunks of a block are one thread's if there is but one.
constexpr int64_t kChunkBytes = 48 << 10;
constexpr int64_t kLeastSteps = 64;  // of a chunk: fewer are not worth being joined
// What is worth another thread: a few times the cost of waking it.
constexpr int64_t kThreadBytes = 128 << 10;

ScanChunks cut(int64_t seq_len, int64_t columns, int64_t itemsize) {
  if (columns >= kEnoughColumns || seq_len < 4 * kChunks * kLeastSteps) return {1, seq_len};
  const int64_t fit = std::max(kLeastSteps, kChunkBytes / (2 * columns * itemsize));
  return {kChunks, std::min((seq_len + kChunks - 1) / kChunks, fit) * kChunks};
}

template <class Args>
using Kernel = void (*)(const Args&, const ScanChunks&, char*, const Worker&);

template <class Args>
struct Work {
  const Args& args;
  ScanChunks chunks;
  char* memory;
  Kernel<Args> kernel;

  static void run(void* context, const Worker& worker) {
    const Work& work = *static_cast<const Work*>(context);
    work.kernel(work.args, work.chunks, work.memory, worker);
  }
};

template <class Args>
void run(const Args& args, Kernel<Args> kernel,
         int64_t (*bytes)(int64_t, int64_t, const ScanChunks&, int), const Threads& threads) {
  constexpr int64_t kItemSize = sizeof(typename Args::scalar_t);
  const int64_t columns = args.rows * args.columns, all = args.seq_len * columns * kItemSize;
  const ScanChunks chunks = cut(args.seq_len, columns, kItemSize);
  const int64_t parts = chunks.count > 1 ? chunks.count : (columns + 15) / 16;
  int count = static_cast<int>(
      std::max<int64_t>(1, std::min({int64_t{threads.count}, parts, all / kThreadBytes})));
  if (count > 1) count = std::min(count, usable_processors());
  const auto memory =
      std::make_unique_for_overwrite<char[]>(bytes(args.rows, args.columns, chunks, count));
  Work<Args> work{args, chunks, memory.get(), kernel};
  run_team(count, threads.parallel_for, Work<Args>::run, &work);
}

}  // namespace

template <class scalar_t>
void run_scan(const ScanArgs<scalar_t>& args, const Threads& threads) {
  const ScanKernels<scalar_t>& kernels = scan_kernels(active_isa(), scalar_t{});
  run(args, kernels.forward, kernels.bytes, threads);
}

template <class scalar_t>
void run_scan(const ScanBackwardArgs<scalar_t>& args, const Threads& threads) {
  const ScanKernels<scalar_t>& kernels = scan_kernels(active_isa(), scalar_t{});
  run(args, kernels.backward, kernels.bytes, threads);
}

#define RNNFAST_INSTANTIATE(scalar_t)                                \
  template void run_scan(const ScanArgs<scalar_t>&, const Threads&); \
  template void run_scan(const ScanBackwardArgs<scalar_t>&, const Threads&);
RNNFAST_INSTANTIATE(float)
RNNFAST_INSTANTIATE(double)
RNNFAST_INSTANTIATE(BFloat16)
RNNFAST_INSTANTIATE(Float16)

}  // namespace rnnfast
