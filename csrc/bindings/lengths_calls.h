// Passes over padded input with lengths: only the rows of valid steps go to an engine, packed, and
// its results come back padded. Padding is never read.
#pragma once

#include <optional>
#include <vector>

#include "layer_calls.h"

namespace rnnfast {

// The values on the host, from whatever device, each in [1, steps].
std::vector<int64_t> read_lengths(const Tensor& lengths, int64_t steps);
// `batch`: how many there must be; none if any number will do.
void check_lengths(const Tensor& lengths, std::optional<int64_t> batch);

// Where the valid steps of a padded batch lie among packed rows: those of a step in a row, the
// longest sequence first.
struct ValidRows {
  int64_t steps, batch, count;        // T, B, N
  std::vector<int64_t> order, sizes;  // (B) of the batch; (T) rows of a step, 0 behind the longest
  OptionalTensor batch_sizes;         // sizes up to there

  // None if no step is padding.
  static std::optional<ValidRows> read(const Tensor& lengths, const Tensor& x);
};

// On the device of the tensor.
Tensor numbers_beside(const Tensor& tensor, const std::vector<int64_t>& numbers);

// States, which have a row for each sequence, in the order of the packed rows and in that of the
// batch.
class StateOrder {
 public:
  StateOrder(const std::vector<int64_t>& order, const Tensor& x);
  OptionalTensor sort(const OptionalTensor& state, int64_t dim) const;
  Tensor unsort(const Tensor& state, int64_t dim) const;

 private:
  OptionalTensor sorted_, unsorted_;  // none: they are the same
};

template <class Rows>
OptionalTensor packed(const Rows& rows, const OptionalTensor& padded) {
  OptionalTensor result;
  if (padded) result.emplace(rows.pack(*padded));
  return result;
}

// The pass over packed rows; `pass` is checked with x.
template <class Rows>
Pass packed(const Rows& rows, const StateOrder& states, const Pass& d) {
  return {states.sort(d.h0, 0), states.sort(d.c0, 1), d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr,
          packed(rows, d.reset)};
}

// Device has the passes over packed rows, `forward` and `backward`, and its Rows copy rows there:
// pack gives (N, ...) of (T, B, ...), pad (T, B, ...) of (N, ...) with zeros elsewhere.
template <class Device>
ForwardResult forward_with_lengths(const Tensor& x, const Pass& d, const Tensor& lengths,
                                   const OptionalTensor& packed_weights, int64_t cell, bool reverse,
                                   bool save) {
  const auto valid = ValidRows::read(lengths, x);
  const OptionalTensor none;
  if (!valid) return Device::forward(x, d, none, packed_weights, cell, reverse, save, 0);
  // Before rows are copied, and with the sizes that the caller knows.
  const CheckedLayer layer({x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, none, d.reset,
                            cell, reverse, packed_weights.has_value(), true});
  const typename Device::Rows rows(*valid, x);
  const StateOrder states(valid->order, x);
  // A graph must know how large `saved` is: as for all T*B rows.
  auto [y, h_n, c_n, saved] =
      Device::forward(rows.pack(x), packed(rows, states, d), valid->batch_sizes, packed_weights,
                      cell, reverse, save, layer.rows);
  if (save) fill_zero(torch::stable::narrow(saved, 0, valid->count, layer.rows - valid->count));
  return {rows.pad(y), states.unsort(h_n, 0), states.unsort(c_n, 1), saved};
}

template <class Device>
BackwardResult backward_with_lengths(const Tensor& x, const Pass& d, const Tensor& lengths,
                                     const Incoming& incoming, int64_t cell, bool reverse) {
  const auto valid = ValidRows::read(lengths, x);
  const OptionalTensor none;
  if (!valid) return Device::backward(x, d, none, incoming, cell, reverse);
  const CheckedLayer layer({x, d.h0, d.c0, d.w_ih, d.w_hh, d.b_ih, d.b_hh, d.w_hr, none, d.reset,
                            cell, reverse, false, true});
  Incoming in = BackwardCall::checked(layer, d, incoming);
  const typename Device::Rows rows(*valid, x);
  const StateOrder states(valid->order, x);
  in = {packed(rows, in.dy),
        states.sort(in.dh_n, 0),
        states.sort(in.dc_n, 1),
        rows.pack(in.y),
        torch::stable::narrow(in.saved, 0, 0, valid->count),
        in.needs};
  auto gradients = Device::backward(rows.pack(x), packed(rows, states, d), valid->batch_sizes, in,
                                    cell, reverse);
  auto& [dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr] = gradients;
  if (in.needs & kDx) dx = rows.pad(dx);
  if (in.needs & kDh0) dh0 = states.unsort(dh0, 0);
  if (in.needs & kDc0) dc0 = states.unsort(dc0, 1);
  return gradients;
}

}  // namespace rnnfast
