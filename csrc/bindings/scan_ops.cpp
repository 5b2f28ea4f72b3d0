// The operators of a scan, on the CPU.
#include "cpu_calls.h"
#include "scan_calls.h"

namespace rnnfast {
namespace {

const auto on_cpu = [](const ScanCall&, const auto& args) { run_scan(args, torch_threads()); };

Tensor scan(Tensor a, Tensor b, OptionalTensor h0, bool reverse) {
  return scan_by(a, b, h0, reverse, on_cpu);
}

ScanResult scan_backward(Tensor dh, Tensor a, Tensor h, OptionalTensor h0, bool reverse,
                         int64_t needs) {
  return scan_backward_by(dh, a, h, h0, reverse, needs, on_cpu);
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
