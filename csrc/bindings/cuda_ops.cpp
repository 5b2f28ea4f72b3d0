#include "cuda_ops.h"

#include <array>
#include <atomic>
#include <chrono>

#include "cuda_context.h"
#include "lengths_calls.h"

namespace rnnfast {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

std::atomic<int> wished_launch{-1}, wished_kernel{-1};

struct LastCudaRun {
  int64_t runs = 0, time = 0;
  CudaChoice choice{};
  int capability = 0;
  bool tf32 = false;
};
thread_local LastCudaRun last_run;

void refuse_packed(const OptionalTensor& packed) {
  if (packed) fail("packed weights are for the CPU engine, got x on a CUDA device");
}

Shape shape_of(const CheckedLayer& layer, int64_t cell, size_t itemsize) {
  Shape shape{id_of_code(cell),  layer.seq_len,     layer.batch, layer.input_size,
              layer.hidden_size, layer.output_size, layer.rows,  static_cast<int>(itemsize)};
  shape.drops_h = layer.drops_h;
  return shape;
}

// Runs passes of one dtype: the choice, the room, the streams, the engine.
template <class Args, class Room, class Run>
void run(const std::vector<Args>& passes, const std::vector<Shape>& shapes,
         const CheckedLayer& layer, bool chained, bool backward, bool saves, const Room& room_of,
         const Run& engine) {
  const Place place = layer.place;
  const bool tf32 = layer.dtype == ScalarType::Float && ask_torch_for_tf32();
  CudaContext context(place);
  const CudaDevice device = context.device();
  const std::string why = why_not_cuda(device);
  if (!why.empty()) fail(why);
  const int count = static_cast<int>(passes.size()), cell = shapes[0].cell;
  const Group group{shapes.data(), count, chained, backward};
  const CudaWish wish{wished_launch, wished_kernel, tf32};
  if (wish.kernel == static_cast<int>(CudaKernel::kOnchip)) {
    std::string forced = why_not_onchip(group, device, tf32);
    // What forward keeps is for a backward that must be able to run.
    if (forced.empty() && saves)
      forced = why_not_onchip({shapes.data(), count, chained, true}, device, tf32);
    if (!forced.empty()) fail(forced + " (use_engine forces the on-chip kernel)");
  }
  const CudaChoice choice = choose_cuda(group, device, wish);
  const Tensor room = empty({room_of(cell, choice, passes.data(), count)}, ScalarType::Byte, place);
  const CudaStream* streams = context.streams(choice.streams);
  engine({cell, choice, context.blas(tf32), streams, out<char>(room)}, passes.data(), count,
         chained);
  context.finish();
  const int64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(
                          std::chrono::steady_clock::now().time_since_epoch())
                          .count();
  last_run = {last_run.runs + 1, now, choice, device.capability, tf32};
}

template <class Call>
std::vector<Shape> shapes_of(const std::vector<Call>& calls, int64_t cell, size_t itemsize) {
  std::vector<Shape> shapes;
  for (const Call& call : calls) shapes.push_back(shape_of(call.layer, cell, itemsize));
  return shapes;
}

void run_forward(std::vector<ForwardCall>& calls, int64_t cell, bool chained) {
  if (calls[0].layer.empty()) return;
  with_type(calls[0].layer.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    std::vector<ForwardArgs<scalar_t>> passes;
    for (ForwardCall& call : calls) {
      call.layer.space_rows_evenly();
      passes.push_back(call.args<scalar_t>());
    }
    run(passes, shapes_of(calls, cell, sizeof(scalar_t)), calls[0].layer, chained, false,
        calls[0].save, forward_room<scalar_t>, cuda_forward<scalar_t>);
  });
}

void run_backward(std::vector<BackwardCall>& calls, int64_t cell, bool chained) {
  if (calls[0].layer.empty()) {
    for (const BackwardCall& call : calls) call.fill_zeros();
    return;
  }
  with_type(calls[0].layer.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    std::vector<BackwardArgs<scalar_t>> passes;
    for (BackwardCall& call : calls) {
      call.layer.space_rows_evenly();
      passes.push_back(call.args<scalar_t>());
    }
    run(passes, shapes_of(calls, cell, sizeof(scalar_t)), calls[0].layer, chained, true, false,
        backward_room<scalar_t>, cuda_backward<scalar_t>);
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

int64_t cuda_set_launch(int64_t launch) {
  if (launch < -1 || launch > 1)
    fail("launch must be -1 (automatic), 0 (plain) or 1 (pdl), got " + std::to_string(launch));
  return wished_launch.exchange(static_cast<int>(launch));
}

int64_t cuda_set_kernel(int64_t kernel) {
  if (kernel < -1 || kernel > 1)
    fail("kernel must be -1 (automatic), 0 (step) or 1 (onchip), got " + std::to_string(kernel));
  return wished_kernel.exchange(static_cast<int>(kernel));
}

int64_t cuda_last_run(int64_t field) {
  switch (field) {
    case 0: return last_run.runs;
    case 1: return last_run.time;
    case 2: return static_cast<int64_t>(last_run.choice.launch);
    case 3: return last_run.choice.streams;
    case 4: return last_run.capability;
    case 5: return last_run.tf32;
    case 6:
      return static_cast<int64_t>(last_run.choice.tile ? CudaKernel::kOnchip : CudaKernel::kStep);
  }
  fail(
      "field must be 0 (runs), 1 (time), 2 (launch), 3 (streams), 4 (compute capability), 5 (TF32) "
      "or 6 (kernel), got " +
      std::to_string(field));
}

}  // namespace rnnfast
