// The `cell` argument of the operators: which cell, and the options that it is called with.
//   bits 0..7    id in cells/list.h
//   bits 8..15   activation of the gates, bits 16..23 that of the state; 0: the cell's own
//   bits 32..63  bound of the cell state as a float32; 0: none
// So an option goes wherever a cell goes, and a call without options is its id.
#pragma once

#include <cstdint>
#include <cstring>

namespace rnnfast {

// Numbered as in rnnfast/cells.py.
enum class Activation : int32_t {
  kOwn = 0,
  kSigmoid,
  kTanh,
  kRelu,
  kHardSigmoid,
  kHardTanh,
  kSoftsign,
  kElu,
  kSelu,
  kGelu,
  kSilu,
  kSoftplus,
  kLeakyRelu,
  kLinear,
};
constexpr int kNumActivations = static_cast<int>(Activation::kLinear);

struct CellOptions {
  Activation gate = Activation::kOwn, state = Activation::kOwn;
  float clip = 0;  // 0: none
};

constexpr int64_t kUnusedBits = int64_t{0xff} << 24;

constexpr int id_of_code(int64_t code) { return static_cast<int>(code & 0xff); }
// What is left of a code without its options.
constexpr bool has_options(int64_t code) { return (code & ~int64_t{0xff}) != 0; }

inline CellOptions options_of_code(int64_t code) {
  const auto bits = static_cast<uint32_t>(static_cast<uint64_t>(code) >> 32);
  CellOptions options{static_cast<Activation>(code >> 8 & 0xff),
                      static_cast<Activation>(code >> 16 & 0xff)};
  std::memcpy(&options.clip, &bits, sizeof(bits));
  return options;
}

}  // namespace rnnfast
