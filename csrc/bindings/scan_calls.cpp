#include "scan_calls.h"

namespace rnnfast {
namespace {

// All rows of a step without gaps, so that they are one.
bool is_even(const Tensor& tensor) {
  return tensor.size(1) == 1 || tensor.stride(1) == tensor.size(2);
}

template <class scalar_t>
Rows<const scalar_t> rows_of(const Tensor& tensor) {
  return {static_cast<const scalar_t*>(tensor.const_data_ptr()), tensor.stride(0),
          tensor.stride(1)};
}

}  // namespace

ScanCall::ScanCall(const Tensor& a, const Tensor& b, const char* name_of_b,
                   const OptionalTensor& h0, bool reverse)
    : dtype(checked_dtype("a", a)), place(place_of(a)), a_(a), b_(b), h0_(h0), reverse_(reverse) {
  if (a.dim() != 3) fail("a must have shape (T, B, H), got " + shape_text(a));
  check_memory("a", a);
  const auto check_like_a = [&](const char* name, const Tensor& tensor) {
    if (place_of(tensor) != place) fail(std::string(name) + " must be on the same device as a");
    if (tensor.scalar_type() != dtype)
      fail(std::string(name) + " must have the dtype of a, " + dtype_text(dtype) + ", got " +
           dtype_text(tensor.scalar_type()));
    check_memory(name, tensor);
  };
  seq_len_ = a.size(0);
  rows_ = a.size(1);
  columns_ = a.size(2);
  check_like_a(name_of_b, b);
  check_shape(name_of_b, b, "(T, B, H)", {seq_len_, rows_, columns_});
  if (h0_) {
    check_like_a("h0", *h0_);
    check_shape("h0", *h0_, "(B, H)", {rows_, columns_});
    h0_ = torch_contiguous(*h0_);
  }
  a_ = unit_stride(a_);
  b_ = unit_stride(b_);
}

void ScanCall::check_h(const Tensor& h) const {
  if (place_of(h) != place) fail("h must be on the same device as a");
  if (h.scalar_type() != dtype)
    fail(std::string("h must have the dtype of a, ") + dtype_text(dtype) + ", got " +
         dtype_text(h.scalar_type()));
  check_shape("h", h, "(T, B, H)", {seq_len_, rows_, columns_});
  check_memory("h", h);
}

Tensor ScanCall::result(bool wanted) const {
  if (!wanted) return rnnfast::empty({0}, dtype, place);
  return rnnfast::empty({seq_len_, rows_, columns_}, dtype, place);
}

Tensor ScanCall::state(bool wanted) const {
  if (!wanted) return rnnfast::empty({0}, dtype, place);
  return rnnfast::empty({rows_, columns_}, dtype, place);
}

template <class Args>
Args ScanCall::shape(bool with_h) const {
  using scalar_t = typename Args::scalar_t;
  Args args{};
  const bool even = is_even(a_) && is_even(b_);
  args.seq_len = seq_len_;
  args.rows = even ? 1 : rows_;
  args.columns = even ? rows_ * columns_ : columns_;
  args.reverse = reverse_;
  args.a = rows_of<scalar_t>(a_);
  args.h0 = with_h && h0_ ? static_cast<const scalar_t*>(h0_->const_data_ptr()) : nullptr;
  return args;
}

template <class scalar_t>
ScanArgs<scalar_t> ScanCall::args(const Tensor& h) const {
  auto args = shape<ScanArgs<scalar_t>>(true);
  args.b = rows_of<scalar_t>(b_);
  args.h = out<scalar_t>(h);
  return args;
}

template <class scalar_t>
ScanBackwardArgs<scalar_t> ScanCall::args(const Tensor& h, const ScanGradients& to,
                                          int64_t needs) const {
  auto args = shape<ScanBackwardArgs<scalar_t>>(true);
  args.dh = rows_of<scalar_t>(b_);
  args.h = static_cast<const scalar_t*>(h.const_data_ptr());
  args.da = needs & kNeedsA ? out<scalar_t>(to.da) : nullptr;
  args.db = needs & kNeedsB ? out<scalar_t>(to.db) : nullptr;
  args.dh0 = needs & kNeedsH0 ? out<scalar_t>(to.dh0) : nullptr;
  return args;
}

#define RNNFAST_INSTANTIATE(scalar_t)                                                              \
  template ScanArgs<scalar_t> ScanCall::args(const Tensor&) const;                                 \
  template ScanBackwardArgs<scalar_t> ScanCall::args(const Tensor&, const ScanGradients&, int64_t) \
      const;
RNNFAST_INSTANTIATE(float)
RNNFAST_INSTANTIATE(double)
RNNFAST_INSTANTIATE(BFloat16)
RNNFAST_INSTANTIATE(Float16)

}  // namespace rnnfast
