// The instructions that exchanges are made of, a function each, and waits that end.
//
// Everything in PTX is here; the kernels beside it are plain C++.
#pragma once
#include "harness.h"

namespace exchanges {

// --- through L2 ------------------------------------------------------------------------------

__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

// Four flags at once; each is a relaxed load, and fence() afterwards makes them acquire.
__device__ __forceinline__ uint4 load_relaxed_4(const uint4* address) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
}

__device__ __forceinline__ void store_release(unsigned* address, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
               "r"(value)
               : "memory");
}

__device__ __forceinline__ void add_release(unsigned* address, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
               "r"(value)
               : "memory");
}

__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// 16 bytes that arrive together or not at all (.b128, unlike .v4, is one access).
__device__ __forceinline__ uint4 load_whole(const uint4* address) {
  unsigned long long low, high;
  asm volatile(
      "{\n.reg .b128 word;\nld.relaxed.gpu.global.b128 word, [%2];\nmov.b128 {%0, %1}, word;\n}"
      : "=l"(low), "=l"(high)
      : "l"(__cvta_generic_to_global(address))
      : "memory");
  return {static_cast<unsigned>(low), static_cast<unsigned>(low >> 32), static_cast<unsigned>(high),
          static_cast<unsigned>(high >> 32)};
}

__device__ __forceinline__ void store_whole(uint4* address, uint4 value) {
  const unsigned long long low = value.x | static_cast<unsigned long long>(value.y) << 32;
  const unsigned long long high = value.z | static_cast<unsigned long long>(value.w) << 32;
  asm volatile(
      "{\n.reg .b128 word;\nmov.b128 word, {%1, %2};\nst.relaxed.gpu.global.b128 [%0], word;\n}" ::
          "l"(__cvta_generic_to_global(address)),
      "l"(low), "l"(high)
      : "memory");
}

// --- within a cluster --------------------------------------------------------------------------

__device__ __forceinline__ uint4* dynamic_shared() {
  extern __shared__ uint4 shared[];
  return shared;
}

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// The same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ unsigned peer_address(const void* own, unsigned rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(own)), "r"(rank));
  return address;
}

__device__ __forceinline__ unsigned load_peer(unsigned address) {
  unsigned value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// Counts one arrival and the bytes of each phase; the blocks of the cluster see it afterwards.
__device__ __forceinline__ void init_mbarrier(unsigned long long* mbarrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                   shared_address(mbarrier))
               : "memory");
}

__device__ __forceinline__ void expect_bytes(unsigned long long* mbarrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(mbarrier)),
               "r"(bytes)
               : "memory");
}

// The scope is spelt out: without it the wait would be for writes of the own block only.
__device__ __forceinline__ bool phase_is_over(unsigned long long* mbarrier, unsigned parity) {
  unsigned over;
  asm volatile(
      "{\n.reg .pred over;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over;\n}"
      : "=r"(over)
      : "r"(shared_address(mbarrier)), "r"(parity)
      : "memory");
  return over != 0;
}

// Writes 16 bytes into a peer and tells its mbarrier.
__device__ __forceinline__ void push(unsigned to, uint4 value, unsigned mbarrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(mbarrier)
      : "memory");
}

// The copy engine reads what ordinary stores before this wrote.
__device__ __forceinline__ void fence_for_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies own shared memory into a peer and tells its mbarrier; one thread for all the bytes.
__device__ __forceinline__ void push_many(unsigned to, const void* from, unsigned bytes,
                                          unsigned mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(shared_address(from)), "r"(bytes), "r"(mbarrier)
      : "memory");
}

// --- between kernels ---------------------------------------------------------------------------

__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ __forceinline__ void wait_for_previous_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// --- waiting -------------------------------------------------------------------------------------

// Waits of one thread. After the first that took too long, here or elsewhere, none waits any more:
// the kernel runs to its end with wrong data, and nothing hangs.
class Patience {
 public:
  __device__ explicit Patience(const Run& run) : run_(run) {}

  template <class Ready>
  __device__ __forceinline__ void wait(Ready ready) {
    if (over_) return;
    long long start = 0;
    // The clock is read seldom, so that it costs the wait nothing.
    for (unsigned tries = 1; !ready(); ++tries) {
      if (tries % 1024 != 0) continue;
      if (start == 0) start = clock64();
      if (clock64() - start > run_.patience) atomicExch(&run_.verdict->timed_out, 1u);
      if (*static_cast<volatile unsigned*>(&run_.verdict->timed_out)) {
        over_ = true;
        return;
      }
    }
  }

 private:
  Run run_;
  bool over_ = false;
};

// What word `index` of h holds in a step: never what an older step left, and never the sentinel.
__host__ __device__ __forceinline__ unsigned payload(int step, int index) {
  return (static_cast<unsigned>(step + 1) * 0x9E3779B1u + static_cast<unsigned>(index)) &
         0x7FFFFFFFu;
}

__device__ __forceinline__ void report(const Run& run, unsigned wrong) {
  if (wrong) atomicAdd(&run.verdict->wrong, wrong);
}

}  // namespace exchanges
