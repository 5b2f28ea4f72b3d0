// The operators that run one direction of a layer over padded input with lengths, and their kernels
// on the CPU.
#include <algorithm>
#include <cstring>

#include "cpu_calls.h"
#include "lengths_calls.h"

namespace rnnfast {
namespace {

// Rows copied in the host's memory.
class HostRows {
 public:
  HostRows(const ValidRows& valid, const Tensor& x) : valid_(valid), place_(place_of(x)) {
    first_.resize(valid.steps + 1);
    for (int64_t t = 0; t < valid.steps; ++t) first_[t + 1] = first_[t] + valid.sizes[t];
  }

  Tensor pack(const Tensor& padded) const {
    const bool features = padded.dim() == 3;
    const Tensor from = features ? unit_stride(padded) : padded;
    const ScalarType dtype = from.scalar_type();
    const Tensor to = features ? empty({valid_.count, from.size(2)}, dtype, place_)
                               : empty({valid_.count}, dtype, place_);
    const int64_t size = from.element_size(), bytes = (features ? from.size(2) : 1) * size,
                  step = from.stride(0) * size, column = from.stride(1) * size;
    const char* read = static_cast<const char*>(from.const_data_ptr());
    char* write = out<char>(to);
    over_steps(bytes, [=, this](int64_t t) {
      for (int64_t row = 0; row < valid_.sizes[t]; ++row)
        std::memcpy(write + (first_[t] + row) * bytes, read + t * step + valid_.order[row] * column,
                    bytes);
    });
    return to;
  }

  Tensor pad(const Tensor& rows) const {
    const Tensor to = empty({valid_.steps, valid_.batch, rows.size(1)}, rows.scalar_type(), place_);
    const int64_t bytes = rows.size(1) * static_cast<int64_t>(rows.element_size());
    const char* read = static_cast<const char*>(rows.const_data_ptr());
    char* write = out<char>(to);
    over_steps(bytes, [=, this](int64_t t) {
      for (int64_t row = 0; row < valid_.batch; ++row) {
        char* into = write + (t * valid_.batch + valid_.order[row]) * bytes;
        if (row < valid_.sizes[t])
          std::memcpy(into, read + (first_[t] + row) * bytes, bytes);
        else
          std::memset(into, 0, bytes);
      }
    });
    return to;
  }

 private:
  // Bytes that a thread copies in about the time that it takes to wake another.
  static constexpr int64_t kGrain = 256 << 10;

  template <class Copy>
  void over_steps(int64_t bytes, const Copy& copy) const {
    if (bytes == 0) return;
    const int64_t grain = std::max<int64_t>(1, kGrain / (valid_.batch * bytes));
    torch::stable::parallel_for(0, valid_.steps, grain, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) copy(t);
    });
  }

  const ValidRows& valid_;
  Place place_;
  std::vector<int64_t> first_;  // row of each step
};

struct Cpu {
  using Rows = HostRows;
  static constexpr auto forward = cpu_forward;
  static constexpr auto backward = cpu_backward;
};

ForwardResult forward_lengths(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                              Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                              OptionalTensor w_hr, Tensor lengths, OptionalTensor reset,
                              OptionalTensor packed, int64_t cell, bool reverse, bool save) {
  return forward_with_lengths<Cpu>(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, lengths,
                                   packed, cell, reverse, save);
}

BackwardResult backward_lengths(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                OptionalTensor w_hr, Tensor lengths, OptionalTensor reset, Tensor y,
                                Tensor saved, int64_t cell, bool reverse, int64_t needs) {
  return backward_with_lengths<Cpu>(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, lengths,
                                    {dy, dh_n, dc_n, y, saved, needs}, cell, reverse);
}

// A copy of the values as int64, on their device.
Tensor checked_lengths(Tensor lengths, int64_t steps) {
  check_lengths(lengths, std::nullopt);
  return numbers_beside(lengths, read_lengths(lengths, steps));
}

}  // namespace
}  // namespace rnnfast

// The lengths are read on the host, so no CUDA graph may hold these operators. The stable ABI of
// torch 2.10 knows no tags: rnnfast/_lengths.py says so to the compiler.
STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def(
      "forward_lengths(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? w_hr, Tensor lengths, Tensor? reset, Tensor? packed, int cell, bool "
      "reverse, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward_lengths(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor lengths, Tensor? "
      "reset, Tensor y, Tensor saved, int cell, bool reverse, int needs) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("checked_lengths(Tensor lengths, SymInt steps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("forward_lengths", TORCH_BOX(&rnnfast::forward_lengths));
  m.impl("backward_lengths", TORCH_BOX(&rnnfast::backward_lengths));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("checked_lengths", TORCH_BOX(&rnnfast::checked_lengths));
}
