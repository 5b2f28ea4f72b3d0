// AVX512_BF16, AVX512_VNNI and AMX. The file is compiled for plain x86-64, each function for its
// own instructions, and nothing here runs before the processor was asked.
#include "dot.h"

#if defined(__x86_64__) && defined(RNNFAST_HAS_DOT)
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define RNNFAST_AVX512_DOT \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma")))
#define RNNFAST_AMX \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,amx-tile,amx-bf16,amx-int8,fma")))

namespace rnnfast {
namespace {

constexpr int kMaxVectors = 4;

// --- rows times vectors of units, accumulators in registers ---

struct PairsOfBFloat16 {
  using Sum = __m512;
  RNNFAST_AVX512_DOT static inline __attribute__((always_inline)) Sum zero() {
    return _mm512_setzero_ps();
  }
  RNNFAST_AVX512_DOT static inline __attribute__((always_inline)) Sum add(Sum sum, int a,
                                                                          __m512i w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)w);
  }
  RNNFAST_AVX512_DOT static inline __attribute__((always_inline)) __m512 result(Sum sum,
                                                                                const DotOperands&,
                                                                                int64_t, int) {
    return sum;
  }
};

struct FourBytes {
  // Not __m512i, which may alias anything, so that gcc would keep every sum in memory; and the
  // instruction by name, because gcc copies what its intrinsic adds to.
  typedef int Sum __attribute__((vector_size(64)));
  RNNFAST_AVX512_DOT static inline __attribute__((always_inline)) Sum zero() { return Sum{}; }
  RNNFAST_AVX512_DOT static inline __attribute__((always_inline)) Sum add(Sum sum, int a,
                                                                          __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_set1_epi32(a)), "v"(w));
    return sum;
  }
  RNNFAST_AVX512_DOT static inline __attribute__((always_inline)) __m512
  result(Sum sum, const DotOperands& o, int64_t row, int v) {
    const __m512i shift = _mm512_loadu_si512(o.unit_sum + 16 * v);
    const __m512 scale =
        _mm512_mul_ps(_mm512_set1_ps(o.row_scale[row]), _mm512_loadu_ps(o.unit_scale + 16 * v));
    return _mm512_mul_ps(scale,
                         _mm512_maskz_cvtepi32_ps(0xffff, _mm512_sub_epi32((__m512i)sum, shift)));
  }
};

template <class Kind, int kRows, int kVectors>
RNNFAST_AVX512_DOT void dot_rows(const DotOperands& o, int64_t row) {
  typename Kind::Sum sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Kind::zero();
  const char* a = static_cast<const char*>(o.a) + row * o.a_row;
  const char* w = static_cast<const char*>(o.w);
  for (int64_t g = 0; g < 16 * o.blocks; ++g, a += 4, w += o.w_group) {
    __m512i units[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) units[v] = _mm512_loadu_si512(w + 64 * v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int group;
      __builtin_memcpy(&group, a + r * o.a_row, 4);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Kind::add(sum[r][v], group, units[v]);
    }
  }
  // Unrolled, or the sums live in memory, during the loop above, too.
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      __m512 value = Kind::result(sum[r][v], o, row + r, v);
      if (o.start)
        value = _mm512_add_ps(_mm512_loadu_ps(o.start + (row + r) * o.start_row + 16 * v), value);
      _mm512_storeu_ps(o.out + (row + r) * o.out_row + 16 * v, value);
    }
}

template <class Kind, int kVectors>
RNNFAST_AVX512_DOT void dot_panel(int64_t rows, const DotOperands& o) {
  for (int64_t row = 0; row < rows;) {
    const int64_t tiles = (rows - row + 5) / 6;
    const int64_t height = (rows - row) / tiles;
    switch (height) {
      case 1: dot_rows<Kind, 1, kVectors>(o, row); break;
      case 2: dot_rows<Kind, 2, kVectors>(o, row); break;
      case 3: dot_rows<Kind, 3, kVectors>(o, row); break;
      case 4: dot_rows<Kind, 4, kVectors>(o, row); break;
      case 5: dot_rows<Kind, 5, kVectors>(o, row); break;
      default: dot_rows<Kind, 6, kVectors>(o, row); break;
    }
    row += height;
  }
}

template <class Kind>
void dot_product(int64_t rows, int vectors, const DotOperands& o) {
  switch (vectors) {
    case 1: return dot_panel<Kind, 1>(rows, o);
    case 2: return dot_panel<Kind, 2>(rows, o);
    case 3: return dot_panel<Kind, 3>(rows, o);
    default: return dot_panel<Kind, 4>(rows, o);
  }
}

// --- AMX: sums in tiles of 16 rows x 16 units, two by two ---

struct alignas(64) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {};
  unsigned char rows[16] = {};
};

// Tiles: 0 1 / 2 3 sums of the upper and the lower rows, 4 5 rows of a, 6 7 units of w.
RNNFAST_AMX void configure(int upper, int lower) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64;
  config.rows[0] = config.rows[1] = config.rows[4] = static_cast<unsigned char>(upper);
  config.rows[2] = config.rows[3] = config.rows[5] =
      static_cast<unsigned char>(lower > 0 ? lower : 1);
  config.rows[6] = config.rows[7] = 16;
  _tile_loadconfig(&config);
}

struct TilesOfBFloat16 {
  static constexpr bool kFloat = true;
};
struct TilesOfBytes {
  static constexpr bool kFloat = false;
};

// The tile instructions want their numbers as literals.
#define RNNFAST_TILE_ADD(sum, a, w) \
  do {                              \
    if constexpr (Kind::kFloat)     \
      _tile_dpbf16ps(sum, a, w);    \
    else                            \
      _tile_dpbusd(sum, a, w);      \
  } while (false)

// Rows [row, row + upper + lower) and one or two vectors from `v`.
template <class Kind, bool kTwoVectors, bool kTwoTiles>
RNNFAST_AMX void tile_block(const DotOperands& o, int64_t row, int upper, int lower, int v) {
  const char* a = static_cast<const char*>(o.a) + row * o.a_row;
  const char* w = static_cast<const char*>(o.w) + 64 * v;
  _tile_zero(0);
  if constexpr (kTwoVectors) _tile_zero(1);
  if constexpr (kTwoTiles) _tile_zero(2);
  if constexpr (kTwoTiles && kTwoVectors) _tile_zero(3);
  for (int64_t block = 0; block < o.blocks; ++block, a += 64, w += 16 * o.w_group) {
    _tile_loadd(4, a, o.a_row);
    _tile_loadd(6, w, o.w_group);
    RNNFAST_TILE_ADD(0, 4, 6);
    if constexpr (kTwoVectors) {
      _tile_loadd(7, w + 64, o.w_group);
      RNNFAST_TILE_ADD(1, 4, 7);
    }
    if constexpr (kTwoTiles) {
      _tile_loadd(5, a + 16 * o.a_row, o.a_row);
      RNNFAST_TILE_ADD(2, 5, 6);
      if constexpr (kTwoVectors) RNNFAST_TILE_ADD(3, 5, 7);
    }
  }
  // Sums to memory, then start values and scales: tiles can't add those.
  alignas(64) char sums[2][32][64];
  _tile_stored(0, sums[0], 64);
  if constexpr (kTwoVectors) _tile_stored(1, sums[1], 64);
  if constexpr (kTwoTiles) _tile_stored(2, sums[0][16], 64);
  if constexpr (kTwoTiles && kTwoVectors) _tile_stored(3, sums[1][16], 64);
  for (int side = 0; side < (kTwoVectors ? 2 : 1); ++side)
    for (int r = 0; r < upper + lower; ++r) {
      const char* sum = sums[side][r];
      __m512 value;
      if constexpr (Kind::kFloat) {
        value = _mm512_load_ps(sum);
      } else {
        const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(o.row_scale[row + r]),
                                           _mm512_loadu_ps(o.unit_scale + 16 * (v + side)));
        value = _mm512_mul_ps(
            scale, _mm512_maskz_cvtepi32_ps(
                       0xffff, _mm512_sub_epi32(_mm512_load_si512(sum),
                                                _mm512_loadu_si512(o.unit_sum + 16 * (v + side)))));
      }
      if (o.start)
        value = _mm512_add_ps(_mm512_loadu_ps(o.start + (row + r) * o.start_row + 16 * (v + side)),
                              value);
      _mm512_storeu_ps(o.out + (row + r) * o.out_row + 16 * (v + side), value);
    }
}

template <class Kind>
RNNFAST_AMX void tile_product(int64_t rows, int vectors, const DotOperands& o) {
  int configured = -1;
  for (int64_t row = 0; row < rows; row += kDotRows) {
    const int count = static_cast<int>(rows - row < kDotRows ? rows - row : kDotRows);
    const int upper = count < 16 ? count : 16, lower = count - upper;
    if (count != configured) configure(upper, lower);
    configured = count;
    int v = 0;
    for (; v + 2 <= vectors; v += 2) {
      if (lower)
        tile_block<Kind, true, true>(o, row, upper, lower, v);
      else
        tile_block<Kind, true, false>(o, row, upper, lower, v);
    }
    if (v < vectors) {
      if (lower)
        tile_block<Kind, false, true>(o, row, upper, lower, v);
      else
        tile_block<Kind, false, false>(o, row, upper, lower, v);
    }
  }
  _tile_release();  // tiles in use make every switch of threads slower
}

// Too few rows leave most of a tile empty.
constexpr int64_t kFewRows = 4;

bool has_avx512_dot() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

bool has_amx() {
#ifdef __linux__
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "+b"(b), "+c"(c), "+d"(d));
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr unsigned kAll = kBFloat16 | kTile | kInt8;
  if ((d & kAll) != kAll || !has_avx512_dot()) return false;
  // Linux gives the tiles' state to processes that ask for it.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool dot_isa_available(Isa isa) {
  static const bool avx512_dot = has_avx512_dot(), amx = has_amx();
  return isa == Isa::kAvx512Bf16 ? avx512_dot : isa == Isa::kAmx && amx;
}

DotKernels dot_kernels(Isa isa, int64_t rows) {
  if (isa == Isa::kAmx && rows > kFewRows)
    return {tile_product<TilesOfBFloat16>, tile_product<TilesOfBytes>};
  if (isa == Isa::kAmx || isa == Isa::kAvx512Bf16)
    return {dot_product<PairsOfBFloat16>, dot_product<FourBytes>};
  return {nullptr, nullptr};
}

}  // namespace rnnfast

#else

namespace rnnfast {
bool dot_isa_available(Isa) { return false; }
DotKernels dot_kernels(Isa, int64_t) { return {nullptr, nullptr}; }
}  // namespace rnnfast

#endif
