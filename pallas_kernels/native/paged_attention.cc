// Paged attention and page writes for a CPU, called by XLA through its foreign function interface. Built for one HEAD_SIZE at a
// time, a multiple of 16, so that it builds in seconds and its loops are unrolled.
//
// One task is one row and one or more of its key/value heads. It walks the row's pages once, a block of tokens after the other and
// in each the heads, which lie behind each other, with an online softmax in float32, and touches no token outside [first visible,
// kv_len): what unused places hold, NaN or not, is never read.
// Scales of pages never meet the pages' numbers: a key's multiplies its score, a value's its weight.
// The order of a head's sums depends on its own row alone, so a row's bits do not depend on the batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "parallel.h"
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
  const float* q;                        // [B, T, N, H]
  const void *k_pages, *v_pages;         // [P, K, S, H]
  const int32_t *tables, *kv_lens, *first;
  const float *sinks;                    // [N]
  const float *k_scales, *v_scales;      // [K], or [P, K, S] if has_token_scales
  bool has_token_scales;
  float *out, *lse;                      // [B, T, N, H], [B, T, N]
};

// What one query has gathered so far: the largest score, the sum of weights, and where its weighted values are.
struct Query {
  const float* q;  // [H], scaled
  float* sum;      // [H]
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
  float soft_cap;
  const float *k_scales, *v_scales;
};

// Turns a query's scores of a block into what its values are to be multiplied by, and returns what its sum so far is to be.
__attribute__((noinline)) float Weigh(Query& query, const Block& block, float* weights) {
  const int count = block.count;
  const int a = std::clamp<int64_t>(query.low - block.start, 0, count);
  const int b = std::clamp<int64_t>(query.high - block.start, 0, count);
  if (block.k_scales)
    for (int j = a; j < b; ++j) weights[j] *= block.k_scales[j];
  if (block.soft_cap != 0.0f) {
    const float cap = block.soft_cap, inverse = 1.0f / cap;
    for (int j = a; j < b; ++j) weights[j] = cap * Tanh(weights[j] * inverse);
  }
  float peak = query.peak;
  for (int j = a; j < b; ++j) peak = weights[j] > peak ? weights[j] : peak;
  float total = 0.0f;
  for (int j = 0; j < a; ++j) weights[j] = 0.0f;
  for (int j = a; j < b; ++j) weights[j] = ExpNonPositive(weights[j] - peak);
  for (int j = b; j < count; ++j) weights[j] = 0.0f;
  for (int j = a; j < b; ++j) total += weights[j];
  const float rescale = ExpNonPositive(query.peak - peak);
  query.total = query.total * rescale + total;
  query.peak = peak;
  if (block.v_scales)
    for (int j = a; j < b; ++j) weights[j] *= block.v_scales[j];
  return rescale;
}

// One block for NQ queries at once, so that a row of K or V is read once for all. V registers of kLanes make up a head. What comes
// `ahead` is fetched meanwhile, a few tokens with each few: asked for at once, it would hold up the reading of the block itself.
template <typename P, int V, int NQ>
inline void AttendBlock(Query* queries, const Rows<P>& rows, const Rows<P>& ahead, const Block& block) {
  constexpr int H = V * kLanes;
  float weights[NQ][kBlock];
  for (int j = 0; j < block.count; j += kTokens) {
    if (j < ahead.count)
      for (int t = 0; t < kTokens; ++t) ahead.Fetch(ahead.k[j + t], H);
    Vec dots[NQ][kTokens] = {};
    for (int v = 0; v < V; ++v) {
      Vec k[kTokens];
      for (int t = 0; t < kTokens; ++t) k[t] = Load(rows.k[j + t] + v * kLanes);
      for (int i = 0; i < NQ; ++i) {
        const Vec q = Load(queries[i].q + v * kLanes);
        for (int t = 0; t < kTokens; ++t) dots[i][t] += q * k[t];
      }
    }
    for (int i = 0; i < NQ; ++i) StoreSums(weights[i] + j, dots[i]);
  }
  float rescale[NQ];
  for (int i = 0; i < NQ; ++i) rescale[i] = Weigh(queries[i], block, weights[i]);
  Vec sums[NQ][V];
  for (int i = 0; i < NQ; ++i)
    for (int v = 0; v < V; ++v) sums[i][v] = Load(queries[i].sum + v * kLanes) * rescale[i];
  for (int j = 0; j < block.count; ++j) {
    if (j < ahead.count) ahead.Fetch(ahead.v[j], H);
    for (int v = 0; v < V; ++v) {
      const Vec value = Load(rows.v[j] + v * kLanes);
      for (int i = 0; i < NQ; ++i) sums[i][v] += weights[i][j] * value;
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

template <typename P, int V>
inline void AttendQueries(Query* queries, int num_queries, const Rows<P>& rows, const Rows<P>& ahead, const Block& block) {
  constexpr int kGroup = GroupSize<V>();
  const Rows<P>* next = &ahead;  // fetched once, while the first queries meet the block
  int i = 0;
  for (; i + kGroup <= num_queries; i += kGroup) {
    if (queries[i + kGroup - 1].high <= block.start) continue;  // the block is in these queries' future
    AttendBlock<P, V, kGroup>(queries + i, rows, *next, block);
    next = &kNothing<P>;
  }
  if constexpr (kGroup >= 4)
    if (num_queries - i == 3) return AttendBlock<P, V, 3>(queries + i, rows, *next, block);
  if constexpr (kGroup >= 2)
    for (; i + 2 <= num_queries; i += 2, next = &kNothing<P>) AttendBlock<P, V, 2>(queries + i, rows, *next, block);
  for (; i < num_queries; ++i, next = &kNothing<P>) AttendBlock<P, V, 1>(queries + i, rows, *next, block);
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

// The tokens of a row's head from a position on, at most a block of them.
template <typename P>
void Find(const Call& c, int64_t b, int64_t head, int64_t start, Rows<P>& rows) {
  rows.count = std::clamp<int64_t>(c.kv_lens[b] - start, 0, kBlock);
  Slots slot(c, b, head, start);
  for (int j = 0; j < rows.count; ++j, ++slot) {
    rows.k[j] = static_cast<const P*>(c.k_pages) + *slot * HEAD_SIZE;
    rows.v[j] = static_cast<const P*>(c.v_pages) + *slot * HEAD_SIZE;
  }
  for (int j = rows.count; j % kTokens; ++j) rows.k[j] = rows.k[rows.count - 1];
}

// The queries of row b that share one of the key/value heads from `begin` to `end`. A head is V * kLanes numbers.
template <typename P, int V>
void AttendRow(const Call& c, int64_t b, int64_t begin, int64_t end) {
  constexpr int H = V * kLanes;
  const int64_t kv_len = c.kv_lens[b], first = c.first[b];
  const int G = c.N / c.K, num_queries = G * c.T;  // of a head
  const bool converts = !std::is_same_v<P, float> && num_queries > 2 * GroupSize<V>();
  const bool has_head_scales = c.k_scales && !c.has_token_scales;
  const size_t num_all = num_queries * (end - begin);
  // Reused by every task of a thread: an allocation for each costs more than a short row.
  thread_local std::vector<Vec> buffer;  // of whole lines of the cache: a load across two takes twice as long
  thread_local std::vector<Query> queries;
  buffer.resize(num_all * 2 * V + 2 * kBlock * V);
  queries.resize(num_all);
  auto* numbers = reinterpret_cast<float*>(buffer.data());
  float* k_block = numbers + num_all * 2 * H;
  float* v_block = k_block + kBlock * H;
  const auto each = [&](const auto& visit) {
    for (int64_t head = begin, i = 0; head < end; ++head)
      for (int64_t t = 0; t < c.T; ++t)
        for (int64_t g = 0; g < G; ++g, ++i) visit(queries[i], i, head, t, head * G + g);
  };

  each([&](Query& query, int64_t i, int64_t head, int64_t t, int64_t n) {
    const float q_scale = c.scale * kUnit<P> * (has_head_scales ? c.k_scales[head] : 1.0f);
    const float* source = c.q + ((b * c.T + t) * c.N + n) * H;
    float* scaled = numbers + i * 2 * H;
    for (int h = 0; h < H; ++h) scaled[h] = source[h] * q_scale;
    std::fill(scaled + H, scaled + 2 * H, 0.0f);
    const int64_t high = std::min(kv_len, first + t + 1);
    const int64_t low = c.window ? std::max<int64_t>(0, first + t + 1 - c.window) : 0;
    // A sink is a first score whose value is 0.
    const float peak = c.sinks ? std::max(c.sinks[n], kLowest) : kLowest;
    query = {scaled, scaled + H, peak, c.sinks ? 1.0f : 0.0f, low, high};
  });

  Rows<P> found[2];
  Rows<P>*rows = &found[0], *ahead = &found[1];
  int64_t start = num_all ? queries[0].low : kv_len, head = begin;
  Find(c, b, head, start, *rows);
  while (start < kv_len) {
    Block block{start, rows->count, c.soft_cap, nullptr, nullptr};
    float k_scales[kBlock], v_scales[kBlock];
    if (c.has_token_scales) {
      Slots slot(c, b, head, start);
      for (int j = 0; j < block.count; ++j, ++slot) k_scales[j] = c.k_scales[*slot], v_scales[j] = c.v_scales[*slot];
      block.k_scales = k_scales, block.v_scales = v_scales;
    }
    Query* mine = queries.data() + (head - begin) * num_queries;
    if (++head == end) head = begin, start += kBlock;
    Find(c, b, head, start, *ahead);
    if (!converts) {
      AttendQueries<P, V>(mine, num_queries, *rows, *ahead, block);
    } else {  // many queries read each row: convert it once
      Rows<float> converted;
      converted.count = block.count;
      for (int j = 0; j < block.count; ++j) {
        converted.k[j] = k_block + j * H, converted.v[j] = v_block + j * H;
        for (int v = 0; v < V; ++v) Store(k_block + j * H + v * kLanes, Load(rows->k[j] + v * kLanes));
        for (int v = 0; v < V; ++v) Store(v_block + j * H + v * kLanes, Load(rows->v[j] + v * kLanes));
        if (j < ahead->count) ahead->Fetch(ahead->k[j], H), ahead->Fetch(ahead->v[j], H);
      }
      for (int j = block.count; j % kTokens; ++j) converted.k[j] = converted.k[block.count - 1];
      AttendQueries<float, V>(mine, num_queries, converted, kNothing<float>, block);
    }
    std::swap(rows, ahead);
  }

  each([&](const Query& query, int64_t, int64_t head, int64_t t, int64_t n) {
    const float out_scale = kUnit<P> * (has_head_scales ? c.v_scales[head] : 1.0f);
    const bool is_empty = query.total == 0.0f || kv_len == 0;
    const float inverse = is_empty ? 0.0f : out_scale / query.total;
    const int64_t at = (b * c.T + t) * c.N + n;
    for (int h = 0; h < H; ++h) c.out[at * H + h] = query.sum[h] * inverse;
    c.lse[at] = is_empty ? -std::numeric_limits<float>::infinity() : query.peak + std::log(query.total);
  });
}

template <typename P>
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
    AttendRow<P, HEAD_SIZE / kLanes>(c, task / parts, head, std::min(head + heads, c.K));
  });
}

const float* DataOrNull(const ffi::Buffer<ffi::F32>& x) {
  return x.element_count() ? x.typed_data() : nullptr;
}

// Pages of narrow floats travel as unsigned integers; `kind` says what they are. Optional arrays have no element when not given.
ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> tables,
                  ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::S32> first, ffi::Buffer<ffi::F32> sinks,
                  ffi::Buffer<ffi::F32> k_scales, ffi::Buffer<ffi::F32> v_scales, ffi::Result<ffi::Buffer<ffi::F32>> out,
                  ffi::Result<ffi::Buffer<ffi::F32>> lse, float scale, float soft_cap, int64_t window, int64_t kind) {
  auto qd = q.dimensions();
  auto kd = k.dimensions();
  if (qd[3] != HEAD_SIZE) return ffi::Error::Internal("built for another head size");
  const Call c{.B = qd[0], .T = qd[1], .N = qd[2], .K = kd[1], .S = kd[2], .M = tables.dimensions()[1],
               .scale = scale, .soft_cap = soft_cap, .window = window,
               .q = q.typed_data(), .k_pages = k.untyped_data(), .v_pages = v.untyped_data(),
               .tables = tables.typed_data(), .kv_lens = kv_lens.typed_data(), .first = first.typed_data(),
               .sinks = DataOrNull(sinks), .k_scales = DataOrNull(k_scales), .v_scales = DataOrNull(v_scales),
               .has_token_scales = k_scales.element_count() > 0 && k_scales.dimensions().size() == 3,
               .out = out->typed_data(), .lse = lse->typed_data()};
  switch (kind) {
    case 0: AttendAll<float>(pool, c); break;
    case 1: AttendAll<BFloat16>(pool, c); break;
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
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("kind"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(WritePages, Write,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::AnyBuffer>());
