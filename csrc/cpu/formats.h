// The ways in which an engine may hold numbers: the type of tensors, of sums, of packed weights and
// of the rows that enter a product; and how rows and weights get there.
#pragma once

#include <type_traits>

#include "dot.h"
#include "pack.h"

namespace rnnfast::RNNFAST_TARGET {
namespace {

// Everything in the tensors' own type; 16-bit weights are widened as they are loaded, and rows
// beforehand.
template <class scalar_t>
struct Plain {
  using tensor_t = scalar_t;
  using acc_t = accumulator_of<scalar_t>;
  using weight_t = scalar_t;
  using operand_t = acc_t;
  static constexpr bool kDot = false;
};

// For the instructions of dot.h: pairs of bfloat16.
struct DotBFloat16 {
  using tensor_t = BFloat16;
  using acc_t = float;
  using weight_t = BFloat16;
  using operand_t = BFloat16;
  static constexpr bool kDot = true;
};

// float32 layers whose weights are bytes with a scale a unit and gate; rows become bytes with a
// scale each as they enter a product. Sums are int32: see kLongestInt8.
struct Int8 {
  using tensor_t = float;
  using acc_t = float;
  using weight_t = int8_t;
  using operand_t = uint8_t;
  static constexpr bool kDot = true;
};

// Whether rows of x, and of h, must be converted before a product.
template <class Format>
constexpr bool converts_inputs =
    !std::is_same_v<typename Format::tensor_t, typename Format::operand_t>;
template <class Format>
constexpr bool converts_hidden =
    !std::is_same_v<typename Format::tensor_t, typename Format::acc_t> ||
    !std::is_same_v<typename Format::operand_t, typename Format::acc_t>;

// Elements of k in a packed panel: whole blocks of 64 bytes for the instructions of dot.h.
template <class Format>
RNNFAST_HD int64_t padded_k(int64_t k_size) {
  constexpr int64_t kBlock = Format::kDot ? kDotBlockBytes / sizeof(typename Format::weight_t) : 1;
  return divide_up(k_size, kBlock) * kBlock;
}

// Room for a row that enters a product.
template <class Format>
RNNFAST_HD int64_t operand_row(int64_t k_size) {
  constexpr int64_t lanes = lanes_of<typename Format::acc_t>;
  return Format::kDot ? padded_k<Format>(k_size) : divide_up(k_size, lanes) * lanes + lanes;
}

// --- rows as a product wants them ---

// Rounded to 16 bits, and wide again if the product takes them so: the recurrence then has the same
// values whatever instructions compute it.
template <class Format, class from_t>
void to_operand(int64_t k_size, const from_t* from, typename Format::operand_t* to, float*) {
  using operand_t = typename Format::operand_t;
  using half_t = typename Format::tensor_t;
  const int64_t row = operand_row<Format>(k_size);
  int64_t k = 0;
  for (; k < k_size; k += lanes_of<float>) {
    half_t rounded[lanes_of<float>];
    store_narrow(rounded, load_wide_part(from + k, k_size - k));
    if constexpr (Format::kDot)
      __builtin_memcpy(to + k, rounded, smaller(lanes_of<float>, row - k) * sizeof(half_t));
    else
      store(to + k, load_wide(rounded));
  }
  if constexpr (Format::kDot)
    for (; k < row; ++k) to[k] = operand_t{};
}

RNNFAST_HD Float32Vector magnitude(Float32Vector x) { return x < Float32Vector{} ? -x : x; }

// Bytes around 128 and their scale, the row's largest magnitude over 127; a row with an infinity or
// a NaN gets a scale of NaN, so that what is lost does not look like a number.
template <>
[[maybe_unused]] void to_operand<Int8, float>(int64_t k_size, const float* from, uint8_t* to,
                                              float* scale) {
  constexpr int64_t lanes = lanes_of<float>;
  const Float32Vector most = splat<Float32Vector>(3.4028234663852886e38);
  Float32Vector largest{};
  Int32Vector finite = ~Int32Vector{};
  for (int64_t k = 0; k < k_size; k += lanes) {
    const Float32Vector size = magnitude(load_part(from + k, k_size - k));
    finite &= size <= most;
    largest = size > largest ? size : largest;
  }
  float size = 0;
  bool all_finite = true;
  for (int i = 0; i < lanes; ++i) {
    size = largest[i] > size ? largest[i] : size;
    all_finite = all_finite && finite[i];
  }
  // Below this the inverse would overflow.
  const float inverse = size > 1e-30f && all_finite ? 127.0f / size : 0.0f;
  *scale = all_finite ? size / 127.0f : __builtin_nanf("");
  // 1.5 * 2^23 rounds to an integer, which then stands in the last bits.
  const Float32Vector round = splat<Float32Vector>(12582912.0 + 128.0),
                      factor = inverse - Float32Vector{};
  for (int64_t k = 0; k < k_size; k += lanes) {
    const Float32Vector v =
        inverse > 0 ? load_part(from + k, k_size - k) * factor : Float32Vector{};
    const Int32Vector bits = bit_cast<Int32Vector>(v + round);
    uint8_t bytes[lanes];
    for (int i = 0; i < lanes; ++i) bytes[i] = static_cast<uint8_t>(bits[i]);
    __builtin_memcpy(to + k, bytes, smaller(lanes, k_size - k));
  }
  for (int64_t k = k_size; k < operand_row<Int8>(k_size); ++k) to[k] = 128;
}

// --- weights in groups: panels as pack.h's but never in slices, a lane holding 4 bytes of k ---

// The groups of `rows` <= lanes units, each k_size elements long, beginning at w.
template <class Format>
void pack_group_vector(int64_t rows, int64_t k_size, const typename Format::weight_t* w, char* out,
                       int64_t out_group) {
  using weight_t = typename Format::weight_t;
  constexpr int64_t lanes = lanes_of<float>, kGroup = 4 / sizeof(weight_t), kSlice = 256;
  const int64_t padded = padded_k<Format>(k_size);
  // Staged with zeros around, so that groups of four bytes can be transposed as floats are.
  alignas(64) weight_t stage[lanes][kSlice];
  for (int64_t k = 0; k < padded; k += kSlice) {
    const int64_t width = smaller(kSlice, padded - k),
                  valid = larger(0, smaller(width, k_size - k));
    __builtin_memset(stage, 0, sizeof(stage));
    for (int64_t r = 0; r < rows; ++r)
      __builtin_memcpy(stage[r], w + r * k_size + k, valid * sizeof(weight_t));
    pack_vector(lanes, width / kGroup, reinterpret_cast<const float*>(stage), kSlice / kGroup,
                reinterpret_cast<float*>(out + k / kGroup * out_group), out_group / 4);
  }
}

template <class Format>
void pack_weights(const Panels<typename Format::acc_t>& panels, int64_t panel, int64_t k_size,
                  const typename Format::weight_t* w, typename Format::weight_t* packed) {
  if constexpr (!Format::kDot) {
    pack_units(panels, panel, k_size, w, packed);
  } else {
    constexpr int64_t lanes = lanes_of<float>;
    const int vectors = panels.vectors_per_gate(panel);
    char* out = reinterpret_cast<char*>(packed + panels.offset(panel) * padded_k<Format>(k_size));
    for (int g = 0; g < panels.gates; ++g)
      for (int v = 0; v < vectors; ++v) {
        const int64_t unit = panels.first(panel) + v * lanes;
        pack_group_vector<Format>(
            smaller(lanes, panels.units - unit), k_size, w + (g * panels.units + unit) * k_size,
            out + (g * vectors + v) * lanes * 4, panels.vectors(panel) * lanes * 4);
      }
  }
}

// What DotOperands wants of bytes, in panel order: scales, and 128 times the sums of the weights.
inline void pack_scales(const Panels<float>& panels, int64_t panel, int64_t k_size, const int8_t* w,
                        const float* scale, float* packed_scale, int32_t* packed_sum) {
  pack_bias(panels, panel, scale, packed_scale);
  const int vectors = panels.vectors_per_gate(panel);
  constexpr int64_t lanes = lanes_of<float>;
  for (int g = 0; g < panels.gates; ++g)
    for (int64_t i = 0; i < vectors * lanes; ++i) {
      const int64_t unit = panels.first(panel) + i;
      int32_t sum = 0;
      for (int64_t k = 0; k < k_size && unit < panels.units; ++k)
        sum += w[(g * panels.units + unit) * k_size + k];
      packed_sum[panels.offset(panel) + g * vectors * lanes + i] = 128 * sum;
    }
}

// --- the product of bytes where no instruction of dot.h is ---

#if defined(__x86_64__)
// Two products of 16 bits an instruction: even and odd bytes apart.
RNNFAST_HD Int32Vector add_four(Int32Vector sum, Int32Vector a, Int32Vector w) {
  typedef int16_t Words __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  const Words w_words = bit_cast<Words>(w), a_even = bit_cast<Words>(a & 0x00ff00ff),
              a_odd = bit_cast<Words>((a >> 8) & 0x00ff00ff);
  const Words w_even = (w_words << 8) >> 8, w_odd = w_words >> 8;
#if RNNFAST_VECTOR_BYTES == 64
  const auto madd = [](Words x, Words y) {
    return bit_cast<Int32Vector>(_mm512_madd_epi16(bit_cast<__m512i>(x), bit_cast<__m512i>(y)));
  };
#elif RNNFAST_VECTOR_BYTES == 32
  const auto madd = [](Words x, Words y) {
    return bit_cast<Int32Vector>(_mm256_madd_epi16(bit_cast<__m256i>(x), bit_cast<__m256i>(y)));
  };
#else
  const auto madd = [](Words x, Words y) {
    return bit_cast<Int32Vector>(_mm_madd_epi16(bit_cast<__m128i>(x), bit_cast<__m128i>(y)));
  };
#endif
  return sum + madd(a_even, w_even) + madd(a_odd, w_odd);
}
#else
RNNFAST_HD Int32Vector add_four(Int32Vector sum, Int32Vector a, Int32Vector w) {
  RNNFAST_UNROLL
  for (int i = 0; i < 4; ++i) sum += ((a >> (8 * i)) & 0xff) * ((w << (24 - 8 * i)) >> 24);
  return sum;
}
#endif

template <int kRows, int kVectors>
void byte_rows(const DotOperands& o, int64_t row) {
  constexpr int64_t lanes = lanes_of<float>;
  Int32Vector sum[kRows][kVectors] = {};
  const char* a = static_cast<const char*>(o.a) + row * o.a_row;
  const char* w = static_cast<const char*>(o.w);
  for (int64_t g = 0; g < 16 * o.blocks; ++g, a += 4, w += o.w_group) {
    RNNFAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Int32Vector units;
      __builtin_memcpy(&units, w + v * sizeof(units), sizeof(units));
      RNNFAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int32_t group;
        __builtin_memcpy(&group, a + r * o.a_row, 4);
        sum[r][v] = add_four(sum[r][v], group - Int32Vector{}, units);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) {
      Int32Vector shift;
      __builtin_memcpy(&shift, o.unit_sum + v * lanes, sizeof(shift));
      Float32Vector value = __builtin_convertvector(sum[r][v] - shift, Float32Vector) *
                            (o.row_scale[row + r] * load(o.unit_scale + v * lanes));
      if (o.start) value += load(o.start + (row + r) * o.start_row + v * lanes);
      store(o.out + (row + r) * o.out_row + v * lanes, value);
    }
}

template <int kVectors>
void byte_panel(int64_t rows, const DotOperands& o) {
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) byte_rows<2, kVectors>(o, row);
  if (row < rows) byte_rows<1, kVectors>(o, row);
}

[[maybe_unused]] void byte_product(int64_t rows, int vectors, const DotOperands& o) {
  switch (vectors) {
    case 1: return byte_panel<1>(rows, o);
    case 2: return byte_panel<2>(rows, o);
    case 3: return byte_panel<3>(rows, o);
    default: return byte_panel<4>(rows, o);
  }
}

}  // namespace
}  // namespace rnnfast::RNNFAST_TARGET
