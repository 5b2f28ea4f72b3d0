// Weights packed before the calls that read them: a header that tells what they were made for, then
// panels.
#include <cstring>
#include <type_traits>

#include "kernel_of.h"
#include "run_widened.h"

namespace rnnfast {
namespace {

// 64 bytes, so that panels stay aligned as the buffer is.
struct Header {
  int32_t isa, cell, type, format;
  int64_t input_size, hidden_size, output_size, projection;
  int64_t reserved[2];
};
static_assert(sizeof(Header) == 64);

template <class scalar_t>
constexpr int32_t type_number() {
  if (std::is_same_v<scalar_t, float>) return 0;
  if (std::is_same_v<scalar_t, double>) return 1;
  return std::is_same_v<scalar_t, BFloat16> ? 2 : 3;
}

template <class scalar_t>
Header header_of(Isa isa, int cell, const LayerArgs<scalar_t>& args, WeightFormat format) {
  return {static_cast<int32_t>(isa),
          cell,
          type_number<scalar_t>(),
          static_cast<int32_t>(format),
          args.input_size,
          args.hidden_size,
          args.output_size,
          args.w_hr != nullptr,
          {}};
}

template <class scalar_t>
int64_t bytes_of(Isa isa, int cell, const LayerArgs<scalar_t>& args, WeightFormat format) {
  const auto bytes = [&](const auto& kernels) {
    return sizeof(Header) + kernels.packed_bytes(args.input_size, args.hidden_size,
                                                 args.output_size, args.w_hr != nullptr);
  };
  if (is_widened<scalar_t>(cell)) return bytes(forward_kernels(isa, cell, format, float{}));
  return bytes(forward_kernels(isa, cell, format, scalar_t{}));
}

}  // namespace

template <class scalar_t>
int64_t packed_bytes(Isa isa, int cell, const LayerArgs<scalar_t>& args) {
  return bytes_of(isa, cell, args, packed_format<scalar_t>(isa, cell));
}

template <class scalar_t>
void pack_weights(Isa isa, int cell, const LayerArgs<scalar_t>& args, char* packed) {
  const WeightFormat format = packed_format<scalar_t>(isa, cell);
  const Header header = header_of(isa, cell, args, format);
  std::memcpy(packed, &header, sizeof(header));
  if constexpr (kIsHalf<scalar_t>)
    if (is_widened<scalar_t>(cell))
      return pack_weights_widened(isa, cell, args, packed + sizeof(header));
  forward_kernels(isa, cell, format, scalar_t{}).pack(args, packed + sizeof(header));
}

int64_t packed_bytes_int8(Isa isa, int cell, const LayerArgs<float>& args) {
  return bytes_of(isa, cell, args, WeightFormat::kInt8);
}

void pack_weights_int8(Isa isa, int cell, const LayerArgs<float>& args, const Int8Weights& weights,
                       char* packed) {
  const Header header = header_of(isa, cell, args, WeightFormat::kInt8);
  std::memcpy(packed, &header, sizeof(header));
  kernels(isa).int8[cell].pack(args, weights, packed + sizeof(header));
}

template <class scalar_t>
bool take_packed(Isa isa, int cell, const char* packed, int64_t size, ForwardArgs<scalar_t>& args,
                 WeightFormat& format) {
  const WeightFormat int8 = std::is_same_v<scalar_t, float> && cell_info(cell).dot_kernels
                                ? WeightFormat::kInt8
                                : WeightFormat::kPlain;
  for (WeightFormat made : {packed_format<scalar_t>(isa, cell), int8}) {
    const Header header = header_of(isa, cell, args, made);
    if (size != bytes_of(isa, cell, args, made) || std::memcmp(packed, &header, sizeof(header)))
      continue;
    args.packed = packed + sizeof(header);
    format = made;
    return true;
  }
  return false;
}

#define RNNFAST_INSTANTIATE(scalar_t)                                      \
  template int64_t packed_bytes(Isa, int, const LayerArgs<scalar_t>&);     \
  template void pack_weights(Isa, int, const LayerArgs<scalar_t>&, char*); \
  template bool take_packed(Isa, int, const char*, int64_t, ForwardArgs<scalar_t>&, WeightFormat&);
RNNFAST_INSTANTIATE(float)
RNNFAST_INSTANTIATE(double)
RNNFAST_INSTANTIATE(BFloat16)
RNNFAST_INSTANTIATE(Float16)

}  // namespace rnnfast
