// The operator that gives every sample of a batch a gradient of its own.
#include "cpu_calls.h"

namespace rnnfast {
namespace {

void check_rows(const char* name, const Tensor& tensor, ScalarType dtype, const char* letters) {
  if (!tensor.is_cpu() || tensor.scalar_type() != dtype || tensor.dim() != 3)
    fail(std::string(name) + " must be a float32 or float64 CPU tensor " + letters + ", got " +
         shape_text(tensor));
}

// left (T, V*B, M) and right (T, V*B, N): sum over T and B of left^T . right for each of V samples.
Tensor sample_product(Tensor left, Tensor right, int64_t samples) {
  const ScalarType dtype = left.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double)
    fail("left must be a float32 or float64 CPU tensor (T, V*B, M), got another type");
  check_rows("left", left, dtype, "(T, V*B, M)");
  check_rows("right", right, dtype, "(T, V*B, N) of left's type");
  if (samples < 1 || left.size(1) % samples)
    fail("samples must divide V*B = " + std::to_string(left.size(1)) + ", got " +
         std::to_string(samples));
  check_shape("right", right, "(T, V*B, N)", {left.size(0), left.size(1), right.size(2)});
  const Tensor a = torch_contiguous(left), b = torch_contiguous(right);
  const Tensor result = empty({samples, a.size(2), b.size(2)}, dtype, place_of(a));
  if (a.size(0) * a.size(1) == 0) {
    fill_zero(result);
    return result;
  }
  if (a.size(2) * b.size(2) == 0) return result;
  const auto run = [&](auto scalar) {
    using scalar_t = decltype(scalar);
    run_sample_product<scalar_t>(
        {a.size(0), samples, a.size(1) / samples, a.size(2), b.size(2),
         static_cast<const scalar_t*>(a.const_data_ptr()),
         static_cast<const scalar_t*>(b.const_data_ptr()), out<scalar_t>(result)},
        torch_threads());
  };
  dtype == ScalarType::Float ? run(float{}) : run(double{});
  return result;
}

}  // namespace
}  // namespace rnnfast

STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, m) {
  m.def("sample_product(Tensor left, Tensor right, int samples) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
  m.impl("sample_product", TORCH_BOX(&rnnfast::sample_product));
}
