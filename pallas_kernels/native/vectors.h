// Narrow numbers, sixteen floats at a time, and exp: what the sources beside this file share. Each of them is one library, so all
// of it is local to it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// For what keeps arrays of vectors in registers: a call, or a loop that stays one, would put all of them into memory.
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  _Float16 value;
};
struct Float8 {  // e4m3fn: no infinities, one NaN of either sign
  uint8_t bits;
};
using Int8 = int8_t;

constexpr uint8_t kFloat8NaN = 0x7f;  // without the sign

// What is left to multiply a page's numbers by after Load: an e4m3 is read as the bits of a half, whose exponents are 8 less.
template <typename P>
constexpr float kUnit = std::is_same_v<P, Float8> ? 256.0f : 1.0f;

inline float ToFloat(float x) { return x; }
inline float ToFloat(Int8 x) { return static_cast<float>(x); }
inline float ToFloat(Half x) { return static_cast<float>(x.value); }
inline float ToFloat(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float ToFloat(Float8 x) {
  const uint8_t magnitude = x.bits & 0x7f;
  const uint16_t half = (x.bits & 0x80) << 8 | (magnitude == kFloat8NaN ? 0x7e00 : magnitude << 7);
  _Float16 y;
  std::memcpy(&y, &half, 2);
  return static_cast<float>(y);
}

// exp for x <= 0, within 2 ulp; plain arithmetic, so that the compiler vectorises it. Cody and Waite reduction, minimax
// polynomial of the classic Cephes expf.
inline float ExpNonPositive(float x) {
  // A NaN passes through: both comparisons of the clamp are false for it, and the product below keeps it.
  float clamped = x < -87.0f ? -87.0f : x;
  float n = std::nearbyintf(clamped * 1.44269504088896341f);
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &exponent, 4);
  return p * scale;
}

// Sixteen floats: one AVX-512 register, and whatever the compiler makes of it elsewhere.
constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));  // of a comparison too: all bits where it is true
constexpr Ints kPlaces = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE Vec Load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)  // GCC 12 makes sixteen scalar conversions of what is one instruction
INLINE Vec Load(const BFloat16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
}
INLINE Vec Load(const Half* p) {
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
INLINE Vec Load(const Int8* p) {
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}
INLINE Vec Load(const Float8* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  // The sign arrives in bits 15 and 14; the mask keeps one of them.
  const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
  __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), kept);
  const __m128i magnitude = _mm_and_si128(bytes, _mm_set1_epi8(0x7f));
  const __mmask16 is_nan = _mm_cmpeq_epi8_mask(magnitude, _mm_set1_epi8(static_cast<int8_t>(kFloat8NaN)));
  half = _mm256_mask_blend_epi16(is_nan, half, _mm256_set1_epi16(0x7e00));
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(half));
}
#else
template <typename P>
INLINE Vec Load(const P* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = ToFloat(p[i]);
  return x;
}
#endif
INLINE void Store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// Numbers rounded to what an array holds, ties to the even one.
inline void Put(float* p, float x) { *p = x; }
inline void Put(Half* p, float x) { p->value = static_cast<_Float16>(x); }
inline void Put(BFloat16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  p->bits = x != x ? 0x7fc0 | (bits >> 16 & 0x8000) : rounded;  // rounding could carry a NaN to infinity
}

// The first `count` of sixteen numbers; zeros for the others.
INLINE Vec LoadSome(const float* p, int64_t count) {
  if (count == kLanes) return Load(p);
  Vec x = {};
  std::memcpy(&x, p, count * sizeof *p);
  return x;
}
template <typename P>
INLINE Vec LoadSome(const P* p, int64_t count) {
  if (count == kLanes) return Load(p);
  P padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(P));
  return Load(padded);
}

INLINE void StoreSome(float* p, Vec x, int64_t count) {
  count == kLanes ? std::memcpy(p, &x, kLanes * sizeof *p) : std::memcpy(p, &x, count * sizeof *p);
}
INLINE void StoreSome(BFloat16* p, Vec x, int64_t count) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
  const Words bits = reinterpret_cast<Words>(x);
  const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = 0x7fc0 | (bits >> 16 & 0x8000);
  const Halves narrow = __builtin_convertvector(x != x ? nan : rounded, Halves);
  count == kLanes ? std::memcpy(p, &narrow, kLanes * sizeof *p) : std::memcpy(p, &narrow, count * sizeof *p);
}
INLINE void StoreSome(Half* p, Vec x, int64_t count) {
#ifdef __AVX512F__
  const __m256i narrow = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Half narrow[kLanes];
  for (int i = 0; i < kLanes; ++i) Put(narrow + i, x[i]);
#endif
  count == kLanes ? std::memcpy(p, &narrow, kLanes * sizeof *p) : std::memcpy(p, &narrow, count * sizeof *p);
}

#ifdef __AVX512F__
INLINE float Largest(Vec x) { return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x)); }
INLINE float Sum(Vec x) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x)); }
#else
INLINE float Largest(Vec x) {
  float found = x[0];
  for (int i = 1; i < kLanes; ++i) found = x[i] > found ? x[i] : found;
  return found;
}
INLINE float Sum(Vec x) {  // by halves as above, so that it is the same wherever among the lanes they begin
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}
#endif

// The sums of four vectors' lanes.
INLINE void StoreSums(float* target, const Vec* x) {
#ifdef __AVX512F__  // together they take half the shuffles of four sums, each of which would be as dear as a head of 64
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const auto as512 = [](Vec y) { return reinterpret_cast<__m512>(y); };
  __m512 y = fold(fold(as512(x[0]), as512(x[1])), fold(as512(x[2]), as512(x[3])));
  y = _mm512_add_ps(y, _mm512_permute_ps(y, 0x4e));
  y = _mm512_add_ps(y, _mm512_permute_ps(y, 0xb1));
  _mm_storeu_ps(target, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, y)));
#else
  UNROLL for (int j = 0; j < 4; ++j) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += x[j][i];
    target[j] = total;
  }
#endif
}

}  // namespace
