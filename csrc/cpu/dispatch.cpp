#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>

#include "../core/cell_info.h"

namespace rnnfast {

#define RNNFAST_DECLARE(target)      \
  namespace target {                 \
  const KernelTable& kernel_table(); \
  }
RNNFAST_DECLARE(portable)
#ifdef RNNFAST_HAS_AVX2
RNNFAST_DECLARE(avx2)
#endif
#ifdef RNNFAST_HAS_AVX512
RNNFAST_DECLARE(avx512)
#endif
#ifdef RNNFAST_HAS_NEON
RNNFAST_DECLARE(neon)
#endif

namespace {

std::atomic<int> forced_isa_value{-1}, forced_kernel_value{-1};
thread_local LastRun last_run_value{};

// Scratch of the calling thread, kept between calls: fresh memory costs a page fault every 4 KiB,
// which is more than many a kernel. What a large layer needed is given back.
class Scratch {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_.reset(static_cast<char*>(std::aligned_alloc(4096, rounded)));
      if (!memory_) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }
  void trim() {
    if (size_ > kKept) {
      memory_.reset();
      size_ = 0;
    }
  }

 private:
  static constexpr int64_t kKept = 128 << 20;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};
thread_local Scratch scratch;

template <class scalar_t>
const CellKernels<scalar_t>& cell_kernels(Isa isa, int cell);
template <>
const CellKernels<float>& cell_kernels<float>(Isa isa, int cell) {
  return kernels(isa).float32[cell];
}
template <>
const CellKernels<double>& cell_kernels<double>(Isa isa, int cell) {
  return kernels(isa).float64[cell];
}

template <class Args>
struct Call {
  const Args* args;
  Choice choice;
  char* memory;
  void (*run)(const Args&, const Choice&, char*, const Worker&);
};

template <class Args>
void run_call(const Args& args, Choice choice, const Threads& threads, Isa isa,
              int64_t (*bytes)(const Args&, const Choice&),
              void (*run)(const Args&, const Choice&, char*, const Worker&)) {
  Call<Args> call{&args, choice, scratch.reserve(bytes(args, choice)), run};
  const auto work = [](void* context, const Worker& worker) {
    const auto& c = *static_cast<Call<Args>*>(context);
    c.run(*c.args, c.choice, c.memory, worker);
  };
  const int ran = run_team(choice.threads, threads.parallel_for, work, &call);
  scratch.trim();
  const int64_t runs = last_run_value.runs + 1;
  last_run_value = {isa, ran, choice, runs};
}

template <class scalar_t>
Shape shape_of(int cell, const LayerArgs<scalar_t>& args) {
  return {cell,
          args.seq_len,
          args.batch,
          args.input_size,
          args.hidden_size,
          args.output_size,
          args.rows,
          static_cast<int>(sizeof(scalar_t))};
}

}  // namespace

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return true;
#ifdef RNNFAST_HAS_AVX2
    case Isa::kAvx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#ifdef RNNFAST_HAS_AVX512
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma");
#endif
#ifdef RNNFAST_HAS_NEON
    case Isa::kNeon: return true;
#endif
    default: return false;
  }
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512", "neon"};
  return names[static_cast<int>(isa)];
}

Isa active_isa() {
  static const Isa best = [] {
    for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kNeon})
      if (isa_available(isa)) return isa;
    return Isa::kPortable;
  }();
  const int forced = forced_isa_value.load(std::memory_order_relaxed);
  return forced < 0 ? best : static_cast<Isa>(forced);
}

int force_isa(int isa) { return forced_isa_value.exchange(isa); }
int forced_isa() { return forced_isa_value.load(std::memory_order_relaxed); }
int force_kernel(int kernel) { return forced_kernel_value.exchange(kernel); }
int forced_kernel() { return forced_kernel_value.load(std::memory_order_relaxed); }

const KernelTable& kernels(Isa isa) {
  switch (isa) {
#ifdef RNNFAST_HAS_AVX2
    case Isa::kAvx2: return avx2::kernel_table();
#endif
#ifdef RNNFAST_HAS_AVX512
    case Isa::kAvx512: return avx512::kernel_table();
#endif
#ifdef RNNFAST_HAS_NEON
    case Isa::kNeon: return neon::kernel_table();
#endif
    default: return portable::kernel_table();
  }
}

const LastRun& last_run() { return last_run_value; }

Choice choose_for(const Shape& shape, int threads) {
  const Choice choice = choose_engine(shape, threads, forced_kernel());
  if (choice.threads == 1) return choice;
  // Asked each time, since a process may be pinned later; a system call only where threads are
  // used.
  return choose_engine(shape, std::min(threads, usable_processors()), forced_kernel());
}

template <class scalar_t>
void run_forward(Isa isa, int cell, const ForwardArgs<scalar_t>& args, const Threads& threads) {
  Choice choice = choose_for(shape_of(cell, args), threads.count);
  if (args.packed) {
    choice.kernel_ih = Kernel::kPacked;
    if (choice.kernel_hh != Kernel::kNone) choice.kernel_hh = Kernel::kPacked;
  }
  const auto& k = cell_kernels<scalar_t>(isa, cell);
  run_call(args, choice, threads, isa, k.forward_scratch, k.forward);
}

template <class scalar_t>
void run_backward(Isa isa, int cell, const BackwardArgs<scalar_t>& args, const Threads& threads) {
  const auto& k = cell_kernels<scalar_t>(isa, cell);
  run_call(args, choose_for(shape_of(cell, args), threads.count), threads, isa, k.backward_scratch,
           k.backward);
}

namespace {

constexpr int64_t kHeader = 16;  // elements, so that panels stay aligned as the buffer is

template <class scalar_t>
void write_header(Isa isa, int cell, const LayerArgs<scalar_t>& args, scalar_t (&header)[kHeader]) {
  const int64_t numbers[] = {static_cast<int64_t>(isa), cell,
                             args.input_size,           args.hidden_size,
                             args.output_size,          args.w_hr != nullptr};
  for (scalar_t& number : header) number = 0;
  for (size_t i = 0; i < std::size(numbers); ++i) header[i] = static_cast<scalar_t>(numbers[i]);
}

}  // namespace

template <class scalar_t>
int64_t packed_size(Isa isa, int cell, const LayerArgs<scalar_t>& args) {
  return kHeader + cell_kernels<scalar_t>(isa, cell).packed_size(
                       args.input_size, args.hidden_size, args.output_size, args.w_hr != nullptr);
}

template <class scalar_t>
void pack_weights(Isa isa, int cell, const LayerArgs<scalar_t>& args, scalar_t* packed) {
  scalar_t header[kHeader];
  write_header(isa, cell, args, header);
  std::copy(std::begin(header), std::end(header), packed);
  cell_kernels<scalar_t>(isa, cell).pack(args, packed + kHeader);
}

template <class scalar_t>
const scalar_t* panels_of(Isa isa, int cell, const LayerArgs<scalar_t>& args,
                          const scalar_t* packed) {
  scalar_t header[kHeader];
  write_header(isa, cell, args, header);
  return std::equal(std::begin(header), std::end(header), packed) ? packed + kHeader : nullptr;
}

#define RNNFAST_INSTANTIATE(scalar_t)                                                  \
  template void run_forward(Isa, int, const ForwardArgs<scalar_t>&, const Threads&);   \
  template void run_backward(Isa, int, const BackwardArgs<scalar_t>&, const Threads&); \
  template int64_t packed_size(Isa, int, const LayerArgs<scalar_t>&);                  \
  template void pack_weights(Isa, int, const LayerArgs<scalar_t>&, scalar_t*);         \
  template const scalar_t* panels_of(Isa, int, const LayerArgs<scalar_t>&, const scalar_t*);
RNNFAST_INSTANTIATE(float)
RNNFAST_INSTANTIATE(double)

}  // namespace rnnfast
