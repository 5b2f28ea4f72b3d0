// The scan's operators as checked arguments, for the CPU and for CUDA.
#pragma once

#include <tuple>

#include "../core/scan_args.h"
#include "results.h"

namespace rnnfast {

using ScanResult = std::tuple<Tensor, Tensor, Tensor>;

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

// The operators, by run(call, arguments of the engine).
template <class Run>
Tensor scan_by(const Tensor& a, const Tensor& b, const OptionalTensor& h0, bool reverse,
               const Run& run) {
  const ScanCall call(a, b, "b", h0, reverse);
  const Tensor h = call.result();
  if (call.empty()) return h;
  with_type(call.dtype, [&](auto scalar) { run(call, call.args<decltype(scalar)>(h)); });
  return h;
}

template <class Run>
ScanResult scan_backward_by(const Tensor& dh, const Tensor& a, const Tensor& h,
                            const OptionalTensor& h0, bool reverse, int64_t needs, const Run& run) {
  const ScanCall call(a, dh, "dh", h0, reverse);
  call.check_h(h);
  const ScanGradients to{call.result(needs & kNeedsA), call.result(needs & kNeedsB),
                         call.state(needs & kNeedsH0)};
  const Tensor contiguous_h = torch_contiguous(h);
  if (call.empty()) {
    if (needs & kNeedsH0) fill_zero(to.dh0);
  } else {
    with_type(call.dtype, [&](auto scalar) {
      run(call, call.args<decltype(scalar)>(contiguous_h, to, needs));
    });
  }
  return {to.da, to.db, to.dh0};
}

}  // namespace rnnfast
