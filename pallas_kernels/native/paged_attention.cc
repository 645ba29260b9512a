// Paged attention and page writes for a CPU, called by XLA through its foreign function interface. Built for one HEAD_SIZE at a
// time, a multiple of 16, so that it builds in seconds and its loops are unrolled.
//
// One task is one row and one key/value head. It walks the row's pages once, in blocks of tokens, with an online softmax in
// float32, and touches no token outside [first visible, kv_len): what unused places hold, NaN or not, is never read.
// Scales of pages never meet the pages' numbers: a key's multiplies its score, a value's its weight.
// The order of a task's sums depends on its own row alone, so a row's bits do not depend on the batch.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kBlock = 64;         // tokens whose scores are held at a time
constexpr int kTokens = 4;         // tokens whose keys are held at a time
constexpr float kLowest = -1e30f;  // stands for -inf: lowest - lowest is 0, not NaN

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

// Sixteen floats: one AVX-512 register, and whatever the compiler makes of it elsewhere.
constexpr int kLanes = 16;
typedef float Vec __attribute__((vector_size(64)));

inline Vec Load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)  // GCC 12 makes sixteen scalar conversions of what is one instruction
inline Vec Load(const BFloat16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
}
inline Vec Load(const Half* p) {
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline Vec Load(const Int8* p) {
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
}
inline Vec Load(const Float8* p) {
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
inline Vec Load(const P* p) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = ToFloat(p[i]);
  return x;
}
#endif
inline void Store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

// The sums of four vectors' lanes.
inline void StoreSums(float* target, const Vec* x) {
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
  for (int j = 0; j < 4; ++j) {
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += x[j][i];
    target[j] = total;
  }
#endif
}

// Several threads take tasks from one counter. The caller works too and waits only for tasks that have begun, so a pool whose
// threads are all busy costs time but cannot deadlock.
template <typename Task>
void ParallelFor(ffi::ThreadPool& pool, int64_t num_tasks, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // `task` lives until all num_tasks are done; a helper that starts later finds no task and does not touch it.
  auto work = [state, num_tasks, &task] {
    for (int64_t i; (i = state->next.fetch_add(1)) < num_tasks;) {
      task(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), num_tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  while (state->done.load(std::memory_order_acquire) < num_tasks) std::this_thread::yield();
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

// One block for NQ queries at once, so that a row of K or V is read once for all. The row's pages are of type P; V registers of
// kLanes make up a head. Keys are taken kTokens at a time, so after the last row the last row is there again.
template <typename P, int V, int NQ>
inline void AttendBlock(Query* queries, const P* const* k_rows, const P* const* v_rows, const Block& block) {
  float weights[NQ][kBlock];
  for (int j = 0; j < block.count; j += kTokens) {
    Vec dots[NQ][kTokens] = {};
    for (int v = 0; v < V; ++v) {
      Vec k[kTokens];
      for (int t = 0; t < kTokens; ++t) k[t] = Load(k_rows[j + t] + v * kLanes);
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
  for (int j = 0; j < block.count; ++j)
    for (int v = 0; v < V; ++v) {
      const Vec value = Load(v_rows[j] + v * kLanes);
      for (int i = 0; i < NQ; ++i) sums[i][v] += weights[i][j] * value;
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
inline void AttendQueries(Query* queries, int num_queries, const P* const* k_rows, const P* const* v_rows, const Block& block) {
  constexpr int kGroup = GroupSize<V>();
  int i = 0;
  for (; i + kGroup <= num_queries; i += kGroup) {
    if (queries[i + kGroup - 1].high <= block.start) continue;  // the block is in these queries' future
    AttendBlock<P, V, kGroup>(queries + i, k_rows, v_rows, block);
  }
  if constexpr (kGroup >= 4)
    if (num_queries - i == 3) return AttendBlock<P, V, 3>(queries + i, k_rows, v_rows, block);
  if constexpr (kGroup >= 2)
    for (; i + 2 <= num_queries; i += 2) AttendBlock<P, V, 2>(queries + i, k_rows, v_rows, block);
  for (; i < num_queries; ++i) AttendBlock<P, V, 1>(queries + i, k_rows, v_rows, block);
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

// All queries of row b that share one key/value head. A head is V * kLanes numbers.
template <typename P, int V>
void AttendRow(const Call& c, int64_t b, int64_t head) {
  constexpr int H = V * kLanes;
  const P* k_pages = static_cast<const P*>(c.k_pages);
  const P* v_pages = static_cast<const P*>(c.v_pages);
  const int64_t kv_len = c.kv_lens[b], first = c.first[b];
  const int G = c.N / c.K, num_queries = G * c.T;
  const bool converts = !std::is_same_v<P, float> && num_queries > 2 * GroupSize<V>();
  const bool has_head_scales = c.k_scales && !c.has_token_scales;
  const float q_scale = c.scale * kUnit<P> * (has_head_scales ? c.k_scales[head] : 1.0f);
  const float out_scale = kUnit<P> * (has_head_scales ? c.v_scales[head] : 1.0f);
  // Reused by every task of a thread: an allocation for each costs more than a short row.
  thread_local std::vector<float> buffer;
  thread_local std::vector<Query> queries;
  buffer.resize(static_cast<size_t>(num_queries) * 2 * H + 2 * kBlock * H);
  queries.resize(num_queries);
  float* k_block = buffer.data() + num_queries * 2 * H;
  float* v_block = k_block + kBlock * H;

  for (int t = 0; t < c.T; ++t)
    for (int g = 0; g < G; ++g) {
      const int i = t * G + g, n = head * G + g;
      const float* source = c.q + ((b * c.T + t) * c.N + n) * H;
      float* scaled = buffer.data() + i * 2 * H;
      for (int h = 0; h < H; ++h) scaled[h] = source[h] * q_scale;
      std::fill(scaled + H, scaled + 2 * H, 0.0f);
      const int64_t high = std::min(kv_len, first + t + 1);
      const int64_t low = c.window ? std::max<int64_t>(0, first + t + 1 - c.window) : 0;
      // A sink is a first score whose value is 0.
      const float peak = c.sinks ? std::max(c.sinks[n], kLowest) : kLowest;
      queries[i] = {scaled, scaled + H, peak, c.sinks ? 1.0f : 0.0f, low, high};
    }

  for (int64_t start = num_queries ? queries[0].low : 0; start < kv_len; start += kBlock) {
    const int count = std::min<int64_t>(kBlock, kv_len - start);
    Block block{start, count, c.soft_cap, nullptr, nullptr};
    const P* k_rows[kBlock];
    const P* v_rows[kBlock];
    float k_scales[kBlock], v_scales[kBlock];
    Slots slot(c, b, head, start), ahead(c, b, head, start + kBlock);
    for (int j = 0; j < count; ++j, ++slot) {
      k_rows[j] = k_pages + *slot * H;
      v_rows[j] = v_pages + *slot * H;
      if (c.has_token_scales) {
        k_scales[j] = c.k_scales[*slot];
        v_scales[j] = c.v_scales[*slot];
      }
      // Pages lie anywhere, so the processor cannot foresee the next one: ask for a token of the next block with each of this.
      if (start + kBlock + j < kv_len) {
        const int64_t next = *ahead * H;
        for (size_t byte = 0; byte < H * sizeof(P); byte += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(k_pages + next) + byte);
          __builtin_prefetch(reinterpret_cast<const char*>(v_pages + next) + byte);
        }
        ++ahead;
      }
    }
    for (int j = count; j % kTokens; ++j) k_rows[j] = k_rows[count - 1];
    if (c.has_token_scales) block.k_scales = k_scales, block.v_scales = v_scales;
    if (!converts) {
      AttendQueries<P, V>(queries.data(), num_queries, k_rows, v_rows, block);
      continue;
    }
    // Many queries read each row: convert it once.
    const float* k_converted[kBlock];
    const float* v_converted[kBlock];
    for (int j = count; j % kTokens; ++j) k_converted[j] = k_block + (count - 1) * H;
    for (int j = 0; j < count; ++j) {
      for (int v = 0; v < V; ++v) Store(k_block + j * H + v * kLanes, Load(k_rows[j] + v * kLanes));
      for (int v = 0; v < V; ++v) Store(v_block + j * H + v * kLanes, Load(v_rows[j] + v * kLanes));
      k_converted[j] = k_block + j * H;
      v_converted[j] = v_block + j * H;
    }
    AttendQueries<float, V>(queries.data(), num_queries, k_converted, v_converted, block);
  }

  for (int t = 0; t < c.T; ++t)
    for (int g = 0; g < G; ++g) {
      const Query& query = queries[t * G + g];
      const bool is_empty = query.total == 0.0f || kv_len == 0;
      const float inverse = is_empty ? 0.0f : out_scale / query.total;
      const int64_t n = (b * c.T + t) * c.N + head * G + g;
      for (int h = 0; h < H; ++h) c.out[n * H + h] = query.sum[h] * inverse;
      c.lse[n] = is_empty ? -std::numeric_limits<float>::infinity() : query.peak + std::log(query.total);
    }
}

template <typename P>
void AttendAll(ffi::ThreadPool& pool, const Call& c) {
  ParallelFor(pool, c.B * c.K, [&](int64_t task) { AttendRow<P, HEAD_SIZE / kLanes>(c, task / c.K, task % c.K); });
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
