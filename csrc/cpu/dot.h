// Products by instructions that add groups of small numbers into a 32-bit lane: pairs of bfloat16
// into a float, four bytes into an int32. Not every processor of an instruction set has them, so
// they are compiled apart (dot_x86.cpp) and reached by pointer.
#pragma once

#include <cstdint>

#include "../core/args.h"
#include "../core/choose_engine.h"

namespace rnnfast {

// A group is what one lane takes at once: 4 bytes of consecutive k. Panels hold, for each group, a
// few vectors of units; rows of `a` hold their groups side by side. Both are padded with zeros to
// whole blocks of 64 bytes of k.
struct DotOperands {
  int64_t blocks;  // of 16 groups
  const void* a;
  int64_t a_row;  // bytes
  const void* w;
  int64_t w_group;     // bytes
  const float* start;  // start values; null: zero
  int64_t start_row;   // elements; 0: the same for every row
  float* out;
  int64_t out_row;  // elements
  // Bytes only: row r stands for row_scale[r] * (a - 128), unit u for unit_scale[u] * w, and
  // unit_sum[u] is 128 * (the sum of w over k).
  const float *row_scale, *unit_scale;
  const int32_t* unit_sum;
};

constexpr int64_t kDotRows = 32;        // rows that a caller should hand over at once
constexpr int64_t kDotBlockBytes = 64;  // of k

// Each computes out = start + a . w for any number of rows and 1 to 4 vectors of units.
struct DotKernels {
  DotProduct bfloat16, int8;  // null: no such instruction
};

// What the instruction set adds to AVX-512; nothing but nulls for the others. `rows` is what a
// whole step or layer has: a worker's share must not decide, since tiles and groups add up in
// different orders.
DotKernels dot_kernels(Isa isa, int64_t rows);
bool dot_isa_available(Isa isa);

}  // namespace rnnfast
