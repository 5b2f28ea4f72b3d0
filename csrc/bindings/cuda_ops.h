// The operators on CUDA tensors: functions with the schemas of layer_ops.cpp, lengths_ops.cpp,
// group_ops.cpp, masked_ops.cpp, scan_ops.cpp and batch_norm_ops.cpp.
#pragma once

#include "batch_norm_calls.h"
#include "group_calls.h"

namespace rnnfast {

ForwardResult cuda_forward_op(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                              Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                              OptionalTensor w_hr, OptionalTensor batch_sizes, OptionalTensor reset,
                              OptionalTensor packed, int64_t cell, bool reverse, bool save);
BackwardResult cuda_backward_op(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                OptionalTensor w_hr, OptionalTensor batch_sizes,
                                OptionalTensor reset, Tensor y, Tensor saved, int64_t cell,
                                bool reverse, int64_t needs);
ForwardResult cuda_forward_lengths_op(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                      Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                      OptionalTensor w_hr, Tensor lengths, OptionalTensor reset,
                                      OptionalTensor packed, int64_t cell, bool reverse, bool save);
BackwardResult cuda_backward_lengths_op(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                        Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                        Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                        OptionalTensor w_hr, Tensor lengths, OptionalTensor reset,
                                        Tensor y, Tensor saved, int64_t cell, bool reverse,
                                        int64_t needs);
ForwardResult cuda_forward_masked_op(Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                     Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                     OptionalTensor w_hr, OptionalTensor batch_sizes,
                                     OptionalTensor reset, OptionalTensor zone,
                                     OptionalTensor h_kept, OptionalTensor packed, double keep_h,
                                     double keep_c, double h_scale, int64_t cell, bool reverse,
                                     bool save);
BackwardResult cuda_backward_masked_op(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                       Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                       Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                       OptionalTensor w_hr, OptionalTensor batch_sizes,
                                       OptionalTensor reset, OptionalTensor zone,
                                       OptionalTensor h_kept, Tensor y, Tensor saved, double keep_h,
                                       double keep_c, double h_scale, int64_t cell, bool reverse,
                                       int64_t needs);
GateGradients cuda_gate_gradients_op(OptionalTensor dy, OptionalTensor dh_n, OptionalTensor dc_n,
                                     Tensor x, OptionalTensor h0, OptionalTensor c0, Tensor w_ih,
                                     Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                                     OptionalTensor w_hr, OptionalTensor batch_sizes,
                                     OptionalTensor reset, Tensor y, Tensor saved, int64_t cell,
                                     bool reverse);
std::vector<Tensor> cuda_forward_group_op(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                          int64_t cell, bool chained, bool save, int64_t heads);
std::vector<Tensor> cuda_backward_group_op(Tensor x, Tensors passes, OptionalTensor batch_sizes,
                                           int64_t cell, bool chained, std::vector<int64_t> needs,
                                           int64_t heads);
Tensor cuda_scan_op(Tensor a, Tensor b, OptionalTensor h0, bool reverse);
std::tuple<Tensor, Tensor, Tensor> cuda_scan_backward_op(Tensor dh, Tensor a, Tensor h,
                                                         OptionalTensor h0, bool reverse,
                                                         int64_t needs);

struct OnCuda {
  template <class Args>
  static void run(const CheckedLayer& layer, const Args& args);
};
using CudaBatchNormOps = BatchNormOps<OnCuda>;

// The wished Launch of the process (-1: the library's choice). Gives the wish before.
int64_t cuda_set_launch(int64_t launch);
// The wished CudaKernel, likewise. A call that it can't run fails.
int64_t cuda_set_kernel(int64_t kernel);
// Of this thread's last call: 0 runs, 1 nanoseconds of the steady clock, 2 launch, 3 streams,
// 4 compute capability, 5 whether products used TF32, 6 kernel.
int64_t cuda_last_run(int64_t field);

}  // namespace rnnfast
