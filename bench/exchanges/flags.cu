// Exchange of h by flags: a block writes its tile, releases its flag with the number of the step,
// waits for the flags of all, and reads all tiles.
//
// Two buffers are enough: who writes step s + 2 has seen all flags of s + 1, and a block releases
// that flag only after it has read step s.
#include "gather.h"
#include "ops.cuh"

namespace exchanges {
namespace {

enum class Poll {
  kThreadAFlag,    // thread i waits for flag i
  kOneWarp,        // the first warp waits for all, a few flags a lane
  kOneWarpVector,  // the same with four flags a load, relaxed, and one fence at the end
  kWarpItsTiles    // every warp waits for some tiles and reads these at once
};

struct Gather {
  uint4* tiles;     // [2][blocks][tile_words]
  unsigned* flags;  // [blocks], `stride` words apart, and room to a multiple of four
  int tile_words, tile_shift;
};

template <int kStride>
__device__ __forceinline__ bool arrived(const unsigned* flags, int block, unsigned epoch) {
  return load_acquire(flags + block * kStride) >= epoch;
}

__device__ __forceinline__ unsigned compare(uint4 word, unsigned expected) {
  return (word.x ^ expected) | (word.y ^ expected) | (word.z ^ expected) | (word.w ^ expected);
}

template <Poll kPoll, int kStride>
__device__ __forceinline__ void wait_for_all(const Gather& gather, Patience& patience,
                                             unsigned epoch) {
  const int blocks = gridDim.x, thread = threadIdx.x;
  if constexpr (kPoll == Poll::kThreadAFlag) {
    if (thread < blocks)
      patience.wait([&] { return arrived<kStride>(gather.flags, thread, epoch); });
  } else if constexpr (kPoll == Poll::kOneWarp) {
    if (thread < 32)
      for (int block = thread; block < blocks; block += 32)
        patience.wait([&] { return arrived<kStride>(gather.flags, block, epoch); });
  } else if constexpr (kPoll == Poll::kOneWarpVector) {
    static_assert(kStride == 1);
    if (thread < 32) {
      // Flags beyond the last block are set for good by the host.
      for (int four = thread; 4 * four < blocks; four += 32)
        patience.wait([&] {
          const uint4 flags = load_relaxed_4(reinterpret_cast<const uint4*>(gather.flags) + four);
          return min(min(flags.x, flags.y), min(flags.z, flags.w)) >= epoch;
        });
      fence();
    }
  }
  __syncthreads();
}

template <Poll kPoll, int kStride>
__global__ void __launch_bounds__(kThreads) gather_by_flags(Run run, Gather gather) {
  Patience patience(run);
  const int blocks = gridDim.x, thread = threadIdx.x;
  const int words = blocks * gather.tile_words, own = blockIdx.x * gather.tile_words;
  unsigned differs = 0;
  for (int step = 0; step < run.steps; ++step) {
    // Publish the own tile.
    uint4* const h = gather.tiles + (step % 2) * words;
    for (int word = thread; word < gather.tile_words; word += kThreads) {
      const unsigned value = payload(step, own + word);
      __stcg(h + own + word, make_uint4(value, value, value, value));
    }
    __syncthreads();
    const unsigned epoch = step + 1;
    if (thread == 0) store_release(gather.flags + blockIdx.x * kStride, epoch);

    // Read everyone's, all at once or as they come.
    if constexpr (kPoll == Poll::kWarpItsTiles) {
      constexpr int kWarps = kThreads / 32;
      const int warp = thread / 32, lane = thread % 32;
      const int mine = warp + kWarps * lane;
      if (mine < blocks) patience.wait([&] { return arrived<kStride>(gather.flags, mine, epoch); });
      __syncwarp();
      const int tiles = (blocks - warp + kWarps - 1) / kWarps;
#pragma unroll 8
      for (int item = lane; item < tiles << gather.tile_shift; item += 32) {
        const int tile = warp + kWarps * (item >> gather.tile_shift);
        const int word = (tile << gather.tile_shift) + (item & (gather.tile_words - 1));
        differs |= compare(__ldcg(h + word), payload(step, word));
      }
    } else {
      wait_for_all<kPoll, kStride>(gather, patience, epoch);
#pragma unroll 8
      for (int word = thread; word < words; word += kThreads)
        differs |= compare(__ldcg(h + word), payload(step, word));
    }
  }
  report(run, differs != 0);
}

using Kernel = void (*)(Run, Gather);

Measured measure(const Gpu& gpu, Tile tile, Kernel kernel, int stride) {
  need_blocks(gpu, tile.blocks);
  allow_shared(gpu, reinterpret_cast<const void*>(kernel), kOneBlockAnSm);
  Gather gather = {nullptr, nullptr, tile.bytes() / 16, 0};
  while (1 << gather.tile_shift < gather.tile_words) ++gather.tile_shift;
  const Buffer<uint4> tiles(2 * static_cast<size_t>(tile.blocks) * gather.tile_words);
  const size_t used = static_cast<size_t>(tile.blocks) * stride;
  const Buffer<unsigned> flags(used + 4);
  gather.tiles = tiles.get();
  gather.flags = flags.get();
  const Launch how = {.blocks = tile.blocks, .shared_bytes = kOneBlockAnSm, .cooperative = true};
  return repeat(
      gpu, gpu.options.steps,
      [&] {
        tiles.fill(0);
        flags.fill(0);
        check(cudaMemsetAsync(flags.get() + used, 0xFF, 4 * sizeof(unsigned)), "cudaMemsetAsync");
      },
      [&] { launch(how, kernel, gpu.run(gpu.options.steps), gather); });
}

struct Variant {
  const char* name;
  Kernel kernel;
  int stride;
};

// A line a flag is 32 words.
constexpr Variant kVariants[] = {
    {"flags, thread i waits for flag i, a line each", &gather_by_flags<Poll::kThreadAFlag, 32>, 32},
    {"flags, thread i waits for flag i, 32 in a line", &gather_by_flags<Poll::kThreadAFlag, 1>, 1},
    {"flags, one warp waits for all, a line each", &gather_by_flags<Poll::kOneWarp, 32>, 32},
    {"flags, one warp waits for all, 32 in a line", &gather_by_flags<Poll::kOneWarp, 1>, 1},
    {"flags, one warp waits for all, four a load", &gather_by_flags<Poll::kOneWarpVector, 1>, 1},
    {"flags, each warp waits for its tiles, a line each", &gather_by_flags<Poll::kWarpItsTiles, 32>,
     32},
    {"flags, each warp waits for its tiles, 32 in a line", &gather_by_flags<Poll::kWarpItsTiles, 1>,
     1},
};

}  // namespace

std::vector<Case> flag_cases(int sms) {
  std::vector<Case> cases;
  for (const Tile tile : gather_tiles(sms))
    for (const Variant& variant : kVariants)
      cases.push_back({variant.name, tile.parameters(), [tile, variant](const Gpu& gpu) {
                         return measure(gpu, tile, variant.kernel, variant.stride);
                       }});
  return cases;
}

}  // namespace exchanges
