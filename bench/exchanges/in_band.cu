// Exchange of h without flags: who waits polls the words of h themselves, 16 bytes at a time.
//
// Sentinel: a place holds NaN until its word comes, so the owner must make it NaN again in time.
// Epoch: 4 of the 16 bytes are the number of the step, so that nothing is cleared but more is sent.
#include "gather.h"
#include "ops.cuh"

namespace exchanges {
namespace {

enum class Mark { kSentinel, kEpoch };

constexpr unsigned kSentinel = 0xFFFFFFFFu;  // NaN in every 16-bit type; a valid h is none
constexpr int kBatch = 8;                    // loads of a thread that are under way at once

// A place is cleared while its step + 2 is under way, and read again at step + 4: between the two
// everyone has gathered step + 3, which its owner sent behind the fence.
template <Mark kMark>
constexpr int kBuffers = kMark == Mark::kSentinel ? 4 : 2;

template <Mark kMark>
__device__ __forceinline__ bool arrived(uint4 word, unsigned epoch) {
  return kMark == Mark::kSentinel ? word.x != kSentinel : word.w == epoch;
}

template <Mark kMark>
__global__ void __launch_bounds__(kThreads)
    gather_in_band(Run run, uint4* buffers, int tile_words) {
  Patience patience(run);
  const int thread = threadIdx.x, words = gridDim.x * tile_words, own = blockIdx.x * tile_words;
  unsigned differs = 0;
  for (int step = 0; step < run.steps; ++step) {
    // Publish the own tile.
    uint4* const h = buffers + (step % kBuffers<kMark>)*words;
    const unsigned epoch = step + 1;
    for (int word = thread; word < tile_words; word += kThreads) {
      const unsigned value = payload(step, own + word);
      store_whole(h + own + word,
                  make_uint4(value, value, value, kMark == Mark::kEpoch ? epoch : value));
    }

    // All have read step - 2, since all sent step - 1 after it: its place becomes free while the
    // others' words are on their way. The last threads do it; the first ones have just published.
    if constexpr (kMark == Mark::kSentinel) {
      uint4* const free = buffers + ((step + 2) % kBuffers<kMark>)*words + own;
      const int first = kThreads - 1 - thread;
      for (int word = first; word < tile_words; word += kThreads)
        store_whole(free + word, make_uint4(kSentinel, kSentinel, kSentinel, kSentinel));
      if (first < tile_words) fence();
    }

    // Gather: several loads at once, and those that came too early again.
    for (int base = thread; base < words; base += kBatch * kThreads) {
      uint4 batch[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        if (base + k * kThreads < words) batch[k] = load_whole(h + base + k * kThreads);
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int word = base + k * kThreads;
        if (word >= words) break;
        if (!arrived<kMark>(batch[k], epoch))
          patience.wait([&] {
            batch[k] = load_whole(h + word);
            return arrived<kMark>(batch[k], epoch);
          });
        const unsigned expected = payload(step, word);
        const unsigned last = kMark == Mark::kEpoch ? epoch : expected;
        differs |= (batch[k].x ^ expected) | (batch[k].y ^ expected) | (batch[k].z ^ expected) |
                   (batch[k].w ^ last);
      }
    }
    __syncthreads();  // the whole block has read before any of it publishes the next step
  }
  report(run, differs != 0);
}

template <Mark kMark>
Measured measure(const Gpu& gpu, Tile tile) {
  need_blocks(gpu, tile.blocks);
  auto* const kernel = &gather_in_band<kMark>;
  allow_shared(gpu, reinterpret_cast<const void*>(kernel), kOneBlockAnSm);
  const int data_bytes = kMark == Mark::kSentinel ? 16 : 12;
  const int tile_words = (tile.bytes() + data_bytes - 1) / data_bytes;
  const Buffer<uint4> buffers(static_cast<size_t>(kBuffers<kMark>) * tile.blocks * tile_words);
  const Launch how = {.blocks = tile.blocks, .shared_bytes = kOneBlockAnSm, .cooperative = true};
  return repeat(
      gpu, gpu.options.steps, [&] { buffers.fill(kMark == Mark::kSentinel ? 0xFF : 0); },
      [&] { launch(how, kernel, gpu.run(gpu.options.steps), buffers.get(), tile_words); });
}

}  // namespace

std::vector<Case> in_band_cases(int sms) {
  std::vector<Case> cases;
  for (const Tile tile : gather_tiles(sms)) {
    cases.push_back({"in band, sentinel", tile.parameters(),
                     [tile](const Gpu& gpu) { return measure<Mark::kSentinel>(gpu, tile); }});
    cases.push_back({"in band, epoch in every word", tile.parameters(),
                     [tile](const Gpu& gpu) { return measure<Mark::kEpoch>(gpu, tile); }});
  }
  return cases;
}

}  // namespace exchanges
