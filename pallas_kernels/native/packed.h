// Panels of bfloat16 in three quarters of their bytes, with nothing lost: few rows take as long as their weights take to be read.
//
// Nearly all numbers of a weight have one of sixteen exponents, which four bits tell apart instead of eight. A packed panel is lines of
// 64 bytes: the sixteen exponents; its strays, which have others, in the order of their steps; three lines for four steps. The first
// and second of these are sign and fraction, the 16 bits of each place two numbers': of an earlier step in bits 15 and 6 to 0, of a
// later one there too once the bytes are swapped. The third has of each place which exponents the four have, the first step's lowest.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "tiles.h"

namespace {

constexpr int kExponents = 16;
constexpr int kPlacesOfStep = 32;  // numbers: two of each output
constexpr int kStepsOfGroup = 4;
constexpr int64_t kLine = 64, kGroupBytes = 3 * kLine;
constexpr uint16_t kExponentBits = 0x7f80;

// A number by itself. The room behind the last of a panel is zeros.
struct Stray {
  int32_t step;  // counted from 1
  uint16_t place, bits;
};

// Room for one number in a thousand at least, and for what ends them. D is a multiple of eight.
inline int64_t StrayLines(int64_t D) { return 1 + D / 512; }
inline int64_t PackedBytes(int64_t D) { return (1 + StrayLines(D)) * kLine + D / 8 * kGroupBytes; }

// D / 2 steps of 32 numbers; false where there are too many strays.
inline bool PackPanel(const uint16_t* panel, int64_t D, char* packed) {
  const int64_t count = D * kLanes;
  int64_t counts[256] = {};
  for (int64_t i = 0; i < count; ++i) ++counts[(panel[i] & kExponentBits) >> 7];
  int order[256];
  std::iota(order, order + 256, 0);
  std::stable_sort(order, order + 256, [&](int a, int b) { return counts[a] > counts[b]; });
  std::memset(packed, 0, PackedBytes(D));
  uint16_t* const exponents = reinterpret_cast<uint16_t*>(packed);
  int number_of[256];
  std::fill(number_of, number_of + 256, kExponents);
  for (int i = 0; i < kExponents; ++i) {
    exponents[i] = order[i] << 7;
    number_of[order[i]] = i;
  }
  Stray* stray = reinterpret_cast<Stray*>(packed + kLine);
  Stray* const last = stray + StrayLines(D) * kLine / sizeof(Stray) - 1;
  uint16_t* lines = reinterpret_cast<uint16_t*>(packed + (1 + StrayLines(D)) * kLine);
  for (int64_t step = 0; step < D / 2; ++step) {
    const int s = step % kStepsOfGroup;
    for (int place = 0; place < kPlacesOfStep; ++place) {
      const uint16_t bits = *panel++, rest = bits & ~kExponentBits;
      int number = number_of[(bits & kExponentBits) >> 7];
      if (number == kExponents) {
        if (stray == last) return false;
        *stray++ = {static_cast<int32_t>(step + 1), static_cast<uint16_t>(place), bits};
        number = 0;
      }
      lines[s / 2 * kPlacesOfStep + place] |= s % 2 ? rest << 8 | rest >> 8 : rest;
      lines[2 * kPlacesOfStep + place] |= number << 4 * s;
    }
    if (s == kStepsOfGroup - 1) lines += kGroupBytes / sizeof *lines;
  }
  return true;
}

// Two packed panels, on their way to a tile and, where others come after it, to where these find them.
struct PackedPanels {
  const char* from[kPanels];
  Dwords* to[kPanels];
  int64_t D;
};

#ifdef __AVX512BF16__

// As Tile, with the same bits.
template <int NR, bool kKeeps>
__attribute__((noinline)) void PackedTile(const BFloat16* x, int64_t stride, const PackedPanels& packed, Ahead ahead, Vec* out) {
  const __m512i swapped = _mm512_set4_epi32(0x0e0f0c0d, 0x0a0b0809, 0x06070405, 0x02030001);  // bytes of 16 bits, in each quarter
  const __m512i rest = _mm512_set1_epi16(static_cast<int16_t>(~kExponentBits));
  Vec sums[NR][kPanels] = {};
  __m512i exponents[kPanels];  // twice, so that the lowest five bits of a place may be any
  const Stray* strays[kPanels];
  const char* from[kPanels];
  UNROLL for (int p = 0; p < kPanels; ++p) {
    exponents[p] = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed.from[p])));
    strays[p] = reinterpret_cast<const Stray*>(packed.from[p] + kLine);
    from[p] = packed.from[p] + (1 + StrayLines(packed.D)) * kLine;
  }
  const BFloat16* rows[(NR + 2) / 3];  // an address is one of these and up to two strides
  UNROLL for (int i = 0; i < (NR + 2) / 3; ++i) rows[i] = x + 3 * i * stride;
  const int64_t steps = packed.D / 2;
  for (int64_t step = 0; step < steps; step += kStepsOfGroup) {
    __m512i pairs[kPanels], numbers[kPanels];
    UNROLL for (int p = 0; p < kPanels; ++p) {
      pairs[p] = reinterpret_cast<__m512i>(Read(from[p]));
      numbers[p] = reinterpret_cast<__m512i>(Read(from[p] + 2 * kLine));
      UNROLL for (int i = 0; i < 3; ++i) __builtin_prefetch(ahead.from[p] + step * ahead.step + i * kLine);
    }
    UNROLL for (int s = 0; s < kStepsOfGroup; ++s) {
      Dwords w[kPanels];
      UNROLL for (int p = 0; p < kPanels; ++p) {
        const __m512i exponent = _mm512_permutexvar_epi16(numbers[p], exponents[p]);
        __m512i both = _mm512_ternarylogic_epi64(pairs[p], rest, exponent, 0xea);  // pairs & rest | exponent
        for (; strays[p]->step == step + s + 1; ++strays[p]) both = _mm512_mask_set1_epi16(both, 1u << strays[p]->place, strays[p]->bits);
        w[p] = reinterpret_cast<Dwords>(both);
        if constexpr (kKeeps) packed.to[p][step + s] = w[p];
        numbers[p] = _mm512_srli_epi16(numbers[p], 4);
        pairs[p] = s % 2 == 0 ? _mm512_shuffle_epi8(pairs[p], swapped) : reinterpret_cast<__m512i>(Read(from[p] + kLine));
      }
      UNROLL for (int r = 0; r < NR; ++r)
        UNROLL for (int p = 0; p < kPanels; ++p) Pairs::Add(sums[r][p], rows[r / 3] + r % 3 * stride + 2 * s, w[p]);
    }
    UNROLL for (int p = 0; p < kPanels; ++p) from[p] += kGroupBytes;
    UNROLL for (int i = 0; i < (NR + 2) / 3; ++i) rows[i] += 2 * kStepsOfGroup;
  }
  UNROLL for (int r = 0; r < NR; ++r)
    UNROLL for (int p = 0; p < kPanels; ++p) out[p * kRows + r] = sums[r][p];
}

template <bool kKeeps, int NR = kRows>
inline void PackedTiles(int64_t num_rows, const BFloat16* x, int64_t stride, const PackedPanels& packed, Ahead ahead, Vec* out) {
  if (num_rows >= NR) return PackedTile<NR, kKeeps>(x, stride, packed, ahead, out);
  if constexpr (NR > 1) PackedTiles<kKeeps, NR - 1>(num_rows, x, stride, packed, ahead, out);
}

#endif

}  // namespace
