// Reads an operator's tensors into an engine's arguments, or throws a
// sentence: who, what was expected in letters and numbers, what came.
// After these checks a kernel may trust every pointer and size.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../core/args.h"
#include "../core/cell_info.h"

namespace rnnfast {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Where a tensor lives.
struct Place {
  int32_t type, index;
  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
  bool operator==(const Place& other) const = default;
};
Place place_of(const Tensor& tensor);

// What core/args.h has of masks, as operators are given it.
struct MaskTensors {
  OptionalTensor zone, h_kept;
  double keep_h = 0, keep_c = 0, h_scale = 1;
};

// What an operator was given, as it came.
struct LayerTensors {
  const Tensor& x;
  const OptionalTensor &h0, &c0;
  const Tensor &w_ih, &w_hh;
  const OptionalTensor &b_ih, &b_hh, &w_hr, &batch_sizes, &reset;
  int64_t cell;
  bool reverse;
  bool packed = false;  // the layer computes with packed weights: of these only the shapes count
  bool checks_only = false;            // nothing is made contiguous: no fill()
  const MaskTensors* masks = nullptr;  // null: none
};

[[noreturn]] void fail(const std::string& what);
std::string shape_text(const Tensor& tensor);
const char* dtype_text(ScalarType dtype);

const CellInfo& checked_cell(int64_t cell);
// float32, float64, bfloat16 or float16, on the CPU or a CUDA device
ScalarType checked_dtype(const char* name, const Tensor& tensor);
ScalarType accumulator_dtype(ScalarType dtype);  // of sums and of what backward keeps
// `letters` and `sizes` name the same dimensions: check_shape("w_hr", w_hr, "(P, H)", {p, h}).
void check_shape(const char* name, const Tensor& tensor, const char* letters,
                 std::initializer_list<int64_t> sizes);
// A storage may be gone: that of a sharded parameter between its uses, say, that something kept
// holding on to.
void check_memory(const char* name, const Tensor& tensor);
void check_same(const char* name, const Tensor& tensor, ScalarType dtype, Place place);
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, Place place);
void fill_zero(const Tensor& tensor);

// The checked problem: sizes, tensors made contiguous where
// the kernel wants them so, and who owns the copies.
class CheckedLayer {
 public:
  explicit CheckedLayer(const LayerTensors& tensors);

  ScalarType dtype;
  Place place;
  const CellInfo& cell;
  int64_t seq_len, batch, input_size, hidden_size, output_size, rows;
  bool packed_rows, drops_h = false;
  bool empty() const { return rows == 0; }
  int64_t planes() const { return cell.saved + cell.states - 1 + (projection ? 1 : 0); }
  bool projection;
  bool has_b_hh() const { return b_hh_.has_value(); }  // one that is not empty

  // From now on fill() gives x with all rows, of all steps, x.row_stride apart: as one matrix.
  void space_rows_evenly();
  // Pointers into the checked tensors; valid while this object lives.
  template <class scalar_t>
  void fill(LayerArgs<scalar_t>& args) const;
  // Strides of a tensor of rows shaped as x, (T, B, features) or (N, features).
  template <class scalar_t>
  Rows<const scalar_t> rows_of(const Tensor& tensor) const;

 private:
  OptionalTensor contiguous(const OptionalTensor& tensor) const;
  void check_weights();
  void check_batch_sizes(const OptionalTensor& batch_sizes);
  void check_reset() const;
  void check_masks() const;
  void check_flags(const char* name, const Tensor& flags) const;

  Tensor x_, w_ih_, w_hh_;
  OptionalTensor h0_, c0_, b_ih_, b_hh_, w_hr_, reset_;
  MaskTensors masks_;
  std::vector<int64_t> batch_sizes_, offsets_;
  CellOptions options_;
  bool reverse_, even_rows_ = false;
};

Tensor torch_contiguous(const Tensor& tensor);  // itself if it is contiguous
// A tensor of rows with a unit stride in its features: itself, or a contiguous copy.
Tensor unit_stride(const Tensor& tensor);

}  // namespace rnnfast
