// Rows times the transpose of a weight for a CPU, called by XLA through its foreign function interface.
//
// A panel is sixteen outputs of a weight, turned: what a tile needs of them at a step along D lies side by side. A weight comes as its
// panels, [F / 16, D / n, 16, n] with n numbers a step (of int8 one step more, see matmul/panels.py), as packed ones, see packed.h, or
// as the checkpoint has it, [F, D], and is turned on its way. A tile multiplies up to twelve rows by two panels, of neighbouring outputs
// or of a gate and what it is for, whose sums never leave the registers; while the first rows meet a panel, the next is fetched.
// Every sum is one lane that walks D in order, whatever rows and outputs are computed beside it, on whatever thread: a row's bits
// depend on the row and the weight alone. Only that order counts here: this source is not built with -fassociative-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "arrays.h"
#include "packed.h"
#include "parallel.h"
#include "rows.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

constexpr int kFewRows = kRows > 2 ? 4 : 1;  // up to here a weight is used as it is turned
constexpr int64_t kTaskBytes = 64 << 10;     // of weight: less is not worth waking a thread

// Panels of bfloat16 for rows of floats: one number of a pair after the other, with the sums of Singles.
struct WidePairs {
  using Itself = WidePairs;
  using Row = float;
  using Lanes = Vec;
  static constexpr int kGroup = 2;
  static INLINE void Add(Lanes& sum, const Row* x, Dwords w) {
    sum += x[0] * reinterpret_cast<Vec>(w << 16);
    sum += x[1] * reinterpret_cast<Vec>(w & -65536);
  }
  static INLINE Vec Floats(Lanes sum) { return sum; }
};

// A product whose weight comes as panels.
template <typename A>
struct Turned : A {};
template <typename A>
constexpr bool kIsTurned = false;
template <typename A>
constexpr bool kIsTurned<Turned<A>> = true;

// And as packed ones, of which D is a multiple of eight.
template <typename A>
struct Packed : A {};
template <typename A>
constexpr bool kIsTurned<Packed<A>> = true;
template <typename A>
constexpr bool kIsPacked = false;
template <typename A>
constexpr bool kIsPacked<Packed<A>> = true;

template <typename A>
constexpr int64_t kAheadBytes = (kIsPacked<A> ? 3 : 2) << 10;  // of a panel are fetched ahead

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// The instruction multiplies bytes without a sign by bytes with one, so rows come shifted; a sum starts with -128 times those of the
// weight, and what comes out is exact.
struct Quads {
  using Itself = Quads;
  using Row = Shifted;
  using Lanes = Dwords;
  static constexpr int kGroup = 4;
  static INLINE Dwords Of(const Int8* p) { return Read(p); }
  static INLINE void Add(Lanes& sum, const Row* x, Dwords w) {
    sum = reinterpret_cast<Dwords>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), Repeat(x), reinterpret_cast<__m512i>(w)));
  }
  static INLINE void Count(Dwords& start, Dwords w) {
    const __m512i total = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(static_cast<char>(128)), reinterpret_cast<__m512i>(w));
    start -= reinterpret_cast<Dwords>(total);
  }
  static INLINE Lanes Begin(Lanes sum, Dwords start) { return sum + start; }
  static INLINE Vec Floats(Lanes sum) { return __builtin_convertvector(sum, Vec); }
};
#else
struct Quads {  // the same numbers, a byte after the other
  using Itself = Quads;
  using Row = Shifted;
  using Lanes = Dwords;
  static constexpr int kGroup = 4;
  static INLINE Dwords Of(const Int8* p) {
    Dwords w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
  static INLINE Dwords Byte(Dwords w, int i) { return (w << (24 - 8 * i)) >> 24; }
  static INLINE void Add(Lanes& sum, const Row* x, Dwords w) {
    UNROLL for (int i = 0; i < kGroup; ++i) sum += x[i] * Byte(w, i);
  }
  static INLINE void Count(Dwords& start, Dwords w) {
    UNROLL for (int i = 0; i < kGroup; ++i) start -= 128 * Byte(w, i);
  }
  static INLINE Lanes Begin(Lanes sum, Dwords start) { return sum + start; }
  static INLINE Vec Floats(Lanes sum) { return __builtin_convertvector(sum, Vec); }
};
#endif

template <typename A>
constexpr int kHead = 0;  // vectors in front of a panel's steps
template <>
constexpr int kHead<Turned<Quads>> = 1;  // what its sums start with

// Sixteen outputs of a weight. Past the last of `count` stands that one again.
template <typename A, typename P>
struct Outputs {
  static constexpr int kStep = kLanes * A::kGroup;
  const P* from[kLanes];
  int64_t D;

  Outputs(const P* w, int64_t count, int64_t D) : D(D) {
    for (int i = 0; i < kLanes; ++i) from[i] = w + std::min<int64_t>(i, count - 1) * D;
  }

  // Sixteen steps from d on, one after the other.
  INLINE void Turn(int64_t d, Dwords* block) const {
    if (d + kStep <= D) {
      UNROLL for (int i = 0; i < kLanes; ++i) block[i] = A::Of(from[i] + d);
    } else {
      for (int i = 0; i < kLanes; ++i) block[i] = Last<A>(from[i] + d, D - d);
    }
    Transpose(block);
  }
};

// A panel: what its sums start with, then a step after the other.
template <typename A, typename P>
__attribute__((noinline)) void TurnPanel(const P* w, int64_t count, int64_t D, Dwords* panel) {
  const Outputs<A, P> outputs(w, count, D);
  Dwords start = {};
  Dwords* at = panel + 1;
  for (int64_t d = 0; d < D; d += outputs.kStep, at += kLanes) {
    Dwords block[kLanes];
    outputs.Turn(d, block);
    UNROLL for (int i = 0; i < kLanes; ++i) {
      A::Count(start, block[i]);
      at[i] = block[i];
    }
  }
  *panel = start;
}

// Up to NR rows times two times sixteen outputs that are used as they are turned: the same sums as those of a tile.
template <typename A, typename P, int NR>
__attribute__((noinline)) void Stream(int64_t num_rows, const typename A::Row* x, int64_t stride, const Outputs<A, P>* outputs, Ahead ahead, Vec* out) {
  typename A::Lanes sums[NR][kPanels] = {};
  Dwords starts[kPanels] = {};
  const typename A::Row* rows[NR];  // past the last stands that one again
  for (int r = 0; r < NR; ++r) rows[r] = x + std::min<int64_t>(r, num_rows - 1) * stride;
  const int64_t D = outputs->D;
  for (int64_t d = 0; d < D; d += outputs->kStep) {
    UNROLL for (int p = 0; p < kPanels; ++p) {
      UNROLL for (int s = 0; s < kLanes; ++s) __builtin_prefetch(ahead.from[p] + (d / A::kGroup + s) * ahead.step);
      Dwords block[kLanes];
      outputs[p].Turn(d, block);
      const auto add = [&](int s) {
        A::Count(starts[p], block[s]);
        UNROLL for (int r = 0; r < NR; ++r) A::Add(sums[r][p], rows[r] + d + s * A::kGroup, block[s]);
      };
      if (d + outputs->kStep <= D) {
        UNROLL for (int s = 0; s < kLanes; ++s) add(s);
      } else {
        for (int s = 0; d + s * A::kGroup < D; ++s) add(s);
      }
    }
  }
  UNROLL for (int r = 0; r < NR; ++r)
    UNROLL for (int p = 0; p < kPanels; ++p) out[p * kRows + r] = A::Floats(A::Begin(sums[r][p], starts[p]));
}

template <typename A, typename P, int NR = 1>
inline void Streams(int64_t num_rows, const typename A::Row* x, int64_t stride, const Outputs<A, P>* outputs, Ahead ahead, Vec* out) {
  if (num_rows <= NR) return Stream<A, P, NR>(num_rows, x, stride, outputs, ahead, out);
  if constexpr (NR < kFewRows) Streams<A, P, 2 * NR>(num_rows, x, stride, outputs, ahead, out);
}

// One call. Optional arrays are null when they were not given.
struct Call {
  int64_t X, D, F;     // F outputs of the result: a gated weight has twice as many, its bias too
  bool is_gated;
  const void* x;       // [X, D], of the type that the product takes
  int64_t stride;      // numbers from a row to the next
  const void* weight;  // [F, D] or [2F, D], or the panels of it
  const float* scales; // [F], of a weight of int8; of a gated one [2F]
  const float* row_scales = nullptr;  // of rows that are rounded to int8, one for each that counts
  const float* bias = nullptr;
  const void* residual = nullptr;  // [X, F], as the result
  const bool* is_real = nullptr;   // [X], rows that count; the others are 0
  void* out;             // [X, F]
  std::vector<int64_t> real = {};  // the numbers of those rows, which are multiplied as if no other stood between them

  int64_t Width() const { return is_gated ? kLanes : kPanels * kLanes; }  // outputs of a tile
  bool IsReal(int64_t row) const { return !is_real || is_real[row]; }

  void FindReal() {
    real.reserve(X);
    for (int64_t row = 0; row < X; ++row)
      if (IsReal(row)) real.push_back(row);
  }
};

inline float Silu(float x) {
  const float e = ExpNonPositive(-std::fabs(x));
  return x * (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// A function of its own: within another one GCC 12 does not vectorise it, which makes it five times slower.
__attribute__((noinline)) void Gate(float* __restrict gate, const float* __restrict up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gate[i] = Silu(gate[i]) * up[i];
}

// Turns the sums of a tile into results: of rows that count from their number `row` on, of outputs from `output` on.
template <typename Out>
__attribute__((noinline)) void Finish(const Call& c, int64_t row, int64_t num_rows, int64_t output, Vec* sums) {
  const Vec one = Vec{} + 1.0f;
  if (c.scales || c.bias)
    for (int p = 0; p < kPanels; ++p) {
      const int64_t at = c.is_gated ? output : output + p * kLanes, count = std::clamp<int64_t>(c.F - at, 0, kLanes);
      const int64_t of_half = c.is_gated ? p * c.F : 0;
      const Vec scale = c.scales ? LoadSome(c.scales + of_half + at, count) : one;
      const Vec bias = c.bias ? LoadSome(c.bias + of_half + at, count) : Vec{};
      for (int r = 0; r < num_rows; ++r) {
        const float of_row = c.row_scales ? c.row_scales[row + r] : 1.0f;
        sums[p * kRows + r] = sums[p * kRows + r] * scale * of_row + bias;
      }
    }
  if (c.is_gated) Gate(reinterpret_cast<float*>(sums), reinterpret_cast<const float*>(sums + kRows), num_rows * kLanes);
  for (int p = 0; p < (c.is_gated ? 1 : kPanels); ++p) {
    const int64_t first = output + p * kLanes, count = std::clamp<int64_t>(c.F - first, 0, kLanes);
    for (int r = 0; r < num_rows; ++r) {
      const int64_t at = c.real[row + r] * c.F + first;
      Vec x = sums[p * kRows + r];
      if (c.residual) x += LoadSome(static_cast<const Out*>(c.residual) + at, count);
      StoreSome(static_cast<Out*>(c.out) + at, x, count);
    }
  }
}

// Rows [first, last) of those that count times outputs [begin, end).
template <typename A, typename P, typename Out>
void Compute(const Call& c, int64_t first, int64_t last, int64_t begin, int64_t end) {
  const int64_t width = c.Width(), num_tiles = (last - first + kRows - 1) / kRows;
  const int64_t steps = (c.D + A::kGroup - 1) / A::kGroup;
  const auto* x = static_cast<const typename A::Row*>(c.x);
  constexpr int kFewest = kIsTurned<A> ? 1 : std::min(kFewRows + 1, kRows / 2);  // rows of a tile: fewer are a stream
  alignas(64) Vec sums[kPanels * kRows];
  Panels panels = {};
  [[maybe_unused]] PackedPanels packed = {{}, {}, c.D};
  const auto multiply = [&](int64_t at, Ahead ahead) {
    int64_t row = first;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {  // tiles of as many rows, or one less
      const int64_t num_rows = (last - row) / (num_tiles - tile);
      const auto* from = x + row * c.stride;
      if (kIsPacked<A> && tile == 0) {
#ifdef __AVX512BF16__
        if constexpr (kIsPacked<A>) (num_tiles > 1 ? PackedTiles<true> : PackedTiles<false>)(num_rows, from, c.stride, packed, ahead, sums);
#endif
      } else {
        Tiles<A, kFewest>(num_rows, from, c.stride, panels, steps, ahead, sums);
      }
      Finish<Out>(c, row, num_rows, at, sums);
      row += num_rows;
      if constexpr (kIsTurned<A>)
        for (int p = 0; p < kPanels; ++p) ahead.from[p] += steps * ahead.step;
    }
  };
  if constexpr (kIsTurned<A>) {
    const int64_t count = c.F / kLanes, last_panel = (c.is_gated ? kPanels : 1) * count - 1;
    const int64_t panel_bytes = kIsPacked<A> ? PackedBytes(c.D) : (kHead<A> + steps) * static_cast<int64_t>(sizeof(Dwords));
    const auto panel_of = [&](int64_t at, int p) {
      const int64_t panel = c.is_gated ? at / kLanes + p * count : at / kLanes + p;
      return static_cast<const char*>(c.weight) + std::min(panel, last_panel) * panel_bytes + kHead<A> * sizeof(Dwords);
    };
    thread_local std::vector<Dwords> storage;  // of packed panels, for all tiles but the first
    if constexpr (kIsPacked<A>) storage.resize(kPanels * steps);
    for (int64_t at = begin; at < end; at += width) {
      // One tile is as fast as memory. Several share the fetching of the next panels among them, those of the next task too.
      Ahead ahead{{nullptr, nullptr}, panel_bytes / std::max<int64_t>(1, steps) / num_tiles};
      for (int p = 0; p < kPanels; ++p) {
        const char* from = panel_of(at, p);
        if constexpr (kHead<A>) std::memcpy(&panels.starts[p], from - sizeof(Dwords), sizeof(Dwords));
        ahead.from[p] = num_tiles == 1 ? from + kAheadBytes<A> : panel_of(at + width, p);
        panels.from[p] = from;
        if constexpr (kIsPacked<A>) {
          packed.from[p] = from;
          packed.to[p] = storage.data() + p * steps;
          panels.from[p] = reinterpret_cast<const char*>(packed.to[p]);
        }
      }
      multiply(at, ahead);
    }
  } else {
    const int64_t panel_size = 1 + (steps + kLanes - 1) / kLanes * kLanes;
    thread_local std::vector<Dwords> storage;
    storage.resize(kPanels * panel_size);
    const auto weight_of = [&](int64_t at, int p) {  // a panel past the end is that of the last output
      return static_cast<const P*>(c.weight) + (c.is_gated ? at + p * c.F : std::min(at + p * kLanes, c.F - 1)) * c.D;
    };
    const auto count_of = [&](int64_t at, int p) { return std::clamp<int64_t>(c.F - at - (c.is_gated ? 0 : p * kLanes), 1, kLanes); };
    Ahead ahead{{nullptr, nullptr}, static_cast<int64_t>(kLanes * sizeof(P)) * A::kGroup};
    for (int64_t at = begin; at < end; at += width) {
      const int64_t after = std::min(at + width, c.F - 1);
      for (int p = 0; p < kPanels; ++p) ahead.from[p] = reinterpret_cast<const char*>(weight_of(after, p));
      if (last - first <= kFewRows) {
        const Outputs<A, P> outputs[] = {{weight_of(at, 0), count_of(at, 0), c.D}, {weight_of(at, 1), count_of(at, 1), c.D}};
        Streams<A, P>(last - first, x + first * c.stride, c.stride, outputs, ahead, sums);
        Finish<Out>(c, first, last - first, at, sums);
        continue;
      }
      for (int p = 0; p < kPanels; ++p) {
        Dwords* const panel = storage.data() + p * panel_size;
        TurnPanel<A>(weight_of(at, p), count_of(at, p), c.D, panel);
        panels.starts[p] = panel[0];
        panels.from[p] = reinterpret_cast<const char*>(panel + 1);
      }
      multiply(at, ahead);
    }
  }
}

// Outputs [begin, end) of the rows that do not count.
template <typename Out>
void Clear(const Call& c, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < c.X; ++row)
    if (!c.IsReal(row)) std::memset(static_cast<Out*>(c.out) + row * c.F + begin, 0, (end - begin) * sizeof(Out));
}

template <typename A, typename P, typename Out>
void Run(ffi::ThreadPool& pool, const Call& c) {
  if (c.X == 0 || c.F == 0) return;
  const int64_t width = c.Width(), num_tiles = (c.F + width - 1) / width, num_real = c.real.size();
  const int64_t weight_bytes = c.F * c.D * static_cast<int64_t>(sizeof(P)) * (c.is_gated ? 2 : 1);
  // Eight rows cost as much in arithmetic as the weight in bytes.
  const int64_t cost = weight_bytes * (8 + num_real) / 9;
  const int64_t wanted = std::clamp<int64_t>(cost / kTaskBytes, 1, 16 * NumThreads(pool));
  const int64_t tiles = (num_tiles + wanted - 1) / wanted, output_tasks = (num_tiles + tiles - 1) / tiles;
  // Rows are parted where outputs are too few for the threads: each part turns the weight again.
  const int64_t most_parts = std::max<int64_t>(1, (num_real + 8 * kRows - 1) / (8 * kRows));
  const int64_t row_parts = std::clamp<int64_t>(2 * NumThreads(pool) / output_tasks, 1, most_parts);
  const int64_t num_rows = (num_real + row_parts - 1) / row_parts;
  ParallelFor(pool, row_parts * output_tasks, [&](int64_t task) {
    const int64_t part = task / output_tasks, row = part * num_rows, output = task % output_tasks * tiles * width;
    const int64_t end = std::min(output + tiles * width, c.F);
    if (part == 0 && num_real < c.X) Clear<Out>(c, output, end);
    if (row < num_real) Compute<A, P, Out>(c, row, std::min(row + num_rows, num_real), output, end);
  });
}

// The rows that count, one after the other, as the product takes them: normalised where there is a scale, of type Row, and with zeros
// after them for a last step.
template <typename A, typename P>
void Prepare(ffi::ThreadPool& pool, Call& c, const P* scale, float eps) {
  using Row = typename A::Row;
  const P* x = static_cast<const P*>(c.x);
  c.stride = (c.D + A::kGroup - 1) / A::kGroup * A::kGroup;
  if constexpr (std::is_same_v<P, Row>)
    if (!scale && c.stride == c.D && static_cast<int64_t>(c.real.size()) == c.X) return;
  // Of the calling thread, which takes no other call before this one ends.
  thread_local std::vector<Row> prepared;
  prepared.resize(c.real.size() * c.stride);
  thread_local std::vector<float> row_scales;
  if constexpr (std::is_same_v<Row, Shifted>) {
    row_scales.resize(c.real.size());
    c.row_scales = row_scales.data();
  }
  const int64_t D = c.D, stride = c.stride, num_real = c.real.size();
  const int64_t some = std::max<int64_t>(1, kTaskBytes / (D * 16));  // rows of a task: a norm is several passes
  ParallelFor(pool, (num_real + some - 1) / some, [&, target = prepared.data(), steps = row_scales.data()](int64_t task) {
    for (int64_t r = task * some; r < std::min((task + 1) * some, num_real); ++r) {
      const P* from = x + c.real[r] * D;
      Row* row = target + r * stride;
      std::fill(row + D, row + stride, Row{});
      if constexpr (std::is_same_v<P, Row>) {
        scale ? Normalise(from, scale, eps, D, row) : Take(from, D, row);
      } else {
        thread_local std::vector<P> normalised;
        if (scale) {
          normalised.resize(D);
          Normalise(from, scale, eps, D, normalised.data());
          from = normalised.data();
        }
        if constexpr (std::is_same_v<Row, Shifted>) {
          steps[r] = Round(from, D, row);
        } else {
          Take(from, D, row);
        }
      }
    }
  });
  c.x = prepared.data();
}

template <typename A, typename W, typename P>
void RunAs(ffi::ThreadPool& pool, Call& c, const P* scale, float eps, ffi::DataType out) {
  Prepare<A, P>(pool, c, scale, eps);
  // Results are float32 or of the rows' type.
  if (out == ffi::F32) return Run<A, W, float>(pool, c);
  Run<A, W, P>(pool, c);
}

// With a weight as panels, or as the checkpoint has it.
template <typename OfPanels, typename A, typename W, typename P>
ffi::Error RunEither(bool is_turned, ffi::ThreadPool& pool, Call& c, const P* scale, float eps, ffi::DataType out) {
  if (is_turned) {
    RunAs<Turned<OfPanels>, W>(pool, c, scale, eps, out);
  } else {
    RunAs<A, W>(pool, c, scale, eps, out);
  }
  return ffi::Error::Success();
}

template <typename P>
ffi::Error RunRows(ffi::ThreadPool& pool, Call& c, const P* scale, float eps, ffi::DataType weight, bool is_turned, ffi::DataType out) {
  if (is_turned && weight == ffi::F16) return ffi::Error::Internal("no panels of this type");
  switch (weight) {
    case ffi::F32: return RunEither<Singles, Singles, float>(is_turned, pool, c, scale, eps, out);
    case ffi::F16: RunAs<Singles, Half>(pool, c, scale, eps, out); return ffi::Error::Success();
    case ffi::BF16:
#ifdef __AVX512BF16__
      if constexpr (std::is_same_v<P, BFloat16>) return RunEither<Pairs, Pairs, BFloat16>(is_turned, pool, c, scale, eps, out);
#endif
      return RunEither<WidePairs, Singles, BFloat16>(is_turned, pool, c, scale, eps, out);
    case ffi::U16:  // packed
#ifdef __AVX512BF16__
      if constexpr (std::is_same_v<P, BFloat16>) {
        RunAs<Packed<Pairs>, BFloat16>(pool, c, scale, eps, out);
        return ffi::Error::Success();
      }
#endif
      return ffi::Error::Internal("packed panels are for rows of bfloat16, and a processor that multiplies these");
    // Rows are rounded too: every sum is exact before it is rounded to a float once.
    case ffi::S8: return RunEither<Quads, Quads, Int8>(is_turned, pool, c, scale, eps, out);
    default: return ffi::Error::Internal("unknown type of weight");
  }
}

// `scales` are of a weight of int8, one for each output. What is not given has no element.
ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::Buffer<ffi::F32> scales, ffi::Buffer<ffi::F32> bias,
                    ffi::AnyBuffer norm, ffi::AnyBuffer residual, ffi::Buffer<ffi::PRED> is_real, ffi::Result<ffi::AnyBuffer> out, float eps,
                    bool is_gated) {
  const auto xd = x.dimensions(), od = out->dimensions();
  Call c{.X = xd[0], .D = xd[1], .F = od[1], .is_gated = is_gated, .x = x.untyped_data(), .stride = xd[1], .weight = weight.untyped_data(),
         .scales = DataOrNull(scales), .bias = DataOrNull(bias), .residual = DataOrNull(residual), .is_real = DataOrNull(is_real),
         .out = out->untyped_data()};
  c.FindReal();
  return OfFloats(x.element_type(), [&](auto kind) {
    const auto* scale = static_cast<const decltype(kind)*>(DataOrNull(norm));
    return RunRows(pool, c, scale, eps, weight.element_type(), weight.dimensions().size() == 4, out->element_type());
  });
}

// Panels of bfloat16, [P, D / 2, 16, 2], as packed ones, and which of them can be: none where no product takes them.
ffi::Error PackAll(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> panels, ffi::Result<ffi::Buffer<ffi::U16>> packed,
                   ffi::Result<ffi::Buffer<ffi::PRED>> fits) {
  const auto d = panels.dimensions();
  const int64_t D = 2 * d[1];
  if (packed->dimensions()[1] * 2 != PackedBytes(D)) return ffi::Error::Internal("packed panels are told to have another size");
#ifdef __AVX512BF16__
  constexpr bool kHasProducts = true;
#else
  constexpr bool kHasProducts = false;
#endif
  const auto* from = static_cast<const uint16_t*>(panels.untyped_data());
  char* const to = static_cast<char*>(packed->untyped_data());
  ParallelFor(pool, d[0], [&, found = fits->typed_data()](int64_t panel) {
    found[panel] = kHasProducts && PackPanel(from + panel * D * kLanes, D, to + panel * PackedBytes(D));
  });
  return ffi::Error::Success();
}

// Rows of floats, as they are, times a weight of int8 with a scale for each output.
ffi::Error MultiplyInt8(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> weight, ffi::Buffer<ffi::F32> scales,
                        ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const auto xd = x.dimensions(), od = out->dimensions();
  Call c{.X = xd[0], .D = xd[1], .F = od[1], .is_gated = false, .x = x.typed_data(), .stride = xd[1], .weight = weight.typed_data(),
         .scales = scales.typed_data(), .out = out->typed_data()};
  c.FindReal();
  Run<Singles, Int8, float>(pool, c);
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(PackPanels, PackAll,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::Buffer<ffi::U16>>()
                                  .Ret<ffi::Buffer<ffi::PRED>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Matmul, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("is_gated"));
