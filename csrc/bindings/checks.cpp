#include "checks.h"

#include <algorithm>
#include <cstring>
#include <limits>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace rnnfast {
namespace {

int32_t dtype_number(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    case ScalarType::Bool: return aoti_torch_dtype_bool();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    default: return aoti_torch_dtype_float32();
  }
}

std::string place_text(Place place) {
  if (place.type == aoti_torch_device_type_cpu()) return "cpu";
  return place.is_cuda() ? "cuda:" + std::to_string(place.index) : "another device";
}

std::string numbers_text(const int64_t* sizes, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (count == 1 ? ",)" : ")");
}

// Large results are fresh memory, and a fault every 4 KiB of it costs as much as a kernel (65 MB of
// saved planes: a quarter of the forward that fills them). Where the system leaves the choice to
// programs, ask for 2 MiB pages.
void prefer_huge_pages([[maybe_unused]] const Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (last > first + kPage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

Place place_of(const Tensor& tensor) {
  Place place{};
  if (aoti_torch_get_device_type(tensor.get(), &place.type) != AOTI_TORCH_SUCCESS ||
      aoti_torch_get_device_index(tensor.get(), &place.index) != AOTI_TORCH_SUCCESS)
    fail("a tensor has no device");
  if (!place.is_cuda()) place.index = 0;  // torch may give -1 or 0 for the CPU
  return place;
}

void fail(const std::string& what) { throw std::runtime_error("rnnfast: " + what); }

std::string shape_text(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes[i] = tensor.size(i);
  return numbers_text(sizes.data(), tensor.dim());
}

const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another type";
  }
}

const CellInfo& checked_cell(int64_t cell) {
  const int id = id_of_code(cell);
  if (cell >= 0 && is_own_cell(cell)) {
    if (id < 0)
      fail("cell " + std::to_string(cell) +
           " is one of rnnfast.load_cell that this engine does not have: call load_cell with its "
           "header in this process, for a CUDA device with cuda=True");
    return cell_info(id);
  }
  if (id >= kNumCells || (cell & kUnusedBits))
    fail("cell must be an id in [0, " + std::to_string(kNumCells) + ") and its options, got " +
         std::to_string(cell));
  const CellInfo& info = cell_info(id);
  if (!has_options(cell)) return info;
  if (!info.options) fail(std::string("cell ") + info.name + " takes no options, got some");
  const CellOptions options = options_of_code(cell);
  for (const Activation activation : {options.gate, options.state})
    if (static_cast<int>(activation) > kNumActivations)
      fail("an activation must be a number in [0, " + std::to_string(kNumActivations) + "], got " +
           std::to_string(static_cast<int>(activation)));
  if (info.gates == 1 && options.gate != Activation::kOwn)
    fail(std::string("cell ") + info.name + " has no gates, got an activation of them");
  if (info.states == 1 && options.clip != 0)
    fail(std::string("cell ") + info.name + " has no c, got a bound of it");
  if (!(options.clip >= 0 && options.clip <= std::numeric_limits<float>::max()))
    fail("the bound of c must be positive and finite, or 0 for none, got " +
         std::to_string(options.clip));
  return info;
}

ScalarType checked_dtype(const char* name, const Tensor& tensor) {
  if (!tensor.is_cpu() && !tensor.is_cuda())
    fail(std::string(name) + " must be a CPU or CUDA tensor: there is no engine for other devices");
  const ScalarType dtype = tensor.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half)
    fail(std::string(name) + " must be float32, float64, bfloat16 or float16, got " +
         dtype_text(dtype));
  return dtype;
}

ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_shape(const char* name, const Tensor& tensor, const char* letters,
                 std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i)
    same = tensor.size(static_cast<int64_t>(i)) == sizes.begin()[i];
  if (!same)
    fail(std::string(name) + " must have shape " + letters + " = " +
         numbers_text(sizes.begin(), static_cast<int64_t>(sizes.size())) + ", got " +
         shape_text(tensor));
}

void check_same(const char* name, const Tensor& tensor, ScalarType dtype, Place place) {
  if (place_of(tensor) != place)
    fail(std::string(name) + " must be on the same device as x (" + place_text(place) + ")");
  if (tensor.scalar_type() != dtype)
    fail(std::string(name) + " must have the dtype of x, " + dtype_text(dtype) + ", got " +
         dtype_text(tensor.scalar_type()));
  check_memory(name, tensor);
}

void check_memory(const char* name, const Tensor& tensor) {
  if (tensor.numel() > 0 && !tensor.const_data_ptr())
    fail(std::string(name) + " has no memory: its storage of " + std::to_string(tensor.numel()) +
         " numbers was freed");
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype, Place place) {
  int64_t strides[4];
  int64_t stride = 1;
  bool overflow = false;
  for (int i = static_cast<int>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    overflow |= __builtin_mul_overflow(stride, std::max<int64_t>(sizes.begin()[i], 1), &stride);
  }
  AtenTensorHandle handle;
  const auto status = overflow ? AOTI_TORCH_FAILURE
                               : aoti_torch_empty_strided(
                                     static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                     dtype_number(dtype), place.type, place.index, &handle);
  if (status != AOTI_TORCH_SUCCESS)
    fail("a result of shape " + numbers_text(sizes.begin(), static_cast<int64_t>(sizes.size())) +
         " and type " + dtype_text(dtype) + " can't be allocated");
  const Tensor tensor(handle);
  if (!place.is_cuda()) prefer_huge_pages(tensor);
  return tensor;
}

void fill_zero(const Tensor& tensor) {
  if (tensor.is_cuda()) {
    Tensor to = tensor;
    torch::stable::zero_(to);
    return;
  }
  std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
}

Tensor unit_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) == 1 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

CheckedLayer::CheckedLayer(const LayerTensors& t)
    : dtype(checked_dtype("x", t.x)),
      place(place_of(t.x)),
      cell(checked_cell(t.cell)),
      projection(t.w_hr.has_value()),
      x_(t.x),
      w_ih_(t.w_ih),
      w_hh_(t.w_hh),
      options_(options_of_code(t.cell)),
      reverse_(t.reverse) {
  packed_rows = t.batch_sizes.has_value();
  const int64_t rank = packed_rows ? 2 : 3;
  if (x_.dim() != rank)
    fail(std::string("x must have shape ") + (packed_rows ? "(N, I)" : "(T, B, I)") + ", got " +
         shape_text(x_));
  check_memory("x", x_);
  input_size = x_.size(rank - 1);
  if (packed_rows) {
    check_batch_sizes(t.batch_sizes);
  } else {
    seq_len = x_.size(0);
    batch = x_.size(1);
    rows = seq_len * batch;
  }
  if (seq_len < 1) fail("x must hold at least one step (T >= 1), got T = 0");
  b_ih_ = t.b_ih;
  b_hh_ = t.b_hh;
  w_hr_ = t.w_hr;
  check_weights();
  h0_ = t.h0;
  c0_ = t.c0;
  if (h0_) {
    check_same("h0", *h0_, dtype, place);
    check_shape("h0", *h0_, projection ? "(B, P)" : "(B, H)", {batch, output_size});
  }
  if (c0_) {
    check_same("c0", *c0_, dtype, place);
    check_shape("c0", *c0_, "(S-1, B, H)", {cell.states - 1, batch, hidden_size});
  }
  reset_ = t.reset;
  if (reset_) check_reset();
  if (t.masks) masks_ = *t.masks;
  check_masks();
  drops_h = masks_.h_kept.has_value();
  if (t.checks_only) return;
  x_ = unit_stride(x_);
  // Packed weights stand in for these, which may then be views without memory of their own.
  if (!t.packed) w_ih_ = torch_contiguous(w_ih_);
  if (!t.packed || !cell.dense) w_hh_ = torch_contiguous(w_hh_);
  h0_ = contiguous(h0_);
  c0_ = contiguous(c0_);
  b_ih_ = contiguous(b_ih_);
  b_hh_ = contiguous(b_hh_);
  if (!t.packed) w_hr_ = contiguous(w_hr_);
  reset_ = contiguous(reset_);
  masks_.zone = contiguous(masks_.zone);
  masks_.h_kept = contiguous(masks_.h_kept);
}

void CheckedLayer::check_weights() {
  check_same("w_ih", w_ih_, dtype, place);
  check_same("w_hh", w_hh_, dtype, place);
  if (w_ih_.dim() != 2 || w_ih_.size(0) % cell.gates != 0 || w_ih_.size(0) == 0)
    fail("w_ih must have shape (G*H, I) with G = " + std::to_string(cell.gates) + " for " +
         cell.name + ", got " + shape_text(w_ih_));
  const int64_t gate_rows = w_ih_.size(0);
  hidden_size = gate_rows / cell.gates;
  output_size = hidden_size;
  check_shape("w_ih", w_ih_, "(G*H, I)", {gate_rows, input_size});
  if (projection) {
    // What stays of h is read behind the projection, where no engine mixes it in.
    if (cell.states != 2 || !cell.dense || cell.keeps || cell.stages)
      fail(std::string("w_hr is for lstm only, got cell ") + cell.name);
    check_same("w_hr", *w_hr_, dtype, place);
    if (w_hr_->dim() != 2) fail("w_hr must have shape (P, H), got " + shape_text(*w_hr_));
    output_size = w_hr_->size(0);
    check_shape("w_hr", *w_hr_, "(P, H)", {output_size, hidden_size});
    if (output_size < 1) fail("w_hr must have P >= 1 rows, got 0");
  }
  if (cell.diagonal)
    check_shape("w_hh", w_hh_, "(H,)", {hidden_size});
  else if (!cell.dense)
    check_shape("w_hh", w_hh_, "(0,)", {0});
  else
    check_shape("w_hh", w_hh_, projection ? "(G*H, P)" : "(G*H, H)", {gate_rows, output_size});
  const bool has_hidden_side = cell.dense || cell.diagonal;
  for (const auto& [name, bias] : {std::pair{"b_ih", &b_ih_}, std::pair{"b_hh", &b_hh_}}) {
    if (!*bias) continue;
    check_same(name, **bias, dtype, place);
    // Of a cell without a hidden side b_hh may be as empty as w_hh is.
    if (!has_hidden_side && bias == &b_hh_ && b_hh_->dim() == 1 && b_hh_->numel() == 0) {
      b_hh_.reset();
      continue;
    }
    if (bias == &b_hh_ && cell.parameters > 0)
      check_shape(name, **bias, "((G+K)*H,)", {gate_rows + cell.parameters * hidden_size});
    else
      check_shape(name, **bias, "(G*H,)", {gate_rows});
  }
}

void CheckedLayer::check_batch_sizes(const OptionalTensor& batch_sizes) {
  if (!batch_sizes->is_cpu() || batch_sizes->scalar_type() != ScalarType::Long ||
      batch_sizes->dim() != 1)
    fail("batch_sizes must be a one-dimensional int64 CPU tensor of shape (T,), got " +
         shape_text(*batch_sizes) + " of " + dtype_text(batch_sizes->scalar_type()));
  seq_len = batch_sizes->size(0);
  const auto* sizes = static_cast<const int64_t*>(batch_sizes->const_data_ptr());
  const int64_t stride = seq_len > 1 ? batch_sizes->stride(0) : 1;
  batch_sizes_.resize(seq_len);
  offsets_.resize(seq_len + 1);
  offsets_[0] = 0;
  for (int64_t t = 0; t < seq_len; ++t) {
    batch_sizes_[t] = sizes[t * stride];
    // The second bound keeps the sum below from overflowing.
    if (batch_sizes_[t] < 1 || batch_sizes_[t] > (int64_t{1} << 40) ||
        (t > 0 && batch_sizes_[t] > batch_sizes_[t - 1]))
      fail("batch_sizes must be positive and must not grow, got " +
           std::to_string(batch_sizes_[t]) + " at step " + std::to_string(t));
    offsets_[t + 1] = offsets_[t] + batch_sizes_[t];
  }
  rows = x_.size(0);
  batch = seq_len > 0 ? batch_sizes_[0] : 0;
  if (seq_len > 0 && offsets_[seq_len] != rows)
    fail("x must have as many rows as batch_sizes add up to, got " + std::to_string(rows) +
         " rows");
}

void CheckedLayer::check_flags(const char* name, const Tensor& flags) const {
  if (place_of(flags) != place)
    fail(std::string(name) + " must be on the same device as x (" + place_text(place) + ")");
  if (flags.scalar_type() != ScalarType::Bool)
    fail(std::string(name) + " must be bool, got " + dtype_text(flags.scalar_type()));
  check_memory(name, flags);
}

void CheckedLayer::check_masks() const {
  if (masks_.zone || masks_.keep_h != 0 || masks_.keep_c != 0) {
    if (!cell.keeps)
      fail(std::string("zone, keep_h and keep_c are for cells of zoneout, got cell ") + cell.name);
    for (const double keep : {masks_.keep_h, masks_.keep_c})
      if (!(keep >= 0 && keep <= 1))
        fail("keep_h and keep_c must be in [0, 1], got " + std::to_string(keep));
  }
  if (masks_.zone) {
    check_flags("zone", *masks_.zone);
    if (packed_rows)
      check_shape("zone", *masks_.zone, "(N, S, H)", {rows, cell.states, hidden_size});
    else
      check_shape("zone", *masks_.zone, "(T, B, S, H)", {seq_len, batch, cell.states, hidden_size});
  }
  if (!masks_.h_kept) return;
  const Tensor& kept = *masks_.h_kept;
  check_flags("h_kept", kept);
  if (!cell.dense)
    fail(std::string("h_kept is for cells whose w_hh is a matrix, got cell ") + cell.name);
  if (cell.stages) fail(std::string("h_kept is for cells without stages, got cell ") + cell.name);
  // A graph of packed rows may not know how many sequences there are.
  if (kept.dim() != 2 || kept.size(0) < batch || kept.size(1) != output_size)
    fail(std::string("h_kept must have shape ") + (projection ? "(B, P)" : "(B, H)") +
         " with at least B = " + std::to_string(batch) + " rows of " + std::to_string(output_size) +
         ", got " + shape_text(kept));
}

void CheckedLayer::check_reset() const {
  check_flags("reset", *reset_);
  if (packed_rows)
    check_shape("reset", *reset_, "(N,)", {rows});
  else
    check_shape("reset", *reset_, "(T, B)", {seq_len, batch});
}

namespace {

// Between the rows of x, if they all lie at one distance.
int64_t row_distance(const Tensor& x) {
  const int64_t columns = x.size(x.dim() - 1);
  if (x.dim() == 2) return x.size(0) > 1 ? x.stride(0) : columns;
  if (x.size(1) > 1) return x.stride(1);
  return x.size(0) > 1 ? x.stride(0) : columns;
}

bool are_rows_even(const Tensor& x) {
  return x.dim() == 2 || x.size(0) == 1 || x.size(1) == 1 || x.stride(0) == x.size(1) * x.stride(1);
}

}  // namespace

void CheckedLayer::space_rows_evenly() {
  if (!are_rows_even(x_) || row_distance(x_) < input_size) x_ = torch::stable::contiguous(x_);
  even_rows_ = true;
}

Tensor torch_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

OptionalTensor CheckedLayer::contiguous(const OptionalTensor& tensor) const {
  if (!tensor) return tensor;
  return torch_contiguous(*tensor);
}

namespace {

template <class scalar_t>
const scalar_t* data(const Tensor& tensor) {
  return static_cast<const scalar_t*>(tensor.const_data_ptr());
}
template <class scalar_t>
const scalar_t* data(const OptionalTensor& tensor) {
  return tensor ? data<scalar_t>(*tensor) : nullptr;
}

}  // namespace

template <class scalar_t>
Rows<const scalar_t> CheckedLayer::rows_of(const Tensor& tensor) const {
  if (packed_rows) return {data<scalar_t>(tensor), 0, tensor.stride(0)};
  return {data<scalar_t>(tensor), tensor.stride(0), tensor.stride(1)};
}

template <class scalar_t>
void CheckedLayer::fill(LayerArgs<scalar_t>& args) const {
  args.seq_len = seq_len;
  args.batch = batch;
  args.input_size = input_size;
  args.hidden_size = hidden_size;
  args.output_size = output_size;
  args.rows = rows;
  args.options = options_;
  args.batch_sizes = packed_rows ? batch_sizes_.data() : nullptr;
  args.offsets = packed_rows ? offsets_.data() : nullptr;
  args.reverse = reverse_;
  args.reset = data<uint8_t>(reset_);
  args.masks = {data<uint8_t>(masks_.zone),
                {masks_.keep_h, masks_.keep_c},
                data<uint8_t>(masks_.h_kept),
                masks_.h_scale};
  args.x = rows_of<scalar_t>(x_);
  if (even_rows_) args.x.row_stride = row_distance(x_);
  args.h0 = data<scalar_t>(h0_);
  args.c0 = data<scalar_t>(c0_);
  args.w_ih = data<scalar_t>(w_ih_);
  args.w_hh = data<scalar_t>(w_hh_);
  args.b_ih = data<scalar_t>(b_ih_);
  args.b_hh = data<scalar_t>(b_hh_);
  args.w_hr = data<scalar_t>(w_hr_);
}

template void CheckedLayer::fill(LayerArgs<float>&) const;
template void CheckedLayer::fill(LayerArgs<double>&) const;
template void CheckedLayer::fill(LayerArgs<BFloat16>&) const;
template void CheckedLayer::fill(LayerArgs<Float16>&) const;
template Rows<const float> CheckedLayer::rows_of(const Tensor&) const;
template Rows<const double> CheckedLayer::rows_of(const Tensor&) const;
template Rows<const BFloat16> CheckedLayer::rows_of(const Tensor&) const;
template Rows<const Float16> CheckedLayer::rows_of(const Tensor&) const;

}  // namespace rnnfast
