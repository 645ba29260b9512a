// A token for each row of logits on a CPU, called by XLA through its foreign function interface.
//
// A row is one thread's, from its first logit to its token, so it has the same token in any company. What its filters keep are the
// logits from some value on, which is found among ever fewer of them and without a sort; noise is made only for tokens that could
// still win. The noise is that of `sample_logits/noise.py`.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "arrays.h"
#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

constexpr int kBlock = 64;                       // vectors of logits whose lanes' largest are kept: a lane of a block is a tile
constexpr int64_t kTaskNumbers = 16 << 10;       // of logits: fewer are not worth waking a thread
constexpr int kFairPasses = 40;                  // by the middle of two values, which logits rarely need; then by that of floats
constexpr float kMost = 15.95f;                  // of noise, rounded outwards: MOST of noise.py
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef uint32_t Words __attribute__((vector_size(64)));

// How a row samples. A filter that it does not use has the value for none: 0, 1 and 0.
struct Row {
  bool is_greedy;
  float temperature, inverse;
  int32_t top_k;
  float top_p, min_p;
  uint32_t first, second;  // its key
};

// The lanes where `is_in`, one after the other; returns how many. There is room for sixteen.
INLINE int Pack(Ints is_in, Vec x, float* out) {
#ifdef __AVX512F__
  const __m512i bits = reinterpret_cast<__m512i>(is_in);
  const __mmask16 mask = _mm512_test_epi32_mask(bits, bits);
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, reinterpret_cast<__m512>(x)));
  return __builtin_popcount(mask);
#else
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    out[count] = x[i];
    count -= is_in[i];
  }
  return count;
#endif
}

INLINE bool IsAny(Ints x) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(x));
#else
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= x[i] != 0;
  return found;
#endif
}

// Of numbers x <= 0, as vectors.h has it of one.
INLINE Vec Exp(Vec x) {
  alignas(64) float numbers[kLanes];
  Store(numbers, x);
  for (int i = 0; i < kLanes; ++i) numbers[i] = ExpNonPositive(numbers[i]);
  return Load(numbers);
}

// Of positive numbers that are normal, within 2 ulp: the polynomial of the classic Cephes logf.
INLINE Vec Log(Vec x) {
  // Mantissas from sqrt(0.5) to sqrt(2), so that a logarithm near 0 loses nothing.
  const Ints bits = reinterpret_cast<Ints>(x), shifted = bits - 0x3f3504f3;
  const Vec e = __builtin_convertvector(shifted >> 23, Vec);
  const Vec r = reinterpret_cast<Vec>((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const Vec square = r * r;
  return e * 0.693359375f + (r + (square * r * p - e * 2.12194440e-4f - square * 0.5f));
}

// Threefry-2x32 in 20 rounds of the counters (0, token), and what Gumbel makes of it.
INLINE Vec Noise(const Row& row, Words token) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t schedule[3] = {row.first, row.second, row.first ^ row.second ^ 0x1bd11bdau};
  Words x = Words{} + schedule[0], y = token + schedule[1];
  UNROLL for (int group = 0; group < 5; ++group) {
    UNROLL for (int round = 0; round < 4; ++round) {
      const int distance = kRotations[group % 2][round];
      x += y;
      y = x ^ (y << distance | y >> (32 - distance));
    }
    x += schedule[(group + 1) % 3];
    y += schedule[(group + 2) % 3] + (group + 1);
  }
  const Vec fraction = reinterpret_cast<Vec>((x ^ y) >> 9 | 0x3f800000u) - 1.0f, tiny = Vec{} + FLT_MIN;
  return -Log(-Log(fraction > tiny ? fraction : tiny));
}

// A row's logits as floats: -inf for NaN, the largest finite number for +inf.
template <typename P>
struct Logits {
  const P* from;
  int64_t V;

  INLINE Vec Clean(Vec x) const {
    const Vec least = Vec{} - kInfinity, most = Vec{} + FLT_MAX;
    x = x == x ? x : least;
    return x < most ? x : most;
  }

  // Calls f(sixteen logits, the first one's token) from vector `begin` to vector `end`; -inf after the last.
  template <typename F>
  INLINE void Each(int64_t begin, int64_t end, const F& f) const {
    const int64_t whole = std::min(end, V / kLanes);
    for (int64_t i = begin; i < whole; ++i) f(Clean(Load(from + i * kLanes)), i * kLanes);
    if (whole < end) {
      const int32_t rest = V - whole * kLanes;
      f(kPlaces < rest ? Clean(LoadSome(from + whole * kLanes, rest)) : Vec{} - kInfinity, whole * kLanes);
    }
  }
  int64_t NumVectors() const { return (V + kLanes - 1) / kLanes; }
  int64_t NumBlocks() const { return (NumVectors() + kBlock - 1) / kBlock; }

  // The same of block `b`.
  template <typename F>
  INLINE void OfBlock(int64_t b, const F& f) const {
    Each(b * kBlock, std::min((b + 1) * kBlock, NumVectors()), f);
  }
};

// Room for what is found in one row after the other.
struct Storage {
  std::vector<float> peaks;             // of each block, sixteen tiles
  std::vector<float> values, weights;   // of tokens that a filter has to decide on
  std::vector<float> values2, weights2;

  static void Reserve(std::vector<float>& x, int64_t count) {
    if (static_cast<int64_t>(x.size()) < count + kLanes) x.resize(count + kLanes);
  }
};

// The largest logit of each tile, and of all.
template <typename P>
__attribute__((noinline)) float FindPeaks(const Logits<P>& logits, std::vector<float>& peaks) {
  const int64_t num_blocks = logits.NumBlocks();
  Storage::Reserve(peaks, num_blocks * kLanes);
  Vec highest = Vec{} - kInfinity;
  for (int64_t b = 0; b < num_blocks; ++b) {
    Vec peak = Vec{} - kInfinity;
    logits.OfBlock(b, [&](Vec x, int64_t) { peak = x > peak ? x : peak; });
    Store(peaks.data() + b * kLanes, peak);
    highest = peak > highest ? peak : highest;
  }
  return Largest(highest);
}

// The first token of the largest logit.
template <typename P>
__attribute__((noinline)) int32_t FindFirst(const Logits<P>& logits, const std::vector<float>& peaks, float highest) {
  int64_t b = 0;
  while (Largest(Load(peaks.data() + b * kLanes)) < highest) ++b;
  int32_t found = std::numeric_limits<int32_t>::max();
  logits.OfBlock(b, [&](Vec x, int64_t token) {
    if (found == std::numeric_limits<int32_t>::max() && IsAny(x == highest))
      for (int i = kLanes; i--;)
        if (x[i] == highest) found = token + i;
  });
  return found;
}

// The k-th largest of a row's logits from `least` on, or `least` where there are fewer.
template <typename P>
__attribute__((noinline)) float FindKth(const Logits<P>& logits, int64_t k, float least, Storage& room) {
  const int64_t num_tiles = logits.NumBlocks() * kLanes;
  if (k <= num_tiles) {  // so many tiles have one that is as large as the k-th of their largest
    Storage::Reserve(room.values, num_tiles);
    std::copy(room.peaks.begin(), room.peaks.begin() + num_tiles, room.values.begin());
    std::nth_element(room.values.begin(), room.values.begin() + k - 1, room.values.begin() + num_tiles, std::greater<float>());
    least = std::max(least, room.values[k - 1]);
  }
  Storage::Reserve(room.values, logits.V);
  int64_t count = 0;
  logits.Each(0, logits.NumVectors(), [&](Vec x, int64_t) {
    const Ints is_in = x >= least;
    if (IsAny(is_in)) count += Pack(is_in, x, room.values.data() + count);
  });
  if (count <= k) return least;
  std::nth_element(room.values.begin(), room.values.begin() + k - 1, room.values.begin() + count, std::greater<float>());
  return room.values[k - 1];
}

// Some tokens: how many, what they weigh together, their smallest and their largest logit.
struct Some {
  int64_t count = 0;
  double weight = 0.0;
  Vec smallest = Vec{} + kInfinity, largest = Vec{} - kInfinity;
};

// Of those among the first `count` values that are at least `pivot`, if is_upper, or less: packed to out, which may be where they are.
template <bool is_upper>
__attribute__((noinline)) Some Part(const float* values, const float* weights, int64_t count, float pivot, float* out_values, float* out_weights) {
  Some part;
  for (int64_t i = 0; i < count;) {
    Vec total = {};
    for (const int64_t end = std::min(count, i + kBlock * kLanes); i < end; i += kLanes) {
      const Vec x = Load(values + i), w = Load(weights + i);
      const Ints is_in = (kPlaces < static_cast<int32_t>(count - i)) & (is_upper ? x >= pivot : x < pivot);
      Pack(is_in, w, out_weights + part.count);
      part.count += Pack(is_in, x, out_values + part.count);
      total += is_in ? w : Vec{};
      const Vec low = is_in ? x : part.smallest, high = is_in ? x : part.largest;
      part.smallest = low < part.smallest ? low : part.smallest;
      part.largest = high > part.largest ? high : part.largest;
    }
    part.weight += Sum(total);
  }
  return part;
}

// A number about in the middle of those that floats have between two, and the larger one at most.
float Between(float low, float high) {
  const auto flip = [](int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); };  // to integers of the same order, and back
  int32_t a, b;
  std::memcpy(&a, &low, sizeof a);
  std::memcpy(&b, &high, sizeof b);
  const int64_t first = flip(a), last = flip(b);
  const int32_t middle = flip(static_cast<int32_t>(first + (last - first + 1) / 2));
  float found;
  std::memcpy(&found, &middle, sizeof found);
  return found;
}

// The largest value from which on a row's tokens hold top_p of the weight of those from `least` on.
template <typename P>
__attribute__((noinline)) float FindNucleus(const Logits<P>& logits, const Row& row, float highest, float least, Storage& room) {
  for (auto* x : {&room.values, &room.weights, &room.values2, &room.weights2}) Storage::Reserve(*x, logits.V);
  // The likeliest token weighs 1. V tokens that weigh less than (1 - p) / 2V each are no part of it; the 2 is for rounding.
  const float low = highest + row.temperature * std::log((1.0f - row.top_p) / (2.0f * static_cast<float>(logits.V)));
  const float bound = std::max(least, low);
  int64_t count = 0;
  double all = 0.0;
  for (int64_t b = 0; b < logits.NumBlocks(); ++b) {
    if (Largest(Load(room.peaks.data() + b * kLanes)) < least) continue;
    Vec total = {};
    logits.OfBlock(b, [&](Vec x, int64_t) {
      const Vec w = x >= least ? Exp((x - highest) * row.inverse) : Vec{};
      total += w;
      const Ints is_in = x >= bound;
      Pack(is_in, w, room.weights.data() + count);
      count += Pack(is_in, x, room.values.data() + count);
    });
    all += Sum(total);
  }
  const double wanted = row.top_p * all;
  float *values = room.values.data(), *weights = room.weights.data(), *values2 = room.values2.data(), *weights2 = room.weights2.data();
  double above = 0.0;  // what those weigh that are larger than all that are left
  float from = bound, to = highest;
  // What does not bring the ends nearer is the last pass: XLA's threads take subnormal numbers for 0.
  for (int pass = 0; from < to; ++pass) {
    float pivot = pass < kFairPasses ? from * 0.5f + to * 0.5f : Between(from, to);
    if (!(pivot > from && pivot <= to)) pivot = to;
    const Some upper = Part<true>(values, weights, count, pivot, values2, weights2);
    if (above + upper.weight >= wanted) {
      std::swap(values, values2);
      std::swap(weights, weights2);
      count = upper.count;
      const float smallest = -Largest(-upper.smallest);
      if (!(smallest > from)) return from;
      from = smallest;
    } else {
      const Some lower = Part<false>(values, weights, count, pivot, values, weights);
      const float largest = Largest(lower.largest);
      if (lower.count == 0 || !(largest < to)) return from;
      above += upper.weight;
      count = lower.count;
      to = largest;
    }
  }
  return from;
}

// The token of the largest noisy logit among those from `least` on, the lowest on ties. `first` is that of the largest logit.
template <typename P>
__attribute__((noinline)) int32_t Draw(const Logits<P>& logits, const Row& row, float highest, float least, int32_t first, const std::vector<float>& peaks) {
  Words winners = Words{} + first;
  Vec best = Noise(row, winners);
  float floor = Largest(best);
  constexpr int kTogether = 4 * kLanes;  // tokens that wait for their noise: one vector alone would wait for each instruction
  alignas(64) float scaled[kTogether + kLanes] = {}, places[kTogether + kLanes] = {};
  int waiting = 0;
  const auto compete = [&](int count) {
    UNROLL for (int i = 0; i < kTogether; i += kLanes) {
      Words tokens;
      std::memcpy(&tokens, places + i, sizeof tokens);
      Vec noisy = Load(scaled + i) + Noise(row, tokens);
      noisy = kPlaces < count - i ? noisy : Vec{} - kInfinity;
      const Ints is_better = (noisy > best) | ((noisy == best) & (tokens < winners));
      best = is_better ? noisy : best;
      winners = is_better ? tokens : winners;
    }
    floor = Largest(best);
  };
  for (int64_t b = 0; b < logits.NumBlocks(); ++b) {
    const float peak = Largest(Load(peaks.data() + b * kLanes));
    if (peak < least || (peak - highest) * row.inverse + kMost < floor) continue;
    logits.OfBlock(b, [&](Vec x, int64_t token) {
      const Vec distance = (x - highest) * row.inverse;
      const Ints is_in = (x >= least) & (distance + kMost >= floor);
      if (!IsAny(is_in)) return;
      const Ints tokens = kPlaces + static_cast<int32_t>(token);
      Pack(is_in, reinterpret_cast<Vec>(tokens), places + waiting);
      waiting += Pack(is_in, distance, scaled + waiting);
      if (waiting < kTogether) return;
      compete(kTogether);
      waiting -= kTogether;
      std::memcpy(scaled, scaled + kTogether, kLanes * sizeof *scaled);
      std::memcpy(places, places + kTogether, kLanes * sizeof *places);
    });
  }
  if (waiting) compete(waiting);
  const float most = Largest(best);
  int32_t token = std::numeric_limits<int32_t>::max();
  for (int i = 0; i < kLanes; ++i)
    if (best[i] == most) token = std::min<int32_t>(token, winners[i]);
  return token;
}

// The smallest number that is not below highest + distance, which far from 0 is a rounding away from their sum.
float Behind(float highest, float distance) {
  const float sum = highest + distance, part = sum - highest;
  const float lost = (highest - (sum - part)) + (distance - part);
  return lost > 0.0f ? std::nextafter(sum, kInfinity) : sum;
}

template <typename P>
int32_t Sample(const Logits<P>& logits, const Row& row, Storage& room) {
  const float highest = FindPeaks(logits, room.peaks);
  if (highest == -kInfinity) return 0;
  const int32_t first = FindFirst(logits, room.peaks, highest);
  if (row.is_greedy) return first;
  // Every filter keeps the logits from some value on, the likeliest token among them.
  float least = -FLT_MAX;
  if (row.min_p > 0.0f) least = std::max(least, Behind(highest, row.temperature * std::log(std::min(row.min_p, 1.0f))));
  if (row.top_k > 0) least = FindKth(logits, row.top_k, least, room);
  if (row.top_p < 1.0f) least = FindNucleus(logits, row, highest, least, room);
  return Draw(logits, row, highest, least, first, room.peaks);
}

ffi::Error SampleAll(ffi::ThreadPool pool, ffi::AnyBuffer logits, ffi::Buffer<ffi::PRED> is_greedy, ffi::Buffer<ffi::F32> temperatures,
                     ffi::Buffer<ffi::F32> inverses, ffi::Buffer<ffi::S32> top_ks, ffi::Buffer<ffi::F32> top_ps,
                     ffi::Buffer<ffi::F32> min_ps, ffi::Buffer<ffi::S32> first_keys, ffi::Buffer<ffi::S32> second_keys,
                     ffi::Result<ffi::Buffer<ffi::S32>> tokens) {
  const int64_t B = logits.dimensions()[0], V = logits.dimensions()[1], some = std::max<int64_t>(1, kTaskNumbers / V);
  return OfFloats(logits.element_type(), [&](auto kind) {
    using P = decltype(kind);
    ParallelFor(pool, (B + some - 1) / some, [&](int64_t task) {
      thread_local Storage room;
      for (int64_t b = task * some; b < std::min((task + 1) * some, B); ++b) {
        const Row row{.is_greedy = is_greedy.typed_data()[b], .temperature = temperatures.typed_data()[b], .inverse = inverses.typed_data()[b],
                      .top_k = top_ks.typed_data()[b], .top_p = top_ps.typed_data()[b], .min_p = min_ps.typed_data()[b],
                      .first = static_cast<uint32_t>(first_keys.typed_data()[b]), .second = static_cast<uint32_t>(second_keys.typed_data()[b])};
        tokens->typed_data()[b] = Sample(Logits<P>{static_cast<const P*>(logits.untyped_data()) + b * V, V}, row, room);
      }
    });
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SampleLogits, SampleAll,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
