// The `cell` argument of the operators: which cell, and the options that it is called with.
//   bits 0..7    id in cells/list.h
//   bits 8..15   activation of the gates, bits 16..23 that of the state; 0: the cell's own
//   bits 32..63  bound of the cell state as a float32; 0: none
// So an option goes wherever a cell goes, and a call without options is its id. A cell that
// rnnfast.load_cell compiled has kOwnCell in place of the id, and a hash of its header above it:
// the code is the same in every process, and the id (cell_info.h) is found by it.
#pragma once

#include <cstdint>
#include <cstring>

#include "cell_info.h"

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

constexpr int64_t kOwnCell = 0xff;
constexpr bool is_own_cell(int64_t code) { return (code & 0xff) == kOwnCell; }

inline int id_of_code(int64_t code) {
  return is_own_cell(code) ? own_cell_id(code) : static_cast<int>(code & 0xff);
}
// What is left of a code without its options.
constexpr bool has_options(int64_t code) {
  return (code & ~int64_t{0xff}) != 0 && !is_own_cell(code);
}

inline CellOptions options_of_code(int64_t code) {
  if (is_own_cell(code)) return {};
  const auto bits = static_cast<uint32_t>(static_cast<uint64_t>(code) >> 32);
  CellOptions options{static_cast<Activation>(code >> 8 & 0xff),
                      static_cast<Activation>(code >> 16 & 0xff)};
  std::memcpy(&options.clip, &bits, sizeof(bits));
  return options;
}

}  // namespace rnnfast
