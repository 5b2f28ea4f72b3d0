// The scan's operators as checked arguments, for the CPU and for CUDA.
#pragma once

#include "../core/scan_args.h"
#include "results.h"

namespace rnnfast {

// Results, in the order of the bits of `needs`.
struct ScanGradients {
  Tensor da, db, dh0;
};
enum ScanNeeds : int64_t { kNeedsA = 1, kNeedsB = 2, kNeedsH0 = 4 };

class ScanCall {
 public:
  // `b` is b, or dh for the gradients.
  ScanCall(const Tensor& a, const Tensor& b, const char* name_of_b, const OptionalTensor& h0,
           bool reverse);

  ScalarType dtype;
  Place place;
  bool empty() const { return seq_len_ == 0 || rows_ == 0 || columns_ == 0; }
  Tensor result(bool wanted = true) const;
  Tensor state(bool wanted) const;  // as h0

  template <class scalar_t>
  ScanArgs<scalar_t> args(const Tensor& h) const;
  template <class scalar_t>
  ScanBackwardArgs<scalar_t> args(const Tensor& h, const ScanGradients& to, int64_t needs) const;
  void check_h(const Tensor& h) const;

 private:
  template <class Args>
  Args shape(bool with_h) const;

  Tensor a_, b_;
  OptionalTensor h0_;
  bool reverse_;
  int64_t seq_len_, rows_, columns_;
};

}  // namespace rnnfast
