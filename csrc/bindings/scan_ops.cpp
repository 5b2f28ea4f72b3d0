// The operators of a scan, on the CPU.
#include "cpu_calls.h"
#include "scan_calls.h"

namespace rnnfast {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Tensor scan(Tensor a, Tensor b, OptionalTensor h0, bool reverse) {
  const ScanCall call(a, b, "b", h0, reverse);
  const Tensor h = call.result();
  if (call.empty()) return h;
  with_type(call.dtype,
            [&](auto scalar) { run_scan(call.args<decltype(scalar)>(h), torch_threads()); });
  return h;
}

Gradients scan_backward(Tensor dh, Tensor a, Tensor h, OptionalTensor h0, bool reverse,
                        int64_t needs) {
  const ScanCall call(a, dh, "dh", h0, reverse);
  call.check_h(h);
  const ScanGradients to{call.result(needs & kNeedsA), call.result(needs & kNeedsB),
                         call.state(needs & kNeedsH0)};
  const Tensor contiguous_h = torch_contiguous(h);
  if (call.empty()) {
    if (needs & kNeedsH0) fill_zero(to.dh0);
  } else {
    with_type(call.dtype, [&](auto scalar) {
      run_scan(call.args<decltype(scalar)>(contiguous_h, to, needs), torch_threads());
    });
  }
  return {to.da, to.db, to.dh0};
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("scan(Tensor a, Tensor b, Tensor? h0, bool reverse) -> Tensor");
  m.def(
      "scan_backward(Tensor dh, Tensor a, Tensor h, Tensor? h0, bool reverse, int needs) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("scan", TORCH_BOX(&rnnfast::scan));
  m.impl("scan_backward", TORCH_BOX(&rnnfast::scan_backward));
}
