// Paged attention and page writes for a CPU, called by XLA through its foreign function interface. Built for one HEAD_SIZE at a
// time, a multiple of 16, so that it builds in seconds and its loops are unrolled.
//
// One task is one row and one or more of its key/value heads. It walks the row's pages once, a block of tokens after the other and
// in each the heads, which lie behind each other, with an online softmax in float32, and touches no token outside [first visible,
// kv_len): what unused places hold, NaN or not, is never read. Many queries have pages of narrow numbers converted once for all. Where
// the processor multiplies pairs of bfloat16 and both queries and pages are of it, the softmax's weights are rounded to it too, subnormal
// numbers count as 0, and many queries meet the tokens as panels of a product, in sums of another order than those of few.
// Scales of pages never meet the pages' numbers: a key's multiplies its score, a value's its weight.
// The order of a head's sums depends on its own row alone, so a row's bits do not depend on the batch. Only that order counts here: this
// source is not built with -fassociative-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "arrays.h"
#include "parallel.h"
#include "tiles.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

constexpr int kBlock = 64;         // tokens whose scores are held at a time
constexpr int kTokens = 4;         // tokens whose keys are held at a time
constexpr float kLowest = -1e30f;  // stands for -inf: lowest - lowest is 0, not NaN

// tanh within 2 ulp, as plain: Cephes' polynomial near 0, where 1 - exp would cancel. A NaN fails the comparison and passes.
inline float Tanh(float x) {
  const float size = std::fabs(x), square = x * x;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float near = x + x * square * p;
  const float e = ExpNonPositive(-2.0f * size);
  const float far = std::copysign((1.0f - e) / (1.0f + e), x);
  return size < 0.625f ? near : far;
}

// One call. Optional arrays are null when they were not given.
struct Call {
  int64_t B, T, N, K, S, M;
  float scale, soft_cap;
  int64_t window;
  ffi::DataType kind;                    // of q and out
  const void* q;                         // [B, T, N, H]
  const void *k_pages, *v_pages;         // [P, K, S, H]
  const int32_t *tables, *kv_lens, *first;
  const float *sinks;                    // [N]
  const float *k_scales, *v_scales;      // [K], or [P, K, S] if has_token_scales
  bool has_token_scales;
  void* out;                             // [B, T, N, H]
  float* lse;                            // [B, T, N]
};

// What one query has gathered so far: the largest score, the sum of weights, and where its weighted values are.
struct Query {
  float* sum;  // [H]
  float peak, total;
  int64_t low, high;  // it sees positions [low, high)
};

// Where tokens lie in pages of type P. Pages lie anywhere, so the processor cannot foresee which comes next.
template <typename P>
struct Rows {
  int count = 0;
  const P *k[kBlock], *v[kBlock];  // keys are taken kTokens at a time: after the last stands that one again

  static void Fetch(const P* row, int64_t size) {
    for (int64_t i = 0; i < size; i += 64 / static_cast<int64_t>(sizeof(P))) __builtin_prefetch(row + i);
  }
};

template <typename P>
const Rows<P> kNothing{};

// Tokens [start, start + count) of a row. The scales are null, or those of its tokens.
struct Block {
  int64_t start;
  int count;
  float scale, soft_cap;
  const float *k_scales, *v_scales;
};

// Turns a query's scores of a block into what its values are to be multiplied by, and returns what its sum so far is to be. There is
// room for kBlock scores.
__attribute__((noinline)) float Weigh(Query& query, const Block& block, float* __restrict weights) {
  const int a = std::clamp<int64_t>(query.low - block.start, 0, block.count);
  const int b = std::clamp<int64_t>(query.high - block.start, 0, block.count);
  UNROLL for (int j = 0; j < kBlock; j += kLanes) Store(weights + j, Load(weights + j) * block.scale);
  if (block.k_scales)
    for (int j = a; j < b; ++j) weights[j] *= block.k_scales[j];
  if (block.soft_cap != 0.0f) {
    const float cap = block.soft_cap, inverse = 1.0f / cap;
    for (int j = a; j < b; ++j) weights[j] = cap * Tanh(weights[j] * inverse);
  }
  const auto seen = [&](int j, Vec x, Vec other) { return (kPlaces + j >= a) & (kPlaces + j < b) ? x : other; };
  const Vec so_far = Vec{} + query.peak;
  Vec peaks = so_far, totals = {};
  UNROLL for (int j = 0; j < kBlock; j += kLanes) {
    const Vec x = seen(j, Load(weights + j), so_far);
    peaks = x > peaks ? x : peaks;
    Store(weights + j, x);
  }
  const float peak = Largest(peaks);
  for (int j = 0; j < kBlock; ++j) weights[j] = ExpNonPositive(weights[j] - peak);
  UNROLL for (int j = 0; j < kBlock; j += kLanes) {
    const Vec x = seen(j, Load(weights + j), Vec{});
    totals += x;
    Store(weights + j, x);
  }
  const float rescale = ExpNonPositive(query.peak - peak);
  query.total = query.total * rescale + Sum(totals);
  query.peak = peak;
  if (block.v_scales)
    for (int j = a; j < b; ++j) weights[j] *= block.v_scales[j];
  return rescale;
}

// The next tokens that a step of a product with values takes, of which `count` are there: zeros for the others.
template <typename P>
INLINE Dwords Together(Singles, const P* const* rows, int, int64_t at) {
  return Singles::Of(*rows + at);
}
#ifdef __AVX512BF16__
INLINE Dwords Together(Pairs, const BFloat16* const* rows, int count, int64_t at) {
  const auto half = [&](int i) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + at))); };
  return reinterpret_cast<Dwords>(count > 1 ? _mm512_or_si512(half(0), _mm512_slli_epi32(half(1), 16)) : half(0));
}
#endif

// The numbers of a head that lane after lane multiplies at once, from the first on; zeros after its last.
template <typename A, int H, typename P>
INLINE Dwords Across(const P* row, int h) {
  return h + kLanes * A::kGroup <= H ? A::Of(row + h) : Last<A>(row + h, H - h);
}

// Weights as a product takes them.
INLINE void Round(const float* weights, int count, float* rounded) { std::memcpy(rounded, weights, count * sizeof *weights); }
#ifdef __AVX512BF16__
INLINE void Round(const float* weights, int count, BFloat16* rounded) {
  for (int j = 0; j < count; j += kLanes) {
    const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(Load(weights + j)));  // of weights subnormal numbers are 0
    std::memcpy(rounded + j, &narrow, sizeof narrow);
  }
}
#endif

// One block for NQ queries at once, whose numbers are `q`, so that a row of K or V is read once for all. V registers of kLanes make up
// a head. What comes `ahead` is fetched meanwhile, a few tokens with each few: asked for at once, it would hold up the reading of the
// block itself.
template <typename A, typename P, int V, int NQ>
inline void AttendBlock(Query* queries, const typename A::Row* q, const Rows<P>& rows, const Rows<P>& ahead, const Block& block) {
  constexpr int H = V * kLanes;
  float weights[NQ][kBlock];
  for (int j = 0; j < block.count; j += kTokens) {
    if (j < ahead.count)
      for (int t = 0; t < kTokens; ++t) ahead.Fetch(ahead.k[j + t], H);
    Vec dots[NQ][kTokens] = {};
    for (int h = 0; h < H; h += kLanes * A::kGroup) {
      Dwords k[kTokens];
      for (int t = 0; t < kTokens; ++t) k[t] = Across<A, H>(rows.k[j + t], h);
      for (int i = 0; i < NQ; ++i) {
        const Dwords numbers = Across<A, H>(q + i * H, h);
        for (int t = 0; t < kTokens; ++t) A::Add(dots[i][t], numbers, k[t]);
      }
    }
    for (int i = 0; i < NQ; ++i) StoreSums(weights[i] + j, dots[i]);
  }
  float rescale[NQ];
  typename A::Row rounded[NQ][kBlock];
  for (int i = 0; i < NQ; ++i) {
    rescale[i] = Weigh(queries[i], block, weights[i]);
    Round(weights[i], block.count, rounded[i]);
  }
  Vec sums[NQ][V];
  for (int i = 0; i < NQ; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = Load(queries[i].sum + v * kLanes) * rescale[i];
  for (int j = 0; j < block.count; j += A::kGroup) {
    for (int t = j; t < std::min<int>(j + A::kGroup, ahead.count); ++t) ahead.Fetch(ahead.v[t], H);
    for (int v = 0; v < V; ++v) {
      const Dwords value = Together(A{}, rows.v + j, block.count - j, v * kLanes);
      for (int i = 0; i < NQ; ++i) A::Add(sums[i][v], rounded[i] + j, value);
    }
  }
  for (int i = 0; i < NQ; ++i)
    for (int v = 0; v < V; ++v) Store(queries[i].sum + v * kLanes, sums[i][v]);
}

// The largest number of queries whose sums stay in the 32 registers beside what else is needed there.
template <int V>
constexpr int GroupSize() {
  return V <= 5 ? 4 : V <= 8 ? 2 : 1;
}

template <typename A, typename P, int V>
inline void AttendQueries(Query* queries, int num_queries, const typename A::Row* q, const Rows<P>& rows, const Rows<P>& ahead, const Block& block) {
  constexpr int kGroup = GroupSize<V>(), H = V * kLanes;
  const Rows<P>* next = &ahead;  // fetched once, while the first queries meet the block
  int i = 0;
  for (; i + kGroup <= num_queries; i += kGroup) {
    if (queries[i + kGroup - 1].high <= block.start) continue;  // the block is in these queries' future
    AttendBlock<A, P, V, kGroup>(queries + i, q + i * H, rows, *next, block);
    next = &kNothing<P>;
  }
  if constexpr (kGroup >= 4)
    if (num_queries - i == 3) return AttendBlock<A, P, V, 3>(queries + i, q + i * H, rows, *next, block);
  if constexpr (kGroup >= 2)
    for (; i + 2 <= num_queries; i += 2, next = &kNothing<P>) AttendBlock<A, P, V, 2>(queries + i, q + i * H, rows, *next, block);
  for (; i < num_queries; ++i, next = &kNothing<P>) AttendBlock<A, P, V, 1>(queries + i, q + i * H, rows, *next, block);
}

// A block's keys and values as panels: of sixteen tokens and all their numbers, and of sixteen numbers and all tokens.
template <typename A, int V>
struct TurnedBlock {
  static constexpr int H = V * kLanes, kSteps = H / A::kGroup;
  Dwords keys[kBlock / kLanes][kSteps], values[V][kBlock / A::kGroup];

  template <typename P>
  TurnedBlock(const Rows<P>& rows, const Rows<P>& ahead) {
    constexpr int kStep = kLanes * A::kGroup;
    for (int p = 0; p * kLanes < rows.count; ++p)
      for (int h = 0; h < H; h += kStep) {
        Dwords block[kLanes];
        for (int i = 0; i < kLanes; ++i) {  // after the last stands that one again
          block[i] = Across<A, H>(rows.k[std::min(p * kLanes + i, rows.count - 1)], h);
          if (p * kLanes + i < ahead.count && h == 0) ahead.Fetch(ahead.k[p * kLanes + i], H);
        }
        Transpose(block);
        std::memcpy(&keys[p][h / A::kGroup], block, sizeof *block * std::min(kLanes, kSteps - h / A::kGroup));
      }
    for (int j = 0; j < rows.count; j += A::kGroup) {
      for (int v = 0; v < V; ++v) values[v][j / A::kGroup] = Together(A{}, rows.v + j, rows.count - j, v * kLanes);
      for (int i = j; i < std::min<int>(j + A::kGroup, ahead.count); ++i) ahead.Fetch(ahead.v[i], H);
    }
  }
};

// One block for up to kRows queries, whose numbers are `q`, as products of tiles.
template <typename A, int V>
void AttendTurned(Query* queries, int num_queries, const typename A::Row* q, const TurnedBlock<A, V>& turned, const Block& block) {
  constexpr int H = V * kLanes;
  using Row = typename A::Row;
  alignas(64) float weights[kRows][kBlock];
  alignas(64) Row rounded[kRows][kBlock];
  Vec sums[kPanels * kRows];
  const auto multiply = [&](const Row* rows, int64_t stride, const Dwords* first, const Dwords* second, int64_t steps) {
    const Panels panels{{reinterpret_cast<const char*>(first), reinterpret_cast<const char*>(second)}, {}};
    Tiles<A>(num_queries, rows, stride, panels, steps, {{panels.from[0], panels.from[1]}, 0}, sums);
  };
  for (int p = 0; p * kLanes < block.count; p += kPanels) {
    multiply(q, H, turned.keys[p], turned.keys[(p + 1) * kLanes < block.count ? p + 1 : p], turned.kSteps);
    for (int i = 0; i < kPanels; ++i)
      for (int r = 0; r < num_queries; ++r) Store(weights[r] + (p + i) * kLanes, sums[i * kRows + r]);
  }
  const int steps = (block.count + A::kGroup - 1) / A::kGroup;
  float rescale[kRows];
  for (int r = 0; r < num_queries; ++r) {
    rescale[r] = Weigh(queries[r], block, weights[r]);
    Round(weights[r], block.count, rounded[r]);
  }
  for (int v = 0; v < V; v += kPanels) {
    multiply(rounded[0], kBlock, turned.values[v], turned.values[std::min(v + 1, V - 1)], steps);
    for (int i = 0; i < std::min(kPanels, V - v); ++i)
      for (int r = 0; r < num_queries; ++r) {
        float* sum = queries[r].sum + (v + i) * kLanes;
        Store(sum, Load(sum) * rescale[r] + sums[i * kRows + r]);
      }
  }
}

// The slots of a row's head one after another, without a division for each.
class Slots {
 public:
  Slots(const Call& c, int64_t b, int64_t head, int64_t position)
      : pages_(c.tables + b * c.M + position / c.S), offset_(position % c.S), head_(head), K_(c.K), S_(c.S) {}
  int64_t operator*() const { return (*pages_ * K_ + head_) * S_ + offset_; }
  void operator++() {
    if (++offset_ == S_) ++pages_, offset_ = 0;
  }

 private:
  const int32_t* pages_;
  int64_t offset_, head_, K_, S_;
};

// Where the block after that of a position begins: blocks are those of the sequence, whatever window a row begins to see it by.
inline int64_t After(int64_t position) { return (position / kBlock + 1) * kBlock; }

// The tokens of a row's head from a position on to the end of their block.
template <typename P>
void Find(const Call& c, int64_t b, int64_t head, int64_t start, Rows<P>& rows) {
  rows.count = std::max<int64_t>(0, std::min<int64_t>(c.kv_lens[b], After(start)) - start);
  Slots slot(c, b, head, start);
  for (int j = 0; j < rows.count; ++j, ++slot) {
    rows.k[j] = static_cast<const P*>(c.k_pages) + *slot * HEAD_SIZE;
    rows.v[j] = static_cast<const P*>(c.v_pages) + *slot * HEAD_SIZE;
  }
  for (int j = rows.count; j % kTokens; ++j) rows.k[j] = rows.k[rows.count - 1];
}

// A block for many queries of a head.
template <typename A, typename P, int V>
void AttendTile(Query* queries, int64_t num_queries, const typename A::Row* q, const Rows<P>& rows, const Rows<P>& ahead, const Block& block) {
  const TurnedBlock<A, V> turned(rows, ahead);
  for (int64_t i = 0; i < num_queries; i += kRows) {
    const int count = std::min<int64_t>(kRows, num_queries - i);
    if (queries[i + count - 1].high <= block.start) continue;  // the block is in these queries' future
    AttendTurned<A, V>(queries + i, count, q + i * V * kLanes, turned, block);
  }
}

// A block's numbers as floats, where many queries read each of them.
template <int V>
struct Converted {
  static constexpr int H = V * kLanes;
  alignas(64) float k[kBlock][H], v[kBlock][H];
  Rows<float> rows;

  template <typename P>
  const Rows<float>& Of(const Rows<P>& from, const Rows<P>& ahead) {
    rows.count = from.count;
    for (int j = 0; j < from.count; ++j) {
      rows.k[j] = k[j], rows.v[j] = v[j];
      for (int h = 0; h < H; h += kLanes) Store(k[j] + h, Load(from.k[j] + h)), Store(v[j] + h, Load(from.v[j] + h));
      if (j < ahead.count) ahead.Fetch(ahead.k[j], H), ahead.Fetch(ahead.v[j], H);
    }
    for (int j = from.count; j % kTokens; ++j) rows.k[j] = rows.k[from.count - 1];
    return rows;
  }
};

// What a query's numbers are read from and a result's written to, a vector at a time.
INLINE Vec LoadOf(ffi::DataType kind, const void* p, int64_t at) {
  if (kind == ffi::BF16) return Load(static_cast<const BFloat16*>(p) + at);
  return kind == ffi::F16 ? Load(static_cast<const Half*>(p) + at) : Load(static_cast<const float*>(p) + at);
}
INLINE void StoreOf(ffi::DataType kind, void* p, int64_t at, Vec x) {
  if (kind == ffi::BF16) return StoreSome(static_cast<BFloat16*>(p) + at, x, kLanes);
  kind == ffi::F16 ? StoreSome(static_cast<Half*>(p) + at, x, kLanes) : StoreSome(static_cast<float*>(p) + at, x, kLanes);
}

// The queries of row b that share one of the key/value heads from `begin` to `end`. A head is V * kLanes numbers. Products are
// made of A.
template <typename A, typename P, int V>
void AttendRow(const Call& c, int64_t b, int64_t begin, int64_t end) {
  constexpr int H = V * kLanes;
  using Row = typename A::Row;
  const int64_t kv_len = c.kv_lens[b], first = c.first[b];
  const int G = c.N / c.K, num_queries = G * c.T;  // of a head
  const bool are_many = num_queries > 2 * GroupSize<V>();
  const bool has_head_scales = c.k_scales && !c.has_token_scales;
  const size_t num_all = num_queries * (end - begin);
  // Reused by every task of a thread: an allocation for each costs more than a short row.
  thread_local std::vector<Vec> buffer;  // of whole lines of the cache: a load across two takes twice as long
  thread_local std::vector<Query> queries;
  buffer.resize(num_all * 2 * V);  // more than the numbers of bfloat16 take
  queries.resize(num_all);
  auto* sums = reinterpret_cast<float*>(buffer.data());
  auto* q = reinterpret_cast<Row*>(sums + num_all * H);
  const auto each = [&](const auto& visit) {
    for (int64_t head = begin, i = 0; head < end; ++head)
      for (int64_t t = 0; t < c.T; ++t)
        for (int64_t g = 0; g < G; ++g, ++i) visit(queries[i], i, head, t, head * G + g);
  };

  each([&](Query& query, int64_t i, int64_t head, int64_t t, int64_t n) {
    for (int h = 0; h < H; h += kLanes) StoreSome(q + i * H + h, LoadOf(c.kind, c.q, ((b * c.T + t) * c.N + n) * H + h), kLanes);
    std::fill(sums + i * H, sums + (i + 1) * H, 0.0f);
    const int64_t high = std::min(kv_len, first + t + 1);
    const int64_t low = c.window ? std::max<int64_t>(0, first + t + 1 - c.window) : 0;
    // A sink is a first score whose value is 0.
    const float peak = c.sinks ? std::max(c.sinks[n], kLowest) : kLowest;
    query = {sums + i * H, peak, c.sinks ? 1.0f : 0.0f, low, high};
  });

  Rows<P> found[2];
  Rows<P>*rows = &found[0], *ahead = &found[1];
  int64_t start = num_all ? queries[0].low : kv_len, head = begin;
  Find(c, b, head, start, *rows);
  while (start < kv_len) {
    const float scale = c.scale * kUnit<P> * (has_head_scales ? c.k_scales[head] : 1.0f);
    Block block{start, rows->count, scale, c.soft_cap, nullptr, nullptr};
    float k_scales[kBlock], v_scales[kBlock];
    if (c.has_token_scales) {
      Slots slot(c, b, head, start);
      for (int j = 0; j < block.count; ++j, ++slot) k_scales[j] = c.k_scales[*slot], v_scales[j] = c.v_scales[*slot];
      block.k_scales = k_scales, block.v_scales = v_scales;
    }
    const int64_t mine = (head - begin) * num_queries;
    if (++head == end) head = begin, start = After(start);
    Find(c, b, head, start, *ahead);
    if (!are_many || std::is_same_v<P, float>) {
      AttendQueries<A, P, V>(&queries[mine], num_queries, q + mine * H, *rows, *ahead, block);
    } else if constexpr (A::kGroup > 1) {
      AttendTile<A, P, V>(&queries[mine], num_queries, q + mine * H, *rows, *ahead, block);
    } else {
      Converted<V> converted;
      AttendQueries<A, float, V>(&queries[mine], num_queries, q + mine * H, converted.Of(*rows, *ahead), kNothing<float>, block);
    }
    std::swap(rows, ahead);
  }

  each([&](const Query& query, int64_t, int64_t head, int64_t t, int64_t n) {
    const float out_scale = kUnit<P> * (has_head_scales ? c.v_scales[head] : 1.0f);
    const bool is_empty = query.total == 0.0f || kv_len == 0;
    const float inverse = is_empty ? 0.0f : out_scale / query.total;
    const int64_t at = (b * c.T + t) * c.N + n;
    for (int h = 0; h < H; h += kLanes) StoreOf(c.kind, c.out, at * H + h, Load(query.sum + h) * inverse);
    c.lse[at] = is_empty ? -std::numeric_limits<float>::infinity() : query.peak + std::log(query.total);
  });
}

template <typename P, typename A = Singles>
void AttendAll(ffi::ThreadPool& pool, const Call& c) {
  int64_t longest = 0, total = 0;
  for (int64_t b = 0; b < c.B; ++b) {
    const int64_t len = c.window ? std::min<int64_t>(c.kv_lens[b], c.window + c.T) : c.kv_lens[b];
    longest = std::max(longest, len), total += len;
  }
  if (c.B == 0 || c.K == 0) return;
  // A row is parted by its heads where it is much of all there is to do, so that every thread has some; so is a tile, whose queries
  // would not stay in the cache.
  const int64_t share = (4 * NumThreads(pool) * longest + total - 1) / std::max<int64_t>(1, total);
  const int64_t wanted = c.T > 1 ? c.K : std::clamp<int64_t>(share, 1, c.K);
  const int64_t heads = (c.K + wanted - 1) / wanted, parts = (c.K + heads - 1) / heads;
  ParallelFor(pool, c.B * parts, [&](int64_t task) {
    const int64_t head = task % parts * heads;
    AttendRow<A, P, HEAD_SIZE / kLanes>(c, task / parts, head, std::min(head + heads, c.K));
  });
}

// Pages of narrow floats travel as unsigned integers; `kind` says what they are. Optional arrays have no element when not given.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> tables,
                  ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::F32> sinks,
                  ffi::Buffer<ffi::F32> k_scales, ffi::Buffer<ffi::F32> v_scales, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::Buffer<ffi::F32>> lse, float scale, float soft_cap, int64_t window, int64_t kind) {
  auto qd = q.dimensions();
  auto kd = k.dimensions();
  if (qd[3] != HEAD_SIZE) return ffi::Error::Internal("built for another head size");
  const Call c{.B = qd[0], .T = qd[1], .N = qd[2], .K = kd[1], .S = kd[2], .M = tables.dimensions()[1],
               .scale = scale, .soft_cap = soft_cap, .window = window,
               .kind = q.element_type(), .q = q.untyped_data(), .k_pages = k.untyped_data(), .v_pages = v.untyped_data(),
               .tables = tables.typed_data(), .kv_lens = kv_lens.typed_data(), .first = first.typed_data(),
               .sinks = DataOrNull(sinks), .k_scales = DataOrNull(k_scales), .v_scales = DataOrNull(v_scales),
               .has_token_scales = k_scales.element_count() > 0 && k_scales.dimensions().size() == 3,
               .out = out->untyped_data(), .lse = lse->typed_data()};
  if (c.kind != ffi::F32 && c.kind != ffi::BF16 && c.kind != ffi::F16) return ffi::Error::Internal("unknown kind of queries");
  switch (kind) {
    case 0: AttendAll<float>(pool, c); break;
    case 1:
#ifdef __AVX512BF16__
      if (c.kind == ffi::BF16) {
        AttendAll<BFloat16, Pairs>(pool, c);
        break;
      }
#endif
      AttendAll<BFloat16>(pool, c);
      break;
    case 2: AttendAll<Half>(pool, c); break;
    case 3: AttendAll<Float8>(pool, c); break;
    case 4: AttendAll<Int8>(pool, c); break;
    default: return ffi::Error::Internal("unknown kind of pages");
  }
  return ffi::Error::Success();
}

// pages [P, K, S, H] is updated in place: `out` is the same buffer. Elements only move, so their type does not matter.
ffi::Error Write(ffi::AnyBuffer pages, ffi::AnyBuffer fresh, ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> out) {
  if (pages.untyped_data() != out->untyped_data()) return ffi::Error::Internal("the page pool was not updated in place");
  auto d = pages.dimensions();
  const int64_t K = d[1], S = d[2], row = d[3] * ffi::ByteWidth(pages.element_type());
  auto* target = static_cast<char*>(out->untyped_data());
  auto* source = static_cast<const char*>(fresh.untyped_data());
  for (size_t x = 0; x < slots.element_count(); ++x) {
    const int64_t slot = slots.typed_data()[x];
    for (int64_t k = 0; k < K; ++k) std::memcpy(target + ((slot / S * K + k) * S + slot % S) * row, source + (x * K + k) * row, row);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PagedAttend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("kind"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(WritePages, Write,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::AnyBuffer>());
