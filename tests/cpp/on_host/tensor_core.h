// What the instructions of a warp on matrices do, on the registers of its 32 lanes.
#pragma once

#include <cstdint>

namespace on_host {

constexpr int kLanes = 32;

enum class Product : int { kFloat16, kBFloat16, kTf32 };
// What PTX calls it behind mma.sync.aligned; an error if this device doesn't have it.
Product product_of(const char* shape_and_types);

struct ProductRegisters {
  float* d;           // 4, in and out
  const uint32_t* a;  // 4
  const uint32_t* b;  // 2
};

// D += A B: products are exact, sums in double, rounded once. An error if an operand of TF32 has
// more than 10 bits of mantissa, of which a device would read no more.
void run_product(Product product, const ProductRegisters (&lanes)[kLanes]);
// movmatrix.sync.aligned.m8n8.trans.b16.
void run_transpose(uint32_t (&lanes)[kLanes]);

}  // namespace on_host
