#include "dispatch.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>

#include "../core/cell_info.h"
#include "dot.h"
#include "processors.h"

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

std::atomic<int> forced_isa_value{-1}, forced_kernel_value{-1}, forced_split_value{-1};
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

const ForwardKernels<float>& forward_kernels(Isa isa, int cell, WeightFormat format, float) {
  return format == WeightFormat::kInt8 ? kernels(isa).int8[cell].forward
                                       : kernels(isa).float32[cell];
}
const ForwardKernels<double>& forward_kernels(Isa isa, int cell, WeightFormat, double) {
  return kernels(isa).float64[cell];
}
const ForwardKernels<BFloat16>& forward_kernels(Isa isa, int cell, WeightFormat format, BFloat16) {
  return (format == WeightFormat::kDot ? kernels(isa).dot_bfloat16 : kernels(isa).bfloat16)[cell];
}
const ForwardKernels<Float16>& forward_kernels(Isa isa, int cell, WeightFormat, Float16) {
  return kernels(isa).float16[cell];
}

const BackwardKernels<float>& backward_kernels(Isa isa, int cell, float) {
  return kernels(isa).backward32[cell];
}
const BackwardKernels<double>& backward_kernels(Isa isa, int cell, double) {
  return kernels(isa).backward64[cell];
}

int64_t private_cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
}

// The layout in which weights of a type are packed.
template <class scalar_t>
WeightFormat packed_format(Isa isa) {
  const bool dot = std::is_same_v<scalar_t, BFloat16> && dot_kernels(isa, 1).bfloat16 != nullptr;
  return dot ? WeightFormat::kDot : WeightFormat::kPlain;
}

// What last_run tells: AVX512_BF16 and AMX ran only where their products did; all else of them is
// AVX-512.
Isa ran_on(Isa isa, WeightFormat format) {
  const bool extended = isa == Isa::kAvx512Bf16 || isa == Isa::kAmx;
  return extended && format == WeightFormat::kPlain ? Isa::kAvx512 : isa;
}

// A pass that is ready to run: where its scratch is measured, and what runs it.
template <class Args>
struct Planned {
  const Args* args;
  Choice choice;
  int64_t (*bytes)(const Args&, const Choice&);
  void (*run)(const Args&, const Choice&, char*, const Worker&);
  Isa ran;  // for last_run
  char* memory = nullptr;

  int64_t scratch_bytes() const { return (bytes(*args, choice) + 4095) / 4096 * 4096; }
  static void work(void* context, const Worker& worker) {
    const auto& planned = *static_cast<Planned*>(context);
    planned.run(*planned.args, planned.choice, planned.memory, worker);
  }
};

void note_run(Isa isa, int threads, const Choice& choice) {
  const int64_t runs = last_run_value.runs + 1;
  last_run_value = {isa, threads, choice, runs};
}

template <class Args>
void run_planned(Planned<Args> planned, const Threads& threads) {
  planned.memory = scratch.reserve(planned.scratch_bytes());
  const int ran =
      run_team(planned.choice.threads, threads.parallel_for, Planned<Args>::work, &planned);
  scratch.trim();
  note_run(planned.ran, ran, planned.choice);
}

// Both at once, each with the threads of its choice.
template <class Args>
void run_side_by_side(Planned<Args> (&planned)[2], const Threads& threads) {
  char* memory = scratch.reserve(planned[0].scratch_bytes() + planned[1].scratch_bytes());
  planned[0].memory = memory;
  planned[1].memory = memory + planned[0].scratch_bytes();
  void* contexts[] = {&planned[0], &planned[1]};
  const int ran =
      run_two_teams(planned[0].choice.threads, threads.parallel_for, Planned<Args>::work, contexts);
  scratch.trim();
  Choice choice = planned[0].choice;
  if (ran > 1) choice.split = Split::kDirections;
  note_run(planned[0].ran, ran, choice);
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
          static_cast<int>(sizeof(scalar_t)),
          false};
}

template <class scalar_t>
Shape shape_of(int cell, const ForwardArgs<scalar_t>& args) {
  Shape shape = shape_of(cell, static_cast<const LayerArgs<scalar_t>&>(args));
  shape.packed = args.packed != nullptr;
  return shape;
}

}  // namespace

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return true;
#ifdef RNNFAST_HAS_AVX2
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
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
#ifdef RNNFAST_HAS_AVX512
    case Isa::kAvx512Bf16:
    case Isa::kAmx: return isa_available(Isa::kAvx512) && dot_isa_available(isa);
#endif
    default: return false;
  }
}

const char* isa_name(Isa isa) {
  static const char* const names[] = {"portable", "avx2", "avx512", "neon", "avx512_bf16", "amx"};
  return names[static_cast<int>(isa)];
}

Isa active_isa() {
  static const Isa best = [] {
    for (Isa isa : {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kNeon})
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
int force_split(int split) { return forced_split_value.exchange(split); }
int forced_split() { return forced_split_value.load(std::memory_order_relaxed); }

const KernelTable& kernels(Isa isa) {
  switch (isa) {
#ifdef RNNFAST_HAS_AVX2
    case Isa::kAvx2: return avx2::kernel_table();
#endif
#ifdef RNNFAST_HAS_AVX512
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx: return avx512::kernel_table();
#endif
#ifdef RNNFAST_HAS_NEON
    case Isa::kNeon: return neon::kernel_table();
#endif
    default: return portable::kernel_table();
  }
}

const LastRun& last_run() { return last_run_value; }

Machine machine_with(int threads) {
  static const int64_t private_cache = private_cache_bytes();
  return {threads, private_cache};
}

Choice choose_for(const Shape& shape, int threads) {
  const Wish wish{forced_kernel(), forced_split()};
  const Choice choice = choose_engine(shape, machine_with(threads), wish);
  if (choice.threads == 1) return choice;
  // A system call only where threads are used.
  const int usable = usable_processors();
  return threads <= usable ? choice : choose_engine(shape, machine_with(usable), wish);
}

bool directions_at_once(const Shape& shape, int threads) {
  if (threads < 2 || forced_split() >= 0) return false;
  const Machine whole = machine_with(threads), half = machine_with(threads / 2);
  const Wish wish{forced_kernel(), -1};
  const double one_by_one = estimate(shape, whole, choose_engine(shape, whole, wish)).total();
  // Two teams are woken as one.
  const Choice alone = choose_engine(shape, half, wish);
  double at_once = estimate(shape, half, alone).total();
  if (alone.threads == 1) at_once += wake_time(threads);
  return at_once < 2 * one_by_one;
}

namespace {

template <class scalar_t>
Planned<ForwardArgs<scalar_t>> plan_forward(Isa isa, int cell, ForwardArgs<scalar_t>& args,
                                            WeightFormat format, Choice choice) {
  if (args.packed) {
    choice.kernel_ih = Kernel::kPacked;
    if (choice.kernel_hh != Kernel::kNone) choice.kernel_hh = Kernel::kPacked;
  } else {
    // No direct kernel reads groups.
    const bool all = choice.kernel_ih == Kernel::kPacked && choice.kernel_hh != Kernel::kDirect;
    format = all ? packed_format<scalar_t>(isa) : WeightFormat::kPlain;
  }
  const auto dot_for = [&](int64_t rows) {
    const DotKernels dot = dot_kernels(isa, rows);
    if (format != WeightFormat::kInt8) return dot.bfloat16;
    return dot.int8 ? dot.int8 : kernels(isa).int8_product;
  };
  args.dot_ih = dot_for(args.rows);
  args.dot_hh = dot_for(args.batch);
  const auto& k = forward_kernels(isa, cell, format, scalar_t{});
  return {&args, choice, k.scratch, k.run, ran_on(isa, format)};
}

template <class scalar_t>
Planned<BackwardArgs<scalar_t>> plan_backward(Isa isa, int cell, const BackwardArgs<scalar_t>& args,
                                              const Choice& choice) {
  const auto& k = backward_kernels(isa, cell, scalar_t{});
  return {&args, choice, k.scratch, k.run, ran_on(isa, WeightFormat::kPlain)};
}

bool at_once(const Shape& shape, const Threads& threads, int& each) {
  const int usable = std::min(threads.count, usable_processors());
  each = usable / 2;
  return directions_at_once(shape, usable);
}

}  // namespace

template <class scalar_t>
void run_forward(Isa isa, int cell, ForwardArgs<scalar_t>& args, WeightFormat format,
                 const Threads& threads) {
  run_planned(
      plan_forward(isa, cell, args, format, choose_for(shape_of(cell, args), threads.count)),
      threads);
}

template <class scalar_t>
void run_backward(Isa isa, int cell, const BackwardArgs<scalar_t>& args, const Threads& threads) {
  run_planned(plan_backward(isa, cell, args, choose_for(shape_of(cell, args), threads.count)),
              threads);
}

template <class scalar_t>
void run_forward_both(Isa isa, int cell, ForwardArgs<scalar_t> (&args)[2],
                      const WeightFormat (&formats)[2], const Threads& threads) {
  int each = 0;
  if (!at_once(shape_of(cell, args[0]), threads, each)) {
    for (int i = 0; i < 2; ++i) run_forward(isa, cell, args[i], formats[i], threads);
    return;
  }
  // One choice for both: their teams are of one size.
  const Choice choice = choose_for(shape_of(cell, args[0]), each);
  Planned<ForwardArgs<scalar_t>> planned[] = {plan_forward(isa, cell, args[0], formats[0], choice),
                                              plan_forward(isa, cell, args[1], formats[1], choice)};
  run_side_by_side(planned, threads);
}

template <class scalar_t>
void run_backward_both(Isa isa, int cell, const BackwardArgs<scalar_t> (&args)[2],
                       const Threads& threads) {
  int each = 0;
  if (!at_once(shape_of(cell, args[0]), threads, each)) {
    for (const auto& direction : args) run_backward(isa, cell, direction, threads);
    return;
  }
  const Choice choice = choose_for(shape_of(cell, args[0]), each);
  Planned<BackwardArgs<scalar_t>> planned[] = {plan_backward(isa, cell, args[0], choice),
                                               plan_backward(isa, cell, args[1], choice)};
  run_side_by_side(planned, threads);
}

namespace {

// 64 bytes, so that panels stay aligned as the buffer is.
struct Header {
  int32_t isa, cell, type, format;
  int64_t input_size, hidden_size, output_size, projection;
  int64_t reserved[2];
};
static_assert(sizeof(Header) == 64);

template <class scalar_t>
constexpr int32_t type_number() {
  if (std::is_same_v<scalar_t, float>) return 0;
  if (std::is_same_v<scalar_t, double>) return 1;
  return std::is_same_v<scalar_t, BFloat16> ? 2 : 3;
}

template <class scalar_t>
Header header_of(Isa isa, int cell, const LayerArgs<scalar_t>& args, WeightFormat format) {
  return {static_cast<int32_t>(isa),
          cell,
          type_number<scalar_t>(),
          static_cast<int32_t>(format),
          args.input_size,
          args.hidden_size,
          args.output_size,
          args.w_hr != nullptr,
          {}};
}

template <class scalar_t>
int64_t bytes_of(Isa isa, int cell, const LayerArgs<scalar_t>& args, WeightFormat format) {
  return sizeof(Header) + forward_kernels(isa, cell, format, scalar_t{})
                              .packed_bytes(args.input_size, args.hidden_size, args.output_size,
                                            args.w_hr != nullptr);
}

}  // namespace

template <class scalar_t>
int64_t packed_bytes(Isa isa, int cell, const LayerArgs<scalar_t>& args) {
  return bytes_of(isa, cell, args, packed_format<scalar_t>(isa));
}

template <class scalar_t>
void pack_weights(Isa isa, int cell, const LayerArgs<scalar_t>& args, char* packed) {
  const WeightFormat format = packed_format<scalar_t>(isa);
  const Header header = header_of(isa, cell, args, format);
  std::memcpy(packed, &header, sizeof(header));
  forward_kernels(isa, cell, format, scalar_t{}).pack(args, packed + sizeof(header));
}

int64_t packed_bytes_int8(Isa isa, int cell, const LayerArgs<float>& args) {
  return bytes_of(isa, cell, args, WeightFormat::kInt8);
}

void pack_weights_int8(Isa isa, int cell, const LayerArgs<float>& args, const Int8Weights& weights,
                       char* packed) {
  const Header header = header_of(isa, cell, args, WeightFormat::kInt8);
  std::memcpy(packed, &header, sizeof(header));
  kernels(isa).int8[cell].pack(args, weights, packed + sizeof(header));
}

template <class scalar_t>
bool take_packed(Isa isa, int cell, const char* packed, int64_t size, ForwardArgs<scalar_t>& args,
                 WeightFormat& format) {
  const WeightFormat int8 =
      std::is_same_v<scalar_t, float> ? WeightFormat::kInt8 : WeightFormat::kPlain;
  for (WeightFormat made : {packed_format<scalar_t>(isa), int8}) {
    const Header header = header_of(isa, cell, args, made);
    if (size != bytes_of(isa, cell, args, made) || std::memcmp(packed, &header, sizeof(header)))
      continue;
    args.packed = packed + sizeof(header);
    format = made;
    return true;
  }
  return false;
}

template <class half_t>
void widen(int64_t count, const half_t* in, float* out) {
  kernels(active_isa())
      .widen(count, std::is_same_v<half_t, BFloat16>, reinterpret_cast<const uint16_t*>(in), out);
}
template <class half_t>
void narrow(int64_t count, const float* in, half_t* out) {
  kernels(active_isa())
      .narrow(count, std::is_same_v<half_t, BFloat16>, in, reinterpret_cast<uint16_t*>(out));
}

#define RNNFAST_INSTANTIATE(scalar_t)                                                             \
  template void run_forward(Isa, int, ForwardArgs<scalar_t>&, WeightFormat, const Threads&);      \
  template void run_forward_both(Isa, int, ForwardArgs<scalar_t>(&)[2], const WeightFormat(&)[2], \
                                 const Threads&);                                                 \
  template int64_t packed_bytes(Isa, int, const LayerArgs<scalar_t>&);                            \
  template void pack_weights(Isa, int, const LayerArgs<scalar_t>&, char*);                        \
  template bool take_packed(Isa, int, const char*, int64_t, ForwardArgs<scalar_t>&, WeightFormat&);
RNNFAST_INSTANTIATE(float)
RNNFAST_INSTANTIATE(double)
RNNFAST_INSTANTIATE(BFloat16)
RNNFAST_INSTANTIATE(Float16)
template void run_backward(Isa, int, const BackwardArgs<float>&, const Threads&);
template void run_backward(Isa, int, const BackwardArgs<double>&, const Threads&);
template void run_backward_both(Isa, int, const BackwardArgs<float> (&)[2], const Threads&);
template void run_backward_both(Isa, int, const BackwardArgs<double> (&)[2], const Threads&);
template void widen(int64_t, const BFloat16*, float*);
template void widen(int64_t, const Float16*, float*);
template void narrow(int64_t, const float*, BFloat16*);
template void narrow(int64_t, const float*, Float16*);

}  // namespace rnnfast
