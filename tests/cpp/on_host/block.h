// Threads that cooperate: barriers, shared memory and the instructions of a warp. A launch that
// asks for shared memory runs a fiber for each thread of a block; elsewhere all this is an error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
};
inline thread_local dim3 threadIdx{0, 0, 0}, blockIdx{0, 0, 0}, blockDim, gridDim;

void __syncthreads();
void __syncwarp(unsigned mask = 0xffffffffu);

namespace on_host {

// Of the block that runs: as long as the launch says, of NaNs in every type at first.
char* shared_memory();
// What mma.sync.aligned.<shape_and_types> does: d += a b.
void mma(const char* shape_and_types, float (&d)[4], const uint32_t (&a)[4],
         const uint32_t (&b)[2]);
// movmatrix.sync.aligned.m8n8.trans.b16.
uint32_t transpose_8x8(uint32_t pair);

// Where the orders of blocks, warps and lanes begin, for this thread.
void seed_blocks(unsigned seed);
// Runs `kernel` for each thread, blocks one after the other. An error, once all fibers are back
// from what they were at, if one throws or if threads miss each other at a barrier or a collective.
void run_blocks(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// What cudaFuncSetAttribute asks for: whether the device has as much for a block. Then whether a
// launch may have it, which without asking ends at 48 KiB.
bool allow_shared_memory(const void* kernel, int bytes);
bool may_have_shared_memory(const void* kernel, size_t bytes);

}  // namespace on_host
