// The places of entries are the ones that the PTX ISA documents ("Matrix Fragments for mma.m16n8k16
// with floating point type", "... for mma.m16n8k8", "movmatrix"), in its words and on purpose not
// in the engine's, which is tested with them.
#include "tensor_core.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/half.h"

namespace on_host {

namespace {

namespace maths = rnnfast::RNNFAST_TARGET;

struct Place {
  int row, column;
};

// Entry i of a lane's fragment; two of 16 bits share a register, the first in its lower half.
constexpr Place a_of_16_bits(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
  return {upper ? group : group + 8, in_group * 2 + (i & 1) + (i < 4 ? 0 : 8)};
}
constexpr Place b_of_16_bits(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), group};
}
constexpr Place a_of_tf32(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i == 0 || i == 2 ? group : group + 8, i == 0 || i == 1 ? in_group : in_group + 4};
}
constexpr Place b_of_tf32(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i == 0 ? in_group : in_group + 4, group};
}
constexpr Place c_of_float32(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
}

template <Product product>
double entry(const uint32_t* registers, int i) {
  const uint32_t half = (registers[i / 2] >> (16 * (i % 2))) & 0xffffu;
  if constexpr (product == Product::kFloat16) return maths::widen_float16<float>(half);
  if constexpr (product == Product::kBFloat16) return maths::bit_cast<float>(half << 16);
  const uint32_t bits = registers[i];
  if (bits & 0x1fffu) {
    char text[100];
    std::snprintf(
        text, sizeof(text),
        "on_host: mma of TF32 got 0x%08x, which nobody rounded: the last 13 bits must be 0",
        static_cast<unsigned>(bits));
    throw std::runtime_error(text);
  }
  return maths::bit_cast<float>(bits);
}

template <Product product>
void run(const ProductRegisters (&lanes)[kLanes]) {
  constexpr bool tf32 = product == Product::kTf32;
  constexpr int kDepth = tf32 ? 8 : 16;
  double a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 16 * kDepth / kLanes; ++i) {
      const Place at = tf32 ? a_of_tf32(lane, i) : a_of_16_bits(lane, i);
      a[at.row][at.column] = entry<product>(lanes[lane].a, i);
    }
    for (int i = 0; i < 8 * kDepth / kLanes; ++i) {
      const Place at = tf32 ? b_of_tf32(lane, i) : b_of_16_bits(lane, i);
      b[at.row][at.column] = entry<product>(lanes[lane].b, i);
    }
  }
  double sums[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    double sum[8] = {};  // in registers
    for (int depth = 0; depth < kDepth; ++depth)
      for (int column = 0; column < 8; ++column) sum[column] += a[row][depth] * b[depth][column];
    std::memcpy(sums[row], sum, sizeof(sum));
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const Place at = c_of_float32(lane, i);
      float& d = lanes[lane].d[i];
      d = static_cast<float>(d + sums[at.row][at.column]);
    }
}

}  // namespace

Product product_of(const char* shape_and_types) {
  if (std::strcmp(shape_and_types, "m16n8k16.row.col.f32.f16.f16.f32") == 0)
    return Product::kFloat16;
  if (std::strcmp(shape_and_types, "m16n8k16.row.col.f32.bf16.bf16.f32") == 0)
    return Product::kBFloat16;
  if (std::strcmp(shape_and_types, "m16n8k8.row.col.f32.tf32.tf32.f32") == 0) return Product::kTf32;
  throw std::runtime_error(std::string("on_host: no mma is written for ") + shape_and_types);
}

void run_product(Product product, const ProductRegisters (&lanes)[kLanes]) {
  switch (product) {
    case Product::kFloat16: return run<Product::kFloat16>(lanes);
    case Product::kBFloat16: return run<Product::kBFloat16>(lanes);
    case Product::kTf32: return run<Product::kTf32>(lanes);
  }
}

void run_transpose(uint32_t (&lanes)[kLanes]) {
  uint32_t matrix[8][8];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 2; ++i)
      matrix[lane / 4][2 * (lane % 4) + i] = (lanes[lane] >> (16 * i)) & 0xffffu;
  for (int lane = 0; lane < kLanes; ++lane)
    lanes[lane] = matrix[2 * (lane % 4)][lane / 4] | matrix[2 * (lane % 4) + 1][lane / 4] << 16;
}

}  // namespace on_host
