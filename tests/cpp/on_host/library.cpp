// The CUDA operators on CPU tensors, as torch.ops.rnnfast_on_host: the engine, its host side and
// its bindings are the ones of _C_cuda; the device is on_host's.
#include <cstring>

#include "bindings/cuda_context.h"
#include "bindings/cuda_ops.h"
#include "device.h"

namespace rnnfast {

// In place of bindings/cuda_context.cpp.
bool ask_torch_for_tf32() { return on_host::settings.tf32; }
CudaContext::CudaContext(Place place) : place_(place) {
  handle_ = on_host::new_handle();
  on_host::launches_until_failure = on_host::settings.launches_until_failure;
  on_host::launches = on_host::dependent_launches = 0;
}
CudaContext::~CudaContext() {
  for (const CudaStream& stream : streams_) on_host::delete_queue(stream.stream);
  on_host::delete_handle(static_cast<on_host::Handle*>(handle_));
}
CudaDevice CudaContext::device() const {
  return {on_host::settings.capability, 132, on_host::settings.shared_bytes};
}
const CudaStream* CudaContext::streams(int count) {
  for (int i = 0; i < count; ++i) {
    streams_.push_back({on_host::new_queue()});
    if (count == 1) break;
    workspaces_.push_back(empty({256}, ScalarType::Byte, place_));
    streams_.back().workspace = workspaces_.back().mutable_data_ptr();
    streams_.back().workspace_bytes = 256;
  }
  on_host::begin_call(streams_[0].stream);
  on_host::blas_of(static_cast<on_host::Handle*>(handle_)).set_stream(handle_, streams_[0].stream);
  return streams_.data();
}
Blas CudaContext::blas(bool tf32) const {
  Blas blas = on_host::blas_of(static_cast<on_host::Handle*>(handle_));
  blas.tf32 = tf32;
  return blas;
}
void CudaContext::finish() {
  std::vector<on_host::Queue*> queues;
  for (const CudaStream& stream : streams_) queues.push_back(stream.stream);
  on_host::run_all(queues, on_host::settings.seed);
}

namespace {

// Field 0 seed of the order, 1 compute capability, 2 launches that succeed before one fails (-1:
// all), 3 torch's flag for TF32, 4 shared memory of a block. Gives what it was.
int64_t set(int64_t field, int64_t value) {
  on_host::Settings& now = on_host::settings;
  if (field == 0) return std::exchange(now.seed, static_cast<unsigned>(value));
  if (field == 1) return std::exchange(now.capability, static_cast<int>(value));
  if (field == 3) return std::exchange(now.tf32, value != 0);
  if (field == 4) return std::exchange(now.shared_bytes, static_cast<int>(value));
  return std::exchange(now.launches_until_failure, static_cast<int>(value));
}
// Launches of the last call: all (0), and those that are dependent (1).
int64_t launches(int64_t field) {
  return field == 0 ? on_host::launches : on_host::dependent_launches;
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY(rnnfast_on_host, m) {
  m.def(
      "forward(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? "
      "b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor? reset, Tensor? packed, int cell, bool "
      "reverse, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor "
      "w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor? "
      "reset, Tensor y, Tensor saved, int cell, bool reverse, int needs) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "forward_lengths(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? w_hr, Tensor lengths, Tensor? reset, Tensor? packed, int cell, bool "
      "reverse, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward_lengths(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor lengths, Tensor? "
      "reset, Tensor y, Tensor saved, int cell, bool reverse, int needs) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "forward_masked(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
      "Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, Tensor? reset, Tensor? zone, Tensor? "
      "h_kept, Tensor? packed, float keep_h, float keep_c, float h_scale, int cell, bool reverse, "
      "bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "backward_masked(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, "
      "Tensor? reset, Tensor? zone, Tensor? h_kept, Tensor y, Tensor saved, float keep_h, float "
      "keep_c, float h_scale, int cell, bool reverse, int needs) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gate_gradients(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? batch_sizes, "
      "Tensor? reset, Tensor y, Tensor saved, int cell, bool reverse) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "forward_group(Tensor x, Tensor?[] passes, Tensor? batch_sizes, int cell, bool chained, bool "
      "save, int heads=1) -> Tensor[]");
  m.def(
      "backward_group(Tensor x, Tensor?[] passes, Tensor? batch_sizes, int cell, bool chained, "
      "int[] needs, int heads=1) -> Tensor[]");
  m.def("scan(Tensor a, Tensor b, Tensor? h0, bool reverse) -> Tensor");
  m.def(
      "scan_backward(Tensor dh, Tensor a, Tensor h, Tensor? h0, bool reverse, int needs) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_forward(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor "
      "gain_ih, "
      "Tensor gain_hh, Tensor? bias, Tensor gain_c, Tensor bias_c, Tensor running_mean, Tensor "
      "running_var, Tensor? batch_sizes, bool training, float eps, bool save) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor h0, Tensor c0, "
      "Tensor w_ih, Tensor w_hh, Tensor gain_ih, Tensor gain_hh, Tensor? bias, Tensor gain_c, "
      "Tensor bias_c, "
      "Tensor? batch_sizes, Tensor y, Tensor mean, Tensor var, Tensor saved, bool training, float "
      "eps, bool needs_dx) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def("cuda_set_launch(int launch) -> int");
  m.def("cuda_set_kernel(int kernel) -> int");
  m.def("cuda_last_run(int field) -> int");
  m.def("set(int field, int value) -> int");
  m.def("launches(int field) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast_on_host, CompositeExplicitAutograd, m) {
  m.impl("cuda_set_launch", TORCH_BOX(&rnnfast::cuda_set_launch));
  m.impl("cuda_set_kernel", TORCH_BOX(&rnnfast::cuda_set_kernel));
  m.impl("cuda_last_run", TORCH_BOX(&rnnfast::cuda_last_run));
  m.impl("set", TORCH_BOX(&rnnfast::set));
  m.impl("launches", TORCH_BOX(&rnnfast::launches));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast_on_host, CPU, m) {
  m.impl("forward", TORCH_BOX(&rnnfast::cuda_forward_op));
  m.impl("backward", TORCH_BOX(&rnnfast::cuda_backward_op));
  m.impl("forward_lengths", TORCH_BOX(&rnnfast::cuda_forward_lengths_op));
  m.impl("backward_lengths", TORCH_BOX(&rnnfast::cuda_backward_lengths_op));
  m.impl("forward_masked", TORCH_BOX(&rnnfast::cuda_forward_masked_op));
  m.impl("backward_masked", TORCH_BOX(&rnnfast::cuda_backward_masked_op));
  m.impl("gate_gradients", TORCH_BOX(&rnnfast::cuda_gate_gradients_op));
  m.impl("forward_group", TORCH_BOX(&rnnfast::cuda_forward_group_op));
  m.impl("backward_group", TORCH_BOX(&rnnfast::cuda_backward_group_op));
  m.impl("scan", TORCH_BOX(&rnnfast::cuda_scan_op));
  m.impl("scan_backward", TORCH_BOX(&rnnfast::cuda_scan_backward_op));
  m.impl("batch_norm_forward", TORCH_BOX(&rnnfast::CudaBatchNormOps::forward));
  m.impl("batch_norm_backward", TORCH_BOX(&rnnfast::CudaBatchNormOps::backward));
}
