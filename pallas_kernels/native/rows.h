// A row on its way to a product: normalised, widened, or rounded to int8.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace {

using Shifted = uint8_t;  // an integer from -127 to 127, with 128 added

// A row x / rms(x) * scale, rounded to P before the scale and after it.
template <typename P>
void Normalise(const P* x, const P* scale, float eps, int64_t D, P* out) {
  Vec squares = {};
  const int64_t whole = D / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) squares += Load(x + d) * Load(x + d);
  float total = 0.0f;
  for (int64_t d = whole; d < D; ++d) total += ToFloat(x[d]) * ToFloat(x[d]);
  for (int i = 0; i < kLanes; ++i) total += squares[i];
  const float inverse = 1.0f / std::sqrt(total / static_cast<float>(D) + eps);
  for (int64_t d = 0; d < D; ++d) {
    P rounded;
    Put(&rounded, ToFloat(x[d]) * inverse);
    Put(out + d, ToFloat(rounded) * ToFloat(scale[d]));
  }
}

template <typename P, typename Row>
void Take(const P* x, int64_t D, Row* out) {
  if constexpr (std::is_same_v<P, Row>) {
    std::copy(x, x + D, out);
  } else {
    const int64_t whole = D / kLanes * kLanes;
    for (int64_t d = 0; d < whole; d += kLanes) Store(out + d, Load(x + d));
    for (int64_t d = whole; d < D; ++d) out[d] = ToFloat(x[d]);
  }
}

// Rounds a row to int8, its largest number to 127, and shifts it; returns what a step of it is. That is NaN for a row that is not finite.
template <typename P>
__attribute__((noinline)) float Round(const P* x, int64_t D, Shifted* out) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const auto part = [&](int64_t d) { return LoadSome(x + d, std::min<int64_t>(kLanes, D - d)); };
  constexpr int32_t kExponent = 0x7f800000;  // all its bits are set in what is not finite
  Vec largest = {};
  Ints bad = {};
  for (int64_t d = 0; d < D; d += kLanes) {
    const Vec number = part(d), size = number < 0.0f ? -number : number;
    largest = size > largest ? size : largest;
    bad |= (reinterpret_cast<Ints>(number) & kExponent) == kExponent;
  }
  const float most = Largest(largest), scale = (most == 0.0f ? 1.0f : most) * (1.0f / 127);
  bool is_finite = true;
  for (int i = 0; i < kLanes; ++i) is_finite &= !bad[i];
  const Vec scales = Vec{} + scale, whole = Vec{} + 12582912.0f;  // 1.5 * 2^23: beside it a float has no fraction
  for (int64_t d = 0; d < D; d += kLanes) {
    const Vec rounded = is_finite ? part(d) / scales + whole - whole : Vec{};
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, Ints) + 128, Bytes);
    std::memcpy(out + d, &bytes, std::min<int64_t>(kLanes, D - d));
  }
  return is_finite ? scale : std::nanf("");
}

}  // namespace
