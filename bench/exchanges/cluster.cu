// Within a cluster: its hardware barrier, and an all-gather of h by pushing it into the shared
// memory of every peer, where an mbarrier counts the bytes that came.
#include <algorithm>

#include "ops.cuh"

namespace exchanges {
namespace {

constexpr int kClusterHidden = 512;  // units of h that the blocks of a cluster hold together
constexpr int kCheckEvery = 64;      // barriers between two that carry a word
constexpr int kHeader = 128;         // bytes before h in shared memory: two mbarriers

__global__ void __launch_bounds__(kThreads) cluster_barriers(Run run, int cluster) {
  auto* const slot = reinterpret_cast<unsigned*>(dynamic_shared());
  unsigned wrong = 0;
  cluster_barrier();  // a peer's shared memory may be read once the peer runs
  for (int step = 0; step < run.steps; ++step) {
    const bool checked = step % kCheckEvery == 0;
    const unsigned word = payload(step, 0);
    if (checked && threadIdx.x == 0) *slot = word;
    cluster_barrier();
    if (checked && threadIdx.x < cluster)
      wrong += load_peer(peer_address(slot, threadIdx.x)) != word;
  }
  cluster_barrier();  // nobody leaves while a peer still reads its slot
  report(run, wrong);
}

enum class Push { kStores, kBulkCopy };

// Two buffers are enough: a peer sends step s + 2 when it has all of s + 1, and a block sends that
// after all of its threads have read step s.
template <Push kPush>
__global__ void __launch_bounds__(kThreads) all_gather(Run run, int cluster, int tile_words) {
  Patience patience(run);
  auto* const arrivals = reinterpret_cast<unsigned long long*>(dynamic_shared());
  uint4* const buffers = dynamic_shared() + kHeader / sizeof(uint4);
  const int thread = threadIdx.x, words = cluster * tile_words;
  const int rank = static_cast<int>(cluster_rank()), own = rank * tile_words;
  const unsigned senders = kPush == Push::kStores ? cluster : cluster - 1;
  const unsigned expected_bytes = senders * tile_words * sizeof(uint4);
  if (thread < 2) init_mbarrier(arrivals + thread);
  cluster_barrier();

  unsigned differs = 0;
  for (int step = 0; step < run.steps; ++step) {
    uint4* const h = buffers + (step % 2) * words;
    unsigned long long* const arrival = arrivals + step % 2;

    // Push the own tile into every block; a peer's bytes may come before they are expected here.
    if (thread == 0) expect_bytes(arrival, expected_bytes);
    if constexpr (kPush == Push::kStores) {
      for (int item = thread; item < words; item += kThreads) {
        // every block begins with another peer
        const int word = own + item % tile_words, peer = (rank + item / tile_words) % cluster;
        const unsigned value = payload(step, word);
        push(peer_address(h + word, peer), make_uint4(value, value, value, value),
             peer_address(arrival, peer));
      }
    } else {
      for (int word = own + thread; word < own + tile_words; word += kThreads) {
        const unsigned value = payload(step, word);
        h[word] = make_uint4(value, value, value, value);
      }
      fence_for_copies();
      __syncthreads();
      if (thread < cluster - 1) {
        const int peer = (rank + 1 + thread) % cluster;
        push_many(peer_address(h + own, peer), h + own, tile_words * sizeof(uint4),
                  peer_address(arrival, peer));
      }
    }

    // Read all tiles.
    patience.wait([&] { return phase_is_over(arrival, (step / 2) % 2); });
#pragma unroll 4
    for (int word = thread; word < words; word += kThreads) {
      const uint4 value = h[word];
      const unsigned expected = payload(step, word);
      differs |=
          (value.x ^ expected) | (value.y ^ expected) | (value.z ^ expected) | (value.w ^ expected);
    }
    __syncthreads();  // the whole block has read before any of it sends the next step
  }
  cluster_barrier();  // nobody leaves while a peer may still write to it
  report(run, differs != 0);
}

// One cluster alone, or as many as fit at one block an SM.
int clusters_of(const Gpu& gpu, Launch how, const void* kernel, bool all) {
  if (how.cluster > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cudaFuncSetAttribute");
  how.blocks = how.cluster;
  int fit = 0;
  const cudaError_t code = cudaOccupancyMaxActiveClusters(&fit, kernel, Configuration(how).get());
  cudaGetLastError();
  if (code != cudaSuccess || fit < 1)
    throw CantRun("no cluster of " + std::to_string(how.cluster) + " blocks fits on this GPU" +
                  (code == cudaSuccess ? "" : std::string(": ") + cudaGetErrorString(code)));
  return all ? std::min(fit, gpu.sms / how.cluster) : 1;
}

Measured measure_barrier(const Gpu& gpu, int cluster, bool all) {
  const auto* const kernel = reinterpret_cast<const void*>(&cluster_barriers);
  allow_shared(gpu, kernel, kOneBlockAnSm);
  Launch how = {.shared_bytes = kOneBlockAnSm, .cluster = cluster};
  const int clusters = clusters_of(gpu, how, kernel, all);
  how.blocks = clusters * cluster;
  Measured measured = repeat(
      gpu, gpu.options.steps, [] {},
      [&] { launch(how, &cluster_barriers, gpu.run(gpu.options.steps), cluster); });
  measured.found = {{"clusters", clusters}};
  return measured;
}

template <Push kPush>
Measured measure_gather(const Gpu& gpu, int cluster, int batch, bool all) {
  auto* const kernel = &all_gather<kPush>;
  const auto* const untyped = reinterpret_cast<const void*>(kernel);
  const int tile_words = 2 * batch * kClusterHidden / cluster / 16;
  const int bytes = kHeader + 2 * cluster * tile_words * 16;
  Launch how = {.shared_bytes = std::max(bytes, kOneBlockAnSm), .cluster = cluster};
  allow_shared(gpu, untyped, how.shared_bytes);
  const int clusters = clusters_of(gpu, how, untyped, all);
  how.blocks = clusters * cluster;
  Measured measured = repeat(
      gpu, gpu.options.steps, [] {},
      [&] { launch(how, kernel, gpu.run(gpu.options.steps), cluster, tile_words); });
  measured.found = {{"clusters", clusters}};
  return measured;
}

}  // namespace

std::vector<Case> cluster_cases() {
  std::vector<Case> cases;
  for (const bool all : {false, true})
    for (const int cluster : {2, 4, 8, 16}) {
      const std::string where = all ? ", on all SMs" : ", one cluster";
      cases.push_back(
          {"cluster barrier" + where,
           {{"cluster", cluster}, {"threads", kThreads}},
           [cluster, all](const Gpu& gpu) { return measure_barrier(gpu, cluster, all); }});
      for (const int batch : {32, 1}) {
        const Parameters parameters = {{"cluster", cluster},
                                       {"threads", kThreads},
                                       {"batch", batch},
                                       {"bytes_gathered", 2LL * batch * kClusterHidden}};
        cases.push_back(
            {"cluster push, st.async" + where, parameters, [cluster, batch, all](const Gpu& gpu) {
               return measure_gather<Push::kStores>(gpu, cluster, batch, all);
             }});
        cases.push_back({"cluster push, bulk copies" + where, parameters,
                         [cluster, batch, all](const Gpu& gpu) {
                           return measure_gather<Push::kBulkCopy>(gpu, cluster, batch, all);
                         }});
      }
    }
  return cases;
}

}  // namespace exchanges
