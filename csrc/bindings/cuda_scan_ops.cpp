// The operators of a scan, on CUDA tensors.
#include "cuda_context.h"
#include "cuda_ops.h"
#include "scan_calls.h"

namespace rnnfast {
namespace {

const auto on_device = [](const ScanCall& call, const auto& args) {
  CudaContext context(call.place);
  const std::string why = why_not_cuda(context.device());
  if (!why.empty()) fail(why);
  const Tensor room = empty({scan_room(args)}, ScalarType::Byte, call.place);
  cuda_scan(args, context.streams(1)[0].stream, out<char>(room));
  context.finish();
};

}  // namespace

Tensor cuda_scan_op(Tensor a, Tensor b, OptionalTensor h0, bool reverse) {
  return scan_by(a, b, h0, reverse, on_device);
}

std::tuple<Tensor, Tensor, Tensor> cuda_scan_backward_op(Tensor dh, Tensor a, Tensor h,
                                                         OptionalTensor h0, bool reverse,
                                                         int64_t needs) {
  return scan_backward_by(dh, a, h, h0, reverse, needs, on_device);
}

}  // namespace rnnfast
