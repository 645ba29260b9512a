// Rows times panels. A panel is sixteen outputs, turned: what a tile needs of them at a step along the sum lies side by side. A tile
// multiplies up to twelve rows by two panels, whose sums never leave the registers.
//
// Every sum is one lane that walks the steps in order, whatever rows and panels are computed beside it.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

#ifdef __AVX512F__
constexpr int kRows = 12;  // of a tile: 24 sums in 32 registers
#else
constexpr int kRows = 2;
#endif
constexpr int kPanels = 2;  // of a tile

// What sixteen outputs have for a step along the sum: a float each, two bfloat16 or four bytes.
using Dwords = Ints;

// What a product is made of: how many numbers a step takes, and how it adds them to the sums of sixteen outputs: the same numbers of a
// row to each, or to each its own.
struct Singles {
  using Itself = Singles;
  using Row = float;
  using Lanes = Vec;
  static constexpr int kGroup = 1;
  template <typename P>
  static INLINE Dwords Of(const P* p) {
    return reinterpret_cast<Dwords>(Load(p));
  }
  static INLINE void Add(Lanes& sum, const Row* x, Dwords w) { sum += *x * reinterpret_cast<Vec>(w); }
  static INLINE void Add(Lanes& sum, Dwords x, Dwords w) { sum += reinterpret_cast<Vec>(x) * reinterpret_cast<Vec>(w); }
  static INLINE void Count(Dwords&, Dwords) {}
  static INLINE Lanes Begin(Lanes sum, Dwords) { return sum; }
  static INLINE Vec Floats(Lanes sum) { return sum; }
};

#ifdef __AVX512F__
INLINE Dwords Read(const void* p) { return reinterpret_cast<Dwords>(_mm512_loadu_si512(p)); }
INLINE __m512i Repeat(const void* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return _mm512_set1_epi32(x);
}
#endif

#ifdef __AVX512BF16__
// The products are exact, each pair adds to its sum with two roundings to nearest. Subnormal numbers, those below 1.2e-38, count as 0.
struct Pairs {
  using Itself = Pairs;
  using Row = BFloat16;
  using Lanes = Vec;
  static constexpr int kGroup = 2;
  static INLINE Dwords Of(const BFloat16* p) { return Read(p); }
  static INLINE void Add(Lanes& sum, const Row* x, Dwords w) { Add(sum, reinterpret_cast<Dwords>(Repeat(x)), w); }
  static INLINE void Add(Lanes& sum, Dwords x, Dwords w) {
    sum = reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), (__m512bh)x, (__m512bh)w));
  }
  static INLINE void Count(Dwords&, Dwords) {}
  static INLINE Lanes Begin(Lanes sum, Dwords) { return sum; }
  static INLINE Vec Floats(Lanes sum) { return sum; }
};
#endif

INLINE void Transpose(Dwords* x) {
#ifdef __AVX512F__
  __m512i a[kLanes], b[kLanes];
  UNROLL for (int i = 0; i < kLanes; i += 2) {
    const __m512i even = reinterpret_cast<__m512i>(x[i]), odd = reinterpret_cast<__m512i>(x[i + 1]);
    a[i] = _mm512_unpacklo_epi32(even, odd);
    a[i + 1] = _mm512_unpackhi_epi32(even, odd);
  }
  UNROLL for (int i = 0; i < kLanes; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // b[4i + j] has column j of every quarter for rows 4i to 4i + 3.
  UNROLL for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), high = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const __m512i low2 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd), high2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    x[j] = reinterpret_cast<Dwords>(_mm512_shuffle_i32x4(low, high, 0x88));
    x[4 + j] = reinterpret_cast<Dwords>(_mm512_shuffle_i32x4(low2, high2, 0x88));
    x[8 + j] = reinterpret_cast<Dwords>(_mm512_shuffle_i32x4(low, high, 0xdd));
    x[12 + j] = reinterpret_cast<Dwords>(_mm512_shuffle_i32x4(low2, high2, 0xdd));
  }
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const int32_t below = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = below;
    }
#endif
}

// The last numbers of an output, zeros after them.
template <typename A, typename P>
INLINE Dwords Last(const P* p, int64_t count) {
  P padded[kLanes * A::kGroup] = {};
  std::memcpy(padded, p, count * sizeof(P));
  return A::Of(padded);
}

// What is fetched while a tile is computed: from two places, so many bytes for each step.
struct Ahead {
  const char* from[kPanels];
  int64_t step;
};

// Two panels, and what their sums start with.
struct Panels {
  const char* from[kPanels];  // of a weight they begin anywhere
  Dwords starts[kPanels];
};

// NR rows, `stride` numbers apart, times two panels: sums[p * kRows + r].
template <typename A, int NR>
__attribute__((noinline)) void Tile(const typename A::Row* x, int64_t stride, const Panels& panels, int64_t steps, Ahead ahead, Vec* out) {
  typename A::Lanes sums[NR][kPanels];
  UNROLL for (int r = 0; r < NR; ++r)
    UNROLL for (int p = 0; p < kPanels; ++p) sums[r][p] = reinterpret_cast<typename A::Lanes>(panels.starts[p]);
  const typename A::Row* rows[(NR + 2) / 3];  // an address is one of these and up to two strides
  UNROLL for (int i = 0; i < (NR + 2) / 3; ++i) rows[i] = x + 3 * i * stride;
  for (int64_t s = 0; s < steps; ++s) {
    Dwords w[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
      std::memcpy(&w[p], panels.from[p] + s * sizeof w[p], sizeof w[p]);
      __builtin_prefetch(ahead.from[p] + s * ahead.step);
    }
    UNROLL for (int r = 0; r < NR; ++r)
      UNROLL for (int p = 0; p < kPanels; ++p) A::Add(sums[r][p], rows[r / 3] + r % 3 * stride, w[p]);
    UNROLL for (int i = 0; i < (NR + 2) / 3; ++i) rows[i] += A::kGroup;
  }
  UNROLL for (int r = 0; r < NR; ++r)
    UNROLL for (int p = 0; p < kPanels; ++p) out[p * kRows + r] = A::Floats(sums[r][p]);
}

// From kFewest to kRows rows.
template <typename A, int kFewest = 1, int NR = kRows>
inline void Tiles(int64_t num_rows, const typename A::Row* x, int64_t stride, const Panels& panels, int64_t steps, Ahead ahead, Vec* out) {
  if (num_rows >= NR) return Tile<typename A::Itself, NR>(x, stride, panels, steps, ahead, out);
  if constexpr (NR > kFewest) Tiles<A, kFewest, NR - 1>(num_rows, x, stride, panels, steps, ahead, out);
}

}  // namespace
