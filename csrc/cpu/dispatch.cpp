#include "dispatch.h"

#include <unistd.h>

#include <atomic>
#include <type_traits>

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

int64_t private_cache_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 1 << 20;
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

GroupChoice choose_group_for(const Group& group, int threads) {
  const Wish wish{forced_kernel(), forced_split()};
  const GroupChoice choice = choose_group(group, machine_with(threads), wish);
  if (choice.teams == 1) return choice;
  const int usable = usable_processors();
  return threads <= usable ? choice : choose_group(group, machine_with(usable), wish);
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

template void widen(int64_t, const BFloat16*, float*);
template void widen(int64_t, const Float16*, float*);
template void narrow(int64_t, const float*, BFloat16*);
template void narrow(int64_t, const float*, Float16*);

}  // namespace rnnfast
