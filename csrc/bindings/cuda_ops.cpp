#include "cuda_ops.h"

#include <array>

#include "cuda_run.h"
#include "lengths_calls.h"

namespace rnnfast {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

void refuse_packed(const OptionalTensor& packed) {
  if (packed) fail("packed weights are for the CPU engine, got x on a CUDA device");
}

template <template <class> class Args, class scalar_t, class Call, class Room, class Engine>
void run(std::vector<Call>& calls, int64_t cell, bool chained, bool backward, bool saves,
         const Room& room_of, const Engine& engine) {
  const CheckedLayer& layer = calls[0].layer;
  CudaPasses passes{{}, layer.dtype, layer.place, chained, backward, saves};
  std::vector<Args<scalar_t>> args;
  for (Call& call : calls) {
    call.layer.space_rows_evenly();
    args.push_back(call.template args<scalar_t>());
    passes.shapes.push_back(cuda_shape(call.layer, cell, sizeof(scalar_t)));
  }
  const int count = static_cast<int>(args.size());
  run_on_cuda(
      passes,
      [&](const CudaChoice& choice) {
        return room_of(id_of_code(cell), choice, args.data(), count);
      },
      [&](const CudaCall& call) { engine(call, args.data(), count, chained); });
}

void run_forward(std::vector<ForwardCall>& calls, int64_t cell, bool chained) {
  if (calls[0].layer.empty()) return;
  with_type(calls[0].layer.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    run<ForwardArgs, scalar_t>(calls, cell, chained, false, calls[0].save, forward_room<scalar_t>,
                               cuda_forward<scalar_t>);
  });
}

void run_backward(std::vector<BackwardCall>& calls, int64_t cell, bool chained) {
  if (calls[0].layer.empty()) {
    for (const BackwardCall& call : calls) call.fill_zeros();
    return;
  }
  with_type(calls[0].layer.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    run<BackwardArgs, scalar_t>(calls, cell, chained, true, false, backward_room<scalar_t>,
                                cuda_backward<scalar_t>);
  });
}

ForwardResult forward_pass(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                           const OptionalTensor& packed, int64_t cell, bool reverse, bool save,
                           int64_t saved_rows) {
  refuse_packed(packed);
  std::vector<ForwardCall> calls;
  calls.emplace_back(x, d, batch_sizes, false, cell, reverse, save, nullptr, saved_rows);
  run_forward(calls, cell, false);
  return calls[0].result;
}

BackwardResult backward_pass(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                             const Incoming& in, int64_t cell, bool reverse) {
  std::vector<BackwardCall> calls;
  calls.emplace_back(x, d, batch_sizes, in, cell, reverse);
  run_backward(calls, cell, false);
  return calls[0].result;
}

// Rows copied by torch's operators, on the device.
class DeviceRows {
 public:
  DeviceRows(const ValidRows& valid, const Tensor& x) : steps_(valid.steps), batch_(valid.batch) {
    std::vector<int64_t> step, column;
    for (int64_t t = 0; t < valid.steps; ++t)
      for (int64_t row = 0; row < valid.sizes[t]; ++row) {
        step.push_back(t);
        column.push_back(valid.order[row]);
      }
    at_ = {numbers_beside(x, step), numbers_beside(x, column)};
  }

  Tensor pack(const Tensor& padded) const {
    std::array<StableIValue, 2> stack{from(padded), from(at_)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::index", "Tensor", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  }

  Tensor pad(const Tensor& rows) const {
    const Tensor padded = empty({steps_, batch_, rows.size(1)}, rows.scalar_type(), place_of(rows));
    fill_zero(padded);
    std::array<StableIValue, 4> stack{from(padded), from(at_), from(rows), from(false)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::index_put_", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  }

 private:
  int64_t steps_, batch_;
  Tensors at_;  // step and column of each row
};

struct Cuda {
  using Rows = DeviceRows;
  static constexpr auto forward = forward_pass;
  static constexpr auto backward = backward_pass;
};

}  // namespace

ForwardResult cuda_forward_op(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                              Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                              OptionalTensor w_hr, OptionalTensor batch_sizes, OptionalTensor reset,
                              OptionalTensor packed, int64_t cell, bool reverse, bool save) {
  return forward_pass(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, batch_sizes, packed, cell,
                      reverse, save, 0);
}

BackwardResult cuda_backward_op(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                OptionalTensor w_hr, OptionalTensor batch_sizes,
                                OptionalTensor reset, Tensor y, Tensor saved, int64_t cell,
                                bool reverse, int64_t needs) {
  return backward_pass(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, batch_sizes,
                       {dy, dh_n, dc_n, y, saved, needs}, cell, reverse);
}

ForwardResult cuda_forward_lengths_op(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                      Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                      OptionalTensor w_hr, Tensor lengths, OptionalTensor reset,
                                      OptionalTensor packed, int64_t cell, bool reverse,
                                      bool save) {
  return forward_with_lengths<Cuda>(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, lengths,
                                    packed, cell, reverse, save);
}

BackwardResult cuda_backward_lengths_op(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                        Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                        Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                        OptionalTensor w_hr, Tensor lengths, OptionalTensor reset,
                                        Tensor y, Tensor saved, int64_t cell, bool reverse,
                                        int64_t needs) {
  return backward_with_lengths<Cuda>(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, lengths,
                                     {dy, dh_n, dc_n, y, saved, needs}, cell, reverse);
}

ForwardResult cuda_forward_masked_op(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                     Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                     OptionalTensor w_hr, OptionalTensor batch_sizes,
                                     OptionalTensor reset, OptionalTensor zone,
                                     OptionalTensor h_kept, OptionalTensor packed, double keep_h,
                                     double keep_c, double h_scale, int64_t cell, bool reverse,
                                     bool save) {
  const MaskTensors masks{zone, h_kept, keep_h, keep_c, h_scale};
  return forward_pass(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset, masks}, batch_sizes, packed,
                      cell, reverse, save, 0);
}

BackwardResult cuda_backward_masked_op(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                       Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                       Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                       OptionalTensor w_hr, OptionalTensor batch_sizes,
                                       OptionalTensor reset, OptionalTensor zone,
                                       OptionalTensor h_kept, Tensor y, Tensor saved, double keep_h,
                                       double keep_c, double h_scale, int64_t cell, bool reverse,
                                       int64_t needs) {
  const MaskTensors masks{zone, h_kept, keep_h, keep_c, h_scale};
  return backward_pass(x, {h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset, masks}, batch_sizes,
                       {dy, dh_n, dc_n, y, saved, needs}, cell, reverse);
}

GateGradients cuda_gate_gradients_op(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                     Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                     Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                     OptionalTensor w_hr, OptionalTensor batch_sizes,
                                     OptionalTensor reset, Tensor y, Tensor saved, int64_t cell,
                                     bool reverse) {
  std::vector<BackwardCall> calls;
  calls.emplace_back(x, Pass{h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reset}, batch_sizes,
                     Incoming{dy, dh_n, dc_n, y, saved, kDh0 | kDc0, true}, cell, reverse);
  run_backward(calls, cell, false);
  return gates_of(calls[0]);
}

std::vector<Tensor> cuda_forward_group_op(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                          int64_t cell, bool chained, bool save, int64_t heads) {
  auto calls = forward_calls(x, passes, batch_sizes, cell, chained, heads, save, kNeverReuse);
  for (size_t i = 0; i < calls.size(); ++i) refuse_packed(passes[kOfForward * i + 8]);
  run_forward(calls, cell, chained);
  std::vector<Tensor> results;
  for (const ForwardCall& call : calls) append(results, call.result);
  return results;
}

std::vector<Tensor> cuda_backward_group_op(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                           int64_t cell, bool chained, std::vector<int64_t> needs,
                                           int64_t heads) {
  const BackwardGroup group(x, passes, batch_sizes, cell, chained, heads, needs);
  auto calls = group.calls(kNeverReuse);
  run_backward(calls, cell, chained);
  std::vector<Tensor> results;
  for (int i = 0; i < group.count(); ++i) append(results, calls[group.nth(i)].result);
  return results;
}

}  // namespace rnnfast
