// Checked passes on their way into the CPU engine.
#pragma once

#include "../cpu/dispatch.h"
#include "layer_calls.h"

namespace rnnfast {

inline Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int count, void (*run)(long, long, void*), void* context) {
            torch::stable::parallel_for(
                0, count, 1, [&](int64_t begin, int64_t end) { run(begin, end, context); });
          }};
}

inline void check_packed(const OptionalTensor& packed) {
  if (packed && (!packed->is_cpu() || packed->scalar_type() != ScalarType::Byte ||
                 packed->dim() != 1 || !packed->is_contiguous()))
    fail("packed must be a uint8 CPU tensor as pack returned it, got one of shape " +
         shape_text(*packed));
}

// Arguments of a call that computes with packed weights, or without.
template <class scalar_t>
ForwardArgs<scalar_t> cpu_args(const ForwardCall& call, const OptionalTensor& packed, Isa isa,
                               int64_t cell, WeightFormat& format) {
  auto args = call.args<scalar_t>();
  format = WeightFormat::kPlain;
  if (packed &&
      !take_packed(isa, id_of_code(cell), static_cast<const char*>(packed->const_data_ptr()),
                   packed->numel(), args, format))
    fail(std::string("packed was made for another ISA, dtype, cell or size of weights than ") +
         call.layer.cell.name + " on " + isa_name(isa) + "; call pack again");
  return args;
}

// Of float32 and float64.
inline void run_on_cpu(const BackwardCall& call, int64_t cell) {
  const auto run = [&](auto scalar) {
    run_backward(active_isa(), id_of_code(cell), call.args<decltype(scalar)>(), torch_threads());
  };
  if (call.layer.empty())
    call.fill_zeros();
  else if (call.layer.dtype == ScalarType::Float)
    run(float{});
  else
    run(double{});
}

// 16-bit numbers are widened once and their gradients rounded once; all between is float32.
BackwardResult backward_of_half(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                                const Incoming& in, int64_t cell, bool reverse);

// One pass, of any type. `saved_rows`: room in `saved` for more rows than there are.
ForwardResult cpu_forward(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                          const OptionalTensor& packed, int64_t cell, bool reverse, bool save,
                          int64_t saved_rows = 0);
BackwardResult cpu_backward(const Tensor& x, const Pass& d, const OptionalTensor& batch_sizes,
                            const Incoming& in, int64_t cell, bool reverse);

}  // namespace rnnfast
