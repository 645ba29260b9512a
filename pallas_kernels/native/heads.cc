// Queries, keys and values out of a layer's product for a CPU, called by XLA through its foreign function interface.
//
// A head is normalised, rotated, rounded and looked through while it is in the first cache. Sums have sixteen lanes in a fixed order:
// a token's bits depend on that token alone. This source is not built with -fassociative-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "arrays.h"
#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

constexpr int64_t kTaskNumbers = 32 << 10;  // of heads: fewer are not worth waking a thread

struct Call {
  int64_t X, K, G, H;
  const float *cos, *sin;  // [X, H / 2]
  float eps;
};

// Bits that are all set in what is not finite.
template <typename P>
constexpr auto kExponent = std::is_same_v<P, float> ? 0x7f800000u : std::is_same_v<P, Half> ? 0x7c00u : 0x7f80u;

// Puts 0 where a head is not finite, and tells whether it was nowhere so.
template <typename P>
__attribute__((noinline)) bool Guard(P* head, int64_t H) {
  using Bits = std::conditional_t<sizeof(P) == 4, uint32_t, uint16_t>;
  constexpr Bits kMask = kExponent<P>;
  Bits* __restrict bits = reinterpret_cast<Bits*>(head);
  Bits bad = 0;
  for (int64_t i = 0; i < H; ++i) {
    const Bits is_bad = (bits[i] & kMask) == kMask ? ~Bits{0} : Bits{0};
    bad |= is_bad;
    bits[i] &= ~is_bad;
  }
  return !bad;
}

template <typename P>
INLINE Vec Rounded(Vec x) {
  P narrow[kLanes];
  StoreSome(narrow, x, kLanes);
  return Load(narrow);
}

// x / rms(x) * scale in floats, rounded to P before the scale and after it. Room for H rounded up to whole vectors, zeros there.
template <typename P>
void Normalise(float* x, const P* scale, float eps, int64_t H) {
  Vec squares = {};
  for (int64_t i = 0; i < H; i += kLanes) squares += Load(x + i) * Load(x + i);
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += squares[i];
  const Vec inverse = Vec{} + 1.0f / std::sqrt(total / static_cast<float>(H) + eps);
  for (int64_t i = 0; i < H; i += kLanes) {
    const Vec scales = LoadSome(scale + i, std::min<int64_t>(kLanes, H - i));
    Store(x + i, Rounded<P>(Rounded<P>(Load(x + i) * inverse) * scales));
  }
}

// One head, normalised where there is a scale, and rotated.
template <typename P>
void Rotate(const Call& c, const P* x, const P* scale, int64_t token, float* wide, P* out) {
  const int64_t half = c.H / 2;
  for (int64_t i = 0; i < c.H; i += kLanes) Store(wide + i, LoadSome(x + i, std::min<int64_t>(kLanes, c.H - i)));
  if (scale) Normalise(wide, scale, c.eps, c.H);
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, half - i);
    const Vec cos = LoadSome(c.cos + token * half + i, count), sin = LoadSome(c.sin + token * half + i, count);
    const Vec first = Load(wide + i), second = Load(wide + half + i);
    StoreSome(out + i, first * cos - second * sin, count);
    StoreSome(out + half + i, second * cos + first * sin, count);
  }
}

template <typename P>
ffi::Error Run(ffi::ThreadPool& pool, const Call& c, const void* qkv, const void* q_norm, const void* k_norm, void* q, void* k, void* v, bool* is_finite) {
  const int64_t of_token = c.K * (c.G + 2) * c.H, some = std::max<int64_t>(1, kTaskNumbers / std::max<int64_t>(1, of_token));
  ParallelFor(pool, (c.X + some - 1) / some, [&](int64_t task) {
    thread_local std::vector<float> wide;
    wide.assign(c.H + 2 * kLanes, 0.0f);
    for (int64_t x = task * some; x < std::min((task + 1) * some, c.X); ++x) {
      bool is_sound = true;
      for (int64_t group = 0; group < c.K; ++group) {
        const P* from = static_cast<const P*>(qkv) + x * of_token + group * (c.G + 2) * c.H;
        for (int64_t head = 0; head <= c.G; ++head) {
          const bool is_key = head == c.G;
          P* out = is_key ? static_cast<P*>(k) + (x * c.K + group) * c.H : static_cast<P*>(q) + ((x * c.K + group) * c.G + head) * c.H;
          Rotate(c, from + head * c.H, static_cast<const P*>(is_key ? k_norm : q_norm), x, wide.data(), out);
          is_sound &= Guard(out, c.H);
        }
        P* value = static_cast<P*>(v) + (x * c.K + group) * c.H;
        std::memcpy(value, from + (c.G + 1) * c.H, c.H * sizeof(P));
        is_sound &= Guard(value, c.H);
      }
      is_finite[x] = is_sound;
    }
  });
  return ffi::Error::Success();
}

// A norm that is not there has no element.
ffi::Error RotateAll(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin, ffi::AnyBuffer q_norm,
                     ffi::AnyBuffer k_norm, ffi::Result<ffi::AnyBuffer> q, ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v,
                     ffi::Result<ffi::Buffer<ffi::PRED>> is_finite, float eps) {
  const auto d = qkv.dimensions();
  const Call c{.X = d[0], .K = d[1], .G = d[2] - 2, .H = d[3], .cos = cos.typed_data(), .sin = sin.typed_data(), .eps = eps};
  return OfFloats(qkv.element_type(), [&](auto kind) {
    return Run<decltype(kind)>(pool, c, qkv.untyped_data(), DataOrNull(q_norm), DataOrNull(k_norm), q->untyped_data(), k->untyped_data(),
                               v->untyped_data(), is_finite->typed_data());
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RotateHeads, RotateAll,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::PRED>>()
                                  .Attr<float>("eps"));
