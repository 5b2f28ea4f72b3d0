// THE list of tiles that have a kernel: RNNFAST_ONCHIP_TILES(use) calls use(gates, operand,
// backward, hidden, units, kept), smallest first within gates, operand and direction (the fields of
// OnchipTile; all have exchange kNone, one block). Kernels and table are made of it.
#pragma once

// clang-format off
#define RNNFAST_ONCHIP_TILES(use)   \
  use(4, kHalf, false,  32,  8,  2) \
  use(4, kHalf, false,  64,  8,  4) \
  use(4, kHalf, false, 128,  8,  6) \
  use(4, kHalf, false, 192, 16,  3) \
  use(3, kHalf, false,  32,  8,  2) \
  use(3, kHalf, false,  64,  8,  4) \
  use(3, kHalf, false, 128,  8,  4) \
  use(3, kHalf, false, 192, 16,  5) \
  use(1, kHalf, false, 128, 16,  8) \
  use(1, kHalf, false, 256, 16, 12) \
  use(4, kTf32, false,  32,  8,  4) \
  use(4, kTf32, false,  64,  8,  8) \
  use(4, kTf32, false, 128,  8,  6) \
  use(3, kTf32, false,  32,  8,  4) \
  use(3, kTf32, false,  64,  8,  8) \
  use(3, kTf32, false, 128,  8,  4) \
  use(1, kTf32, false, 128, 16, 16) \
  use(4, kHalf, true,   64, 16,  4) \
  use(4, kHalf, true,  128, 16,  6) \
  use(4, kHalf, true,  176, 16,  3) \
  use(3, kHalf, true,   64, 16,  4) \
  use(3, kHalf, true,  128, 16,  8) \
  use(3, kHalf, true,  192, 16,  5) \
  use(1, kHalf, true,  128, 16,  8) \
  use(1, kHalf, true,  256, 16,  8) \
  use(4, kTf32, true,   64, 16,  8) \
  use(4, kTf32, true,  128, 16,  6) \
  use(3, kTf32, true,   64, 16,  8) \
  use(3, kTf32, true,  128, 16,  8) \
  use(1, kTf32, true,  128, 16, 16)
// clang-format on
