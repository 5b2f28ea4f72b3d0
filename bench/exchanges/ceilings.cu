// Two ceilings: a copy within device memory, and reads that L2 serves to all SMs.
#include <algorithm>

#include "ops.cuh"

namespace exchanges {
namespace {

constexpr int kReadThreads = 1024;
constexpr int kReadsInFlight = 8;  // of one thread

__global__ void fill_words(uint4* words, size_t count, int step) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t k = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < count;
       k += stride) {
    const unsigned value = payload(step, static_cast<int>(k));
    words[k] = make_uint4(value, value, value, value);
  }
}

__global__ void verify_words(Run run, const uint4* words, size_t count, int step) {
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  unsigned wrong = 0;
  for (size_t k = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < count;
       k += stride) {
    const unsigned value = payload(step, static_cast<int>(k));
    const uint4 word = words[k];
    wrong += word.x != value || word.y != value || word.z != value || word.w != value;
  }
  report(run, wrong);
}

// Every block reads all words, `run.steps` times, each from a place of its own onwards; the sums of
// what it read must come to `expected`. All four words are used, so that a load stays 16 bytes.
__global__ void __launch_bounds__(kReadThreads)
    read_words(Run run, const uint4* words, int count, uint2 expected) {
  __shared__ unsigned sums[2];
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  __syncthreads();
  const int pieces = count / kReadThreads;
  const int shift = static_cast<int>(static_cast<long long>(pieces) * blockIdx.x / gridDim.x);
  unsigned low = 0, high = 0;
  for (int step = 0; step < run.steps; ++step)
    for (int base = 0; base < pieces; base += kReadsInFlight) {
      uint4 batch[kReadsInFlight];
#pragma unroll
      for (int k = 0; k < kReadsInFlight; ++k) {
        int piece = shift + base + k;
        if (piece >= pieces) piece -= pieces;
        batch[k] = __ldcg(words + piece * kReadThreads + static_cast<int>(threadIdx.x));
      }
#pragma unroll
      for (int k = 0; k < kReadsInFlight; ++k) {
        low += batch[k].x ^ batch[k].y;
        high += batch[k].z + batch[k].w;
      }
    }
  atomicAdd(&sums[0], low);
  atomicAdd(&sums[1], high);
  __syncthreads();
  if (threadIdx.x == 0) report(run, sums[0] != expected.x || sums[1] != expected.y);
}

Measured measure_copy(const Gpu& gpu) {
  size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  const size_t bytes = std::min<size_t>(1ull << 30, free_bytes / 4) >> 20 << 20;
  if (bytes == 0) throw CantRun("less than 4 MB of device memory is free");
  const size_t count = bytes / sizeof(uint4);
  const Buffer<uint4> from(count), to(count);
  launch({.blocks = 4 * gpu.sms}, &fill_words, from.get(), count, 0);
  Measured measured = repeat(
      gpu, 1, [&] { to.fill(0xFF); },
      [&] {
        check(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice),
              "cudaMemcpyAsync");
      });
  launch({.blocks = 4 * gpu.sms}, &verify_words, gpu.run(1), static_cast<const uint4*>(to.get()),
         count, 0);
  check_verdict(gpu);
  measured.bytes = 2.0 * static_cast<double>(bytes);  // read and written
  measured.found = {{"bytes", static_cast<long long>(bytes)}};
  return measured;
}

Measured measure_reads(const Gpu& gpu, int bytes) {
  const int count = bytes / static_cast<int>(sizeof(uint4));
  const Buffer<uint4> words(count);
  launch({.blocks = 4 * gpu.sms}, &fill_words, words.get(), static_cast<size_t>(count), 0);
  Run run = gpu.run(std::max(4, (64 << 20) / bytes));
  unsigned high = 0;
  for (int k = 0; k < count; ++k) high += 2 * payload(0, k);
  const uint2 expected = {0, high * static_cast<unsigned>(run.steps)};
  Measured measured = repeat(
      gpu, run.steps, [] {},
      [&] {
        launch({.blocks = gpu.sms, .threads = kReadThreads}, &read_words, run,
               static_cast<const uint4*>(words.get()), count, expected);
      });
  measured.bytes = static_cast<double>(gpu.sms) * bytes;
  return measured;
}

}  // namespace

std::vector<Case> ceiling_cases() {
  std::vector<Case> cases;
  cases.push_back({"ceiling, copy within device memory", {}, measure_copy});
  for (const int kilobytes : {8 << 10, 128})
    cases.push_back({"ceiling, every SM reads the same buffer through L2",
                     {{"bytes", kilobytes << 10}},
                     [kilobytes](const Gpu& gpu) { return measure_reads(gpu, kilobytes << 10); }});
  return cases;
}

}  // namespace exchanges
