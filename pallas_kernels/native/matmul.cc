// Rows times the transpose of a weight for a CPU, called by XLA through its foreign function interface.
//
// Both are read along D, so a tile of rows and outputs is dot products side by side and nothing is ever packed. One row is bound by
// memory: its weight is read once, ahead of time. Many rows go over blocks of outputs that stay in the first cache.
// A sum has sixteen lanes that walk D in order, whatever rows and outputs are computed beside it, on whatever thread: a row's bits
// depend on the row and the weight alone. Only that order counts here: this source is not built with -fassociative-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

constexpr int kOutputs = 4;  // of a tile: their lanes are summed together
constexpr int kHeldRows = 32;              // up to here all rows meet four outputs before the next four are read
constexpr int kMaxWidth = 128;             // outputs of a block
constexpr int64_t kBlockBytes = 24 << 10;  // of a block's weight: half of a first cache
constexpr int64_t kRowBytes = 384 << 10;   // of rows that many outputs meet one after the other: half of a second cache
constexpr int64_t kTaskBytes = 64 << 10;   // of weight: less is not worth waking a thread
// How far ahead of its use a weight is asked for. One row of bfloat16, Zen 5: 13 GB/s a core without, 27 with 8 KiB, November 2026.
constexpr int64_t kAheadBytes = 8 << 10;

struct Nothing {};

// What a product is made of: the numbers of rows and weight, how many of them a step takes, and how a step adds to the lanes. A
// surplus is what the lanes of an output hold too much of, whatever the row.
struct Floats {
  using Lanes = Vec;
  using Surplus = Nothing;
#ifdef __AVX512F__
  static constexpr int kRows = 6;  // of a tile: 24 sums in 32 registers
#else
  static constexpr int kRows = 2;
#endif
  template <typename Numbers>
  static INLINE void AddSurplus(Surplus&, Numbers) {}
  static INLINE void Store(float* target, const Lanes* sums, const Surplus*) { StoreSums(target, sums); }
};

template <typename P>
struct Widened : Floats {  // any weight, by rows of floats
  using Row = float;
  using Weight = P;
  using Numbers = Vec;
  static constexpr int kStep = kLanes;
  template <typename Q>
  static INLINE Numbers Of(const Q* p) {
    return Load(p);
  }
  static INLINE void Add(Lanes& sum, Numbers x, Numbers w) { sum += x * w; }
};

#ifdef __AVX512BF16__
// Pairs of bfloat16: the products are exact, each pair adds to its lane with two roundings to nearest. Subnormal numbers, those
// below 1.2e-38, count as 0.
struct Paired : Floats {
  using Row = BFloat16;
  using Weight = BFloat16;
  using Numbers = __m512bh;
  static constexpr int kStep = 2 * kLanes;
  static INLINE Numbers Of(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static INLINE void Add(Lanes& sum, Numbers x, Numbers w) {
    sum = reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), x, w));
  }
};
#endif

using Shifted = uint8_t;  // an integer from -127 to 127, with 128 added

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// Four integers of 8 bits to a lane. The instruction multiplies bytes without a sign by bytes with one, so rows come shifted; the
// surplus is 128 times the weight's sum, and what is left without it is exact.
struct Integers {
  using Row = Shifted;
  using Weight = Int8;
  using Lanes = __m512i;
  using Surplus = __m512i;
  using Numbers = __m512i;
  static constexpr int kStep = 4 * kLanes;
  static constexpr int kRows = 5;  // 20 sums, 4 surpluses, 5 rows, a column
  static INLINE Numbers Of(const void* p) { return _mm512_loadu_si512(p); }
  static INLINE void Add(Lanes& sum, Numbers x, Numbers w) { sum = _mm512_dpbusd_epi32(sum, x, w); }
  static INLINE void AddSurplus(Surplus& surplus, Numbers w) {
    surplus = _mm512_dpbusd_epi32(surplus, _mm512_set1_epi8(static_cast<char>(128)), w);
  }
  static INLINE void Store(float* target, const Lanes* sums, const Surplus* surplus) {
    __m512i x[4];
    for (int j = 0; j < 4; ++j) x[j] = _mm512_sub_epi32(sums[j], surplus[j]);
    const auto fold = [](__m512i a, __m512i b) {
      return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    __m512i y = fold(fold(x[0], x[1]), fold(x[2], x[3]));
    y = _mm512_add_epi32(y, _mm512_shuffle_epi32(y, _MM_PERM_BADC));
    y = _mm512_add_epi32(y, _mm512_shuffle_epi32(y, _MM_PERM_CDAB));
    _mm_storeu_ps(target, _mm_cvtepi32_ps(_mm512_castsi512_si128(_mm512_maskz_compress_epi32(0x1111, y))));
  }
};
#endif

// The last numbers of a row, zeros after them.
template <typename K, typename P>
INLINE typename K::Numbers Last(const P* p, int64_t count) {
  P padded[K::kStep] = {};
  std::memcpy(padded, p, count * sizeof(P));
  return K::Of(padded);
}

// NR rows, `stride` numbers apart, times NF outputs: out[r * out_stride + f].
// Not inlined: it is the same for every type of result, and most of what there is to compile.
template <typename K, int NR, bool kAhead, int NF = kOutputs>
__attribute__((noinline)) void Tile(const typename K::Row* x, const typename K::Weight* const* w, int64_t D, float* out, int64_t out_stride) {
  typename K::Lanes sums[NR][NF] = {};
  typename K::Surplus surplus[NF] = {};
  const int64_t whole = D / K::kStep * K::kStep;
  for (int64_t d = 0; d < whole; d += K::kStep) {
    typename K::Numbers rows[NR];
    UNROLL for (int r = 0; r < NR; ++r) rows[r] = K::Of(x + r * D + d);
    UNROLL for (int f = 0; f < NF; ++f) {
      if (kAhead) __builtin_prefetch(reinterpret_cast<const char*>(w[f] + d) + kAheadBytes);
      const typename K::Numbers column = K::Of(w[f] + d);
      K::AddSurplus(surplus[f], column);
      UNROLL for (int r = 0; r < NR; ++r) K::Add(sums[r][f], rows[r], column);
    }
  }
  if (whole < D) {
    typename K::Numbers rows[NR];
    UNROLL for (int r = 0; r < NR; ++r) rows[r] = Last<K>(x + r * D + whole, D - whole);
    UNROLL for (int f = 0; f < NF; ++f) {
      const typename K::Numbers column = Last<K>(w[f] + whole, D - whole);
      K::AddSurplus(surplus[f], column);
      UNROLL for (int r = 0; r < NR; ++r) K::Add(sums[r][f], rows[r], column);
    }
  }
  UNROLL for (int r = 0; r < NR; ++r)
    UNROLL for (int f = 0; f < NF; f += kOutputs) K::Store(out + r * out_stride + f, sums[r] + f, surplus + f);
}

template <typename K, bool kAhead, int NR = K::kRows>
inline void Tiles(int num_rows, const typename K::Row* x, const typename K::Weight* const* w, int64_t D, float* out, int64_t stride) {
  if (num_rows >= NR) return Tile<K, NR, kAhead>(x, w, D, out, stride);
  if constexpr (NR > 1) Tiles<K, kAhead, NR - 1>(num_rows, x, w, D, out, stride);
}

// One call. Optional arrays are null when they were not given.
struct Call {
  int64_t X, D, F;     // F outputs of the result: a gated weight has twice as many, its bias too
  bool is_gated;
  const void* x;       // [X, D], of the type that the product takes
  const void* weight;  // [F, D] or [2F, D]
  const float* scales; // [F], of a weight of int8
  const float* bias;
  const void* residual;  // [X, F], as the result
  void* out;             // [X, F]
};

inline void Put(float* p, float x) { *p = x; }
inline void Put(Half* p, float x) { p->value = static_cast<_Float16>(x); }
inline void Put(BFloat16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  p->bits = x != x ? 0x7fc0 | (bits >> 16 & 0x8000) : rounded;  // rounding could carry a NaN to infinity
}

inline float Silu(float x) {
  const float e = ExpNonPositive(-std::fabs(x));
  return x * (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// A function of its own: within another one GCC 12 does not vectorise it, which makes it five times slower.
__attribute__((noinline)) void Gate(float* __restrict gate, const float* __restrict up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gate[i] = Silu(gate[i]) * up[i];
}

// Turns sums of outputs [begin, begin + count) into a row's results. `up` are those that a gate is for, or null.
template <typename Out>
void Finish(const Call& c, int64_t row, int64_t begin, int64_t count, float* sums, float* up) {
  if (c.scales)
    for (int64_t i = 0; i < count; ++i) sums[i] *= c.scales[begin + i];
  if (c.bias)
    for (int64_t i = 0; i < count; ++i) sums[i] += c.bias[begin + i];
  if (c.bias && up)
    for (int64_t i = 0; i < count; ++i) up[i] += c.bias[c.F + begin + i];
  if (up) Gate(sums, up, count);
  const int64_t at = row * c.F + begin;
  if (c.residual)
    for (int64_t i = 0; i < count; ++i) sums[i] += ToFloat(static_cast<const Out*>(c.residual)[at + i]);
  for (int64_t i = 0; i < count; ++i) Put(static_cast<Out*>(c.out) + at + i, sums[i]);
}

// Rows [first, last) times outputs [begin, end).
template <typename K, typename Out>
void Compute(const Call& c, int64_t first, int64_t last, int64_t begin, int64_t end) {
  using Weight = typename K::Weight;
  const int num_halves = c.is_gated ? 2 : 1;
  const int64_t num_bytes = c.D * static_cast<int64_t>(sizeof(Weight)) * num_halves;
  const bool is_few = last - first <= kHeldRows;
  const int64_t num_held = is_few ? last - first : K::kRows;
  const int64_t fitting = std::clamp<int64_t>(kBlockBytes / num_bytes / kOutputs * kOutputs, kOutputs, kMaxWidth);
  const int64_t width = is_few ? kMaxWidth : fitting;
  const auto* x = static_cast<const typename K::Row*>(c.x);
  alignas(64) float sums[2][kHeldRows * kMaxWidth];

  for (int64_t at = begin; at < end; at += width) {
    const int64_t count = std::min(width, end - at);
    for (int64_t held = first; held < last; held += num_held) {
      const int64_t stop = std::min(held + num_held, last);
      for (int half = 0; half < num_halves; ++half)
        for (int64_t f = 0; f < count; f += kOutputs) {
          const Weight* w[2 * kOutputs];
          if (last - first == 1 && f + 2 * kOutputs <= count) {
            for (int i = 0; i < 2 * kOutputs; ++i) w[i] = static_cast<const Weight*>(c.weight) + (half * c.F + at + f + i) * c.D;
            Tile<K, 1, true, 2 * kOutputs>(x + first * c.D, w, c.D, sums[half] + f, width);
            f += kOutputs;
            continue;
          }
          for (int i = 0; i < kOutputs; ++i)  // past the last output stands the last one again
            w[i] = static_cast<const Weight*>(c.weight) + (half * c.F + at + std::min<int64_t>(f + i, count - 1)) * c.D;
          for (int64_t r = held; r < stop; r += K::kRows) {
            const int num_rows = std::min<int64_t>(K::kRows, stop - r);
            float* out = sums[half] + (r - held) * width + f;
            if (r == first)
              Tiles<K, true>(num_rows, x + r * c.D, w, c.D, out, width);
            else
              Tiles<K, false>(num_rows, x + r * c.D, w, c.D, out, width);
          }
        }
      for (int64_t r = held; r < stop; ++r) {
        float* row = sums[0] + (r - held) * width;
        Finish<Out>(c, r, at, count, row, c.is_gated ? sums[1] + (r - held) * width : nullptr);
      }
    }
  }
}

template <typename K, typename Out>
void Run(ffi::ThreadPool& pool, const Call& c) {
  const int64_t row_bytes = c.D * static_cast<int64_t>(sizeof(typename K::Row));
  const int64_t weight_bytes = c.D * static_cast<int64_t>(sizeof(typename K::Weight)) * (c.is_gated ? 2 : 1);
  // Rows of a task, in whole tiles; few of them are never parted, so that the weight is read once.
  const int64_t num_rows = c.X <= 2 * kHeldRows ? c.X : std::max<int64_t>(kRowBytes / row_bytes / K::kRows, 8) * K::kRows;
  const int64_t row_tasks = (c.X + num_rows - 1) / num_rows;
  // Eight rows cost as much in arithmetic as the weight in bytes.
  const int64_t cost = c.F * weight_bytes * (8 + std::min(c.X, num_rows)) / 9;
  const int64_t most = std::max<int64_t>(1, 8 * pool.num_threads() / row_tasks);
  const int64_t parts = std::clamp<int64_t>(cost / kTaskBytes, 1, most);
  const int64_t num_outputs = ((c.F + parts - 1) / parts + kOutputs - 1) / kOutputs * kOutputs;
  const int64_t output_tasks = (c.F + num_outputs - 1) / num_outputs;
  ParallelFor(pool, row_tasks * output_tasks, [&](int64_t task) {
    const int64_t row = task / output_tasks * num_rows, output = task % output_tasks * num_outputs;
    Compute<K, Out>(c, row, std::min(row + num_rows, c.X), output, std::min(output + num_outputs, c.F));
  });
}

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

inline void Widen(const float* x, int64_t D, float* out) { std::copy(x, x + D, out); }
template <typename P>
void Widen(const P* x, int64_t D, float* out) {
  const int64_t whole = D / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) Store(out + d, Load(x + d));
  for (int64_t d = whole; d < D; ++d) out[d] = ToFloat(x[d]);
}

// Rows as the product takes them: normalised where there is a scale, and of type Row.
template <typename P, typename Row>
const Row* Prepare(ffi::ThreadPool& pool, const P* x, const P* scale, float eps, int64_t X, int64_t D) {
  if constexpr (std::is_same_v<P, Row>)
    if (!scale) return x;
  // Of the calling thread, which takes no other call before this one ends.
  thread_local std::vector<Row> prepared;
  prepared.resize(static_cast<size_t>(X) * D);
  Row* target = prepared.data();
  const int64_t some = std::max<int64_t>(1, kTaskBytes / (D * 16));  // rows of a task: a norm is several passes
  ParallelFor(pool, (X + some - 1) / some, [&, target](int64_t task) {
    for (int64_t r = task * some; r < std::min((task + 1) * some, X); ++r) {
      if constexpr (std::is_same_v<P, Row>) {
        Normalise(x + r * D, scale, eps, D, target + r * D);
      } else if (!scale) {
        Widen(x + r * D, D, target + r * D);
      } else {
        thread_local std::vector<P> row;
        row.resize(D);
        Normalise(x + r * D, scale, eps, D, row.data());
        Widen(row.data(), D, target + r * D);
      }
    }
  });
  return target;
}

template <typename K, typename P>
void RunAs(ffi::ThreadPool& pool, Call& c, const P* scale, float eps, ffi::DataType out) {
  c.x = Prepare<P, typename K::Row>(pool, static_cast<const P*>(c.x), scale, eps, c.X, c.D);
  // Results are float32 or of the rows' type.
  if (out == ffi::F32) return Run<K, float>(pool, c);
  Run<K, P>(pool, c);
}

template <typename P>
ffi::Error RunRows(ffi::ThreadPool& pool, Call& c, const void* scale, float eps, ffi::DataType weight, ffi::DataType out) {
  const P* scales = static_cast<const P*>(scale);
  switch (weight) {
    case ffi::F32: RunAs<Widened<float>>(pool, c, scales, eps, out); break;
    case ffi::F16: RunAs<Widened<Half>>(pool, c, scales, eps, out); break;
    case ffi::BF16:
#ifdef __AVX512BF16__
      if constexpr (std::is_same_v<P, BFloat16>) {
        RunAs<Paired>(pool, c, scales, eps, out);
        break;
      }
#endif
      RunAs<Widened<BFloat16>>(pool, c, scales, eps, out);
      break;
    default: return ffi::Error::Internal("unknown type of weight");
  }
  return ffi::Error::Success();
}

const void* DataOrNull(const ffi::AnyBuffer& x) { return x.element_count() ? x.untyped_data() : nullptr; }

// Optional arrays have no element when they are not given.
ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Buffer<ffi::F32> bias, ffi::AnyBuffer norm,
                    ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> out, float eps, bool is_gated) {
  const auto xd = x.dimensions(), od = out->dimensions();
  Call c{.X = xd[0], .D = xd[1], .F = od[1], .is_gated = is_gated, .x = x.untyped_data(), .weight = weight.untyped_data(), .scales = nullptr,
         .bias = bias.element_count() ? bias.typed_data() : nullptr,
         .residual = DataOrNull(residual), .out = out->untyped_data()};
  const ffi::DataType of_weight = weight.element_type(), of_out = out->element_type();
  switch (x.element_type()) {
    case ffi::F32: return RunRows<float>(pool, c, DataOrNull(norm), eps, of_weight, of_out);
    case ffi::BF16: return RunRows<BFloat16>(pool, c, DataOrNull(norm), eps, of_weight, of_out);
    case ffi::F16: return RunRows<Half>(pool, c, DataOrNull(norm), eps, of_weight, of_out);
    default: return ffi::Error::Internal("unknown type of rows");
  }
}

// Rows of floats times a weight of int8 with a scale for each output.
ffi::Error MultiplyInt8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> weight, ffi::Buffer<ffi::F32> scales,
                        ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const auto xd = x.dimensions(), od = out->dimensions();
  const Call c{.X = xd[0], .D = xd[1], .F = od[1], .is_gated = false, .x = x.typed_data(), .weight = weight.typed_data(),
               .scales = scales.typed_data(), .bias = nullptr, .residual = nullptr, .out = out->typed_data()};
  Run<Widened<Int8>, float>(pool, c);
  return ffi::Error::Success();
}

// The same of rows of integers, shifted: every sum is exact before it is rounded to a float once.
ffi::Error MultiplyIntegers(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> x, ffi::Buffer<ffi::S8> weight, ffi::Buffer<ffi::F32> scales,
                            ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const auto xd = x.dimensions(), od = out->dimensions();
  Call c{.X = xd[0], .D = xd[1], .F = od[1], .is_gated = false, .x = x.typed_data(), .weight = weight.typed_data(),
         .scales = scales.typed_data(), .bias = nullptr, .residual = nullptr, .out = out->typed_data()};
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  Run<Integers, float>(pool, c);
#else  // an integer is exact as a float, and so is a lane's sum of up to 2^24 / (127 * 128) products
  thread_local std::vector<float> rows;  // of the calling thread, which takes no other call before this one ends
  rows.resize(static_cast<size_t>(c.X) * c.D);
  std::transform(x.typed_data(), x.typed_data() + rows.size(), rows.begin(), [](Shifted number) { return number - 128.0f; });
  c.x = rows.data();
  Run<Widened<Int8>, float>(pool, c);
#endif
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(MatmulInt8, MultiplyInt8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(MatmulIntegers, MultiplyIntegers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Matmul, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("is_gated"));
