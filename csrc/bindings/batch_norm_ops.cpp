// The operators of the LSTM with recurrent batch normalisation, on the CPU.
#include "../cpu/batch_norm_threads.h"
#include "batch_norm_calls.h"
#include "cpu_calls.h"

namespace rnnfast {
namespace {

struct OnCpu {
  template <class Args>
  static void run(const CheckedLayer&, const Args& args) {
    run_batch_norm(args, torch_threads());
  }
};

// What explain tells.
int64_t threads_of(int64_t batch, int64_t input_size, int64_t hidden_size, int64_t offered) {
  return batch_norm_threads(batch, input_size, hidden_size, static_cast<int>(offered));
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
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
  m.def("batch_norm_threads(int batch, int input_size, int hidden_size, int offered) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, m) {
  m.impl("batch_norm_threads", TORCH_BOX(&rnnfast::threads_of));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&rnnfast::BatchNormOps<rnnfast::OnCpu>::forward));
  m.impl("batch_norm_backward", TORCH_BOX(&rnnfast::BatchNormOps<rnnfast::OnCpu>::backward));
}
