#include "lengths_calls.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

namespace rnnfast {
namespace {

bool is_integer(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Long:
    case ScalarType::Int:
    case ScalarType::Short:
    case ScalarType::Char:
    case ScalarType::Byte: return true;
    default: return false;
  }
}

Tensor index_select(const Tensor& tensor, int64_t dim, const Tensor& index) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(dim),
                                    torch::stable::detail::from(index)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor host_numbers(const std::vector<int64_t>& numbers) {
  const auto count = static_cast<int64_t>(numbers.size());
  Tensor tensor = empty({count}, ScalarType::Long, {aoti_torch_device_type_cpu(), 0});
  if (count > 0) std::memcpy(tensor.mutable_data_ptr(), numbers.data(), count * sizeof(int64_t));
  return tensor;
}

}  // namespace

void check_lengths(const Tensor& lengths, std::optional<int64_t> batch) {
  const std::string form = "(B,)" + (batch ? " = (" + std::to_string(*batch) + ",)" : "");
  if (!is_integer(lengths.scalar_type()) || lengths.dim() != 1)
    fail("lengths must be an integer tensor of shape " + form + ", got " + shape_text(lengths) +
         " of " + dtype_text(lengths.scalar_type()));
  if (batch && lengths.size(0) != *batch)
    fail("lengths must have shape " + form + ", got " + shape_text(lengths));
}

std::vector<int64_t> read_lengths(const Tensor& lengths, int64_t steps) {
  check_memory("lengths", lengths);
  Tensor host = lengths;
  if (!host.is_cpu() || host.scalar_type() != ScalarType::Long)
    host = torch::stable::to(lengths, ScalarType::Long, std::nullopt,
                             torch::stable::Device(torch::headeronly::DeviceType::CPU));
  std::vector<int64_t> values(host.size(0));
  const auto* numbers = static_cast<const int64_t*>(host.const_data_ptr());
  const int64_t stride = host.stride(0);
  for (int64_t b = 0; b < host.size(0); ++b) {
    values[b] = numbers[b * stride];
    if (values[b] < 1 || values[b] > steps)
      fail("lengths must be at least 1 and at most T = " + std::to_string(steps) + ", got " +
           std::to_string(values[b]) + " at row " + std::to_string(b));
  }
  return values;
}

std::optional<ValidRows> ValidRows::read(const Tensor& lengths, const Tensor& x) {
  if (x.dim() != 3) fail("x must have shape (T, B, I), got " + shape_text(x));
  const int64_t steps = x.size(0), batch = x.size(1);
  check_lengths(lengths, batch);
  const std::vector<int64_t> values = read_lengths(lengths, steps);
  const auto is_full = [&](int64_t value) { return value == steps; };
  if (std::all_of(values.begin(), values.end(), is_full)) return std::nullopt;
  ValidRows rows{steps, batch, 0, std::vector<int64_t>(batch), std::vector<int64_t>(steps), {}};
  std::iota(rows.order.begin(), rows.order.end(), 0);
  std::stable_sort(rows.order.begin(), rows.order.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  for (const int64_t value : values) ++rows.sizes[value - 1];  // that end there, and then go on
  for (int64_t t = steps - 1; t > 0; --t) rows.sizes[t - 1] += rows.sizes[t];
  rows.count = std::accumulate(rows.sizes.begin(), rows.sizes.end(), int64_t{0});
  const auto longest = rows.sizes.begin() + values[rows.order[0]];
  rows.batch_sizes.emplace(host_numbers({rows.sizes.begin(), longest}));
  return rows;
}

Tensor numbers_beside(const Tensor& tensor, const std::vector<int64_t>& numbers) {
  const Tensor host = host_numbers(numbers);
  return tensor.is_cpu() ? host : torch::stable::to(host, tensor.device());
}

StateOrder::StateOrder(const std::vector<int64_t>& order, const Tensor& x) {
  if (std::is_sorted(order.begin(), order.end())) return;
  std::vector<int64_t> back(order.size());
  for (size_t i = 0; i < order.size(); ++i) back[order[i]] = static_cast<int64_t>(i);
  sorted_.emplace(numbers_beside(x, order));
  unsorted_.emplace(numbers_beside(x, back));
}

OptionalTensor StateOrder::sort(const OptionalTensor& state, int64_t dim) const {
  if (!state || !sorted_) return state;
  return index_select(*state, dim, *sorted_);
}

Tensor StateOrder::unsort(const Tensor& state, int64_t dim) const {
  return unsorted_ ? index_select(state, dim, *unsorted_) : state;
}

}  // namespace rnnfast
