// The steps of a pass in the order in which forward runs them.
#pragma once

#include <algorithm>

#include "../core/args.h"
#include "../core/target.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

struct StepRows {
  int64_t first_row, rows;
  int64_t before;  // rows [0, before) have a step before this one; the others enter here
  int64_t after;   // rows [0, after) have a step after this one; the others end here
};

class Schedule {
 public:
  template <class scalar_t>
  Schedule(const LayerArgs<scalar_t>& args, int64_t chunk_steps)
      : steps_(args.seq_len),
        chunk_steps_(chunk_steps),
        batch_(args.batch),
        sizes_(args.batch_sizes),
        offsets_(args.offsets),
        reverse_(args.reverse) {}

  int64_t steps() const { return steps_; }
  // Chunks of steps, counted in the order in which a pass takes them.
  int64_t chunks() const { return (steps_ + chunk_steps_ - 1) / chunk_steps_; }
  int64_t first_of(int64_t chunk) const { return chunk * chunk_steps_; }
  int64_t end_of(int64_t chunk) const { return std::min(steps_, first_of(chunk) + chunk_steps_); }
  StepRows at(int64_t order) const {
    const int64_t rows = rows_at(order);
    return {first_row(order), rows, order > 0 ? std::min(rows, rows_at(order - 1)) : 0,
            order + 1 < steps_ ? std::min(rows, rows_at(order + 1)) : 0};
  }
  // The rows of steps [begin, end), which lie together.
  StepRows all(int64_t begin, int64_t end) const {
    const int64_t low = std::min(first_row(begin), first_row(end - 1));
    const int64_t high =
        std::max(first_row(begin) + rows_at(begin), first_row(end - 1) + rows_at(end - 1));
    return {low, high - low, 0, 0};
  }
  // How many steps from `begin` on, below `end`, have the same rows.
  int64_t alike(int64_t begin, int64_t end) const {
    int64_t count = 1;
    while (begin + count < end && rows_at(begin + count) == rows_at(begin)) ++count;
    return count;
  }
  bool packed() const { return sizes_ != nullptr; }
  bool reverse() const { return reverse_; }
  int64_t time(int64_t order) const { return reverse_ ? steps_ - 1 - order : order; }

 private:
  int64_t rows_at(int64_t order) const { return sizes_ ? sizes_[time(order)] : batch_; }
  int64_t first_row(int64_t order) const {
    return sizes_ ? offsets_[time(order)] : time(order) * batch_;
  }

  int64_t steps_, chunk_steps_, batch_;
  const int64_t *sizes_, *offsets_;
  bool reverse_;
};

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
