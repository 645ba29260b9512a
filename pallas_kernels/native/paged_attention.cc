// Paged attention and page writes for a CPU, called by XLA through its foreign function interface. Built for one HEAD_SIZE at a time,
// a multiple of 16, so that it builds in seconds and its loops are unrolled.
//
// One task is one row and one key/value head. It walks the row's pages once, in blocks of tokens, with an online softmax in
// float32, and touches no token outside [first visible, kv_len): what unused places hold, NaN or not, is never read.
// The order of a task's sums depends on its own row alone, so a row's bits do not depend on the batch.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
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
constexpr float kLowest = -1e30f;  // stands for -inf: lowest - lowest is 0, not NaN

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  _Float16 value;
};

inline float ToFloat(float x) { return x; }
inline float ToFloat(Half x) { return static_cast<float>(x.value); }
inline float ToFloat(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
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

inline Vec Load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
#ifdef __AVX512F__  // GCC 12 makes sixteen scalar conversions of what is one instruction
inline Vec Load(const BFloat16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
}
inline Vec Load(const Half* p) {
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
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
inline float Sum(Vec x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
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

struct Shape {
  int64_t B, T, N, H, K, S, M;
  float scale;
  int64_t window;
};

// What one query has gathered so far: the largest score, the sum of weights, and where its weighted values are.
struct Query {
  const float* q;  // [H], scaled
  float* sum;      // [H]
  float peak, total;
  int64_t low, high;  // it sees positions [low, high)
};

// One block of `count` tokens, the first at position `start`, for NQ queries at once, so that a row of K or V is read once for all.
// The row's pages are of type P; V registers of kLanes make up a head.
template <typename P, int V, int NQ>
inline void AttendBlock(Query* queries, const P* const* k_rows, const P* const* v_rows, int64_t start, int count) {
  float weights[NQ][kBlock];
  for (int j = 0; j < count; ++j) {
    Vec k[V];
    for (int v = 0; v < V; ++v) k[v] = Load(k_rows[j] + v * kLanes);
    for (int i = 0; i < NQ; ++i) {
      Vec dot = Load(queries[i].q) * k[0];
      for (int v = 1; v < V; ++v) dot += Load(queries[i].q + v * kLanes) * k[v];
      weights[i][j] = Sum(dot);
    }
  }
  Vec sums[NQ][V];
  for (int i = 0; i < NQ; ++i) {
    Query& query = queries[i];
    const int a = std::clamp<int64_t>(query.low - start, 0, count), b = std::clamp<int64_t>(query.high - start, 0, count);
    float peak = query.peak;
    for (int j = a; j < b; ++j) peak = weights[i][j] > peak ? weights[i][j] : peak;
    float total = 0.0f;
    for (int j = 0; j < a; ++j) weights[i][j] = 0.0f;
    for (int j = a; j < b; ++j) weights[i][j] = ExpNonPositive(weights[i][j] - peak);
    for (int j = b; j < count; ++j) weights[i][j] = 0.0f;
    for (int j = a; j < b; ++j) total += weights[i][j];
    const float rescale = ExpNonPositive(query.peak - peak);
    query.total = query.total * rescale + total;
    query.peak = peak;
    for (int v = 0; v < V; ++v) sums[i][v] = Load(query.sum + v * kLanes) * rescale;
  }
  for (int j = 0; j < count; ++j)
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
inline void AttendQueries(Query* queries, int num_queries, const P* const* k_rows, const P* const* v_rows, int64_t start, int count) {
  constexpr int kGroup = GroupSize<V>();
  int i = 0;
  for (; i + kGroup <= num_queries; i += kGroup) {
    if (queries[i + kGroup - 1].high <= start) continue;  // the block is in these queries' future
    AttendBlock<P, V, kGroup>(queries + i, k_rows, v_rows, start, count);
  }
  if constexpr (kGroup >= 4)
    if (num_queries - i == 3) return AttendBlock<P, V, 3>(queries + i, k_rows, v_rows, start, count);
  if constexpr (kGroup >= 2)
    for (; i + 2 <= num_queries; i += 2) AttendBlock<P, V, 2>(queries + i, k_rows, v_rows, start, count);
  for (; i < num_queries; ++i) AttendBlock<P, V, 1>(queries + i, k_rows, v_rows, start, count);
}

// All queries of one row that share one key/value head. A head of V * kLanes numbers.
template <typename P, int V>
void AttendRow(const Shape& d, const float* q, const P* k_pages, const P* v_pages, const int32_t* table, int64_t kv_len,
               int64_t first, int64_t head, float* out) {
  constexpr int H = V * kLanes;
  const int G = d.N / d.K, num_queries = G * d.T;
  const bool converts = !std::is_same_v<P, float> && num_queries > 2 * GroupSize<V>();
  // Reused by every task of a thread: an allocation for each costs more than a short row.
  thread_local std::vector<float> buffer;
  thread_local std::vector<Query> queries;
  buffer.resize(static_cast<size_t>(num_queries) * 2 * H + 2 * kBlock * H);
  queries.resize(num_queries);
  float* k_block = buffer.data() + num_queries * 2 * H;
  float* v_block = k_block + kBlock * H;

  for (int t = 0; t < d.T; ++t)
    for (int g = 0; g < G; ++g) {
      const int i = t * G + g;
      const float* source = q + (t * d.N + head * G + g) * H;
      float* scaled = buffer.data() + i * 2 * H;
      for (int h = 0; h < H; ++h) scaled[h] = source[h] * d.scale;
      std::fill(scaled + H, scaled + 2 * H, 0.0f);
      const int64_t high = std::min(kv_len, first + t + 1);
      const int64_t low = d.window ? std::max<int64_t>(0, first + t + 1 - d.window) : 0;
      queries[i] = {scaled, scaled + H, kLowest, 0.0f, low, high};
    }

  for (int64_t start = num_queries ? queries[0].low : 0; start < kv_len; start += kBlock) {
    const int count = std::min<int64_t>(kBlock, kv_len - start);
    const P* k_rows[kBlock];
    const P* v_rows[kBlock];
    for (int j = 0; j < count; ++j) {
      const int64_t place = start + j;
      const int64_t offset = ((table[place / d.S] * d.K + head) * d.S + place % d.S) * H;
      k_rows[j] = k_pages + offset;
      v_rows[j] = v_pages + offset;
      // Pages lie anywhere, so the processor cannot foresee the next one: ask for a token of the next block as each of this is named.
      const int64_t ahead = place + kBlock;
      if (ahead < kv_len) {
        const int64_t next = ((table[ahead / d.S] * d.K + head) * d.S + ahead % d.S) * H;
        for (size_t byte = 0; byte < H * sizeof(P); byte += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(k_pages + next) + byte);
          __builtin_prefetch(reinterpret_cast<const char*>(v_pages + next) + byte);
        }
      }
    }
    if (!converts) {
      AttendQueries<P, V>(queries.data(), num_queries, k_rows, v_rows, start, count);
      continue;
    }
    // Many queries read each row: convert it once.
    const float* k_converted[kBlock];
    const float* v_converted[kBlock];
    for (int j = 0; j < count; ++j) {
      for (int v = 0; v < V; ++v) Store(k_block + j * H + v * kLanes, Load(k_rows[j] + v * kLanes));
      for (int v = 0; v < V; ++v) Store(v_block + j * H + v * kLanes, Load(v_rows[j] + v * kLanes));
      k_converted[j] = k_block + j * H;
      v_converted[j] = v_block + j * H;
    }
    AttendQueries<float, V>(queries.data(), num_queries, k_converted, v_converted, start, count);
  }

  for (int t = 0; t < d.T; ++t)
    for (int g = 0; g < G; ++g) {
      const Query& query = queries[t * G + g];
      const float inverse = query.total == 0.0f ? 0.0f : 1.0f / query.total;
      float* target = out + (t * d.N + head * G + g) * H;
      for (int h = 0; h < H; ++h) target[h] = query.sum[h] * inverse;
    }
}

template <typename P>
void AttendAll(ffi::ThreadPool& pool, const Shape& d, const float* q, const void* k, const void* v, const int32_t* tables,
               const int32_t* kv_lens, const int32_t* first, float* out) {
  ParallelFor(pool, d.B * d.K, [&](int64_t task) {
    const int64_t b = task / d.K, head = task % d.K, row = b * d.T * d.N * d.H;
    AttendRow<P, HEAD_SIZE / kLanes>(d, q + row, static_cast<const P*>(k), static_cast<const P*>(v), tables + b * d.M, kv_lens[b],
                                     first[b], head, out + row);
  });
}

// Pages of 16-bit floats travel as uint16; `kind` says what they are: 0 float32, 1 bfloat16, 2 float16.
ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> tables,
                  ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::S32> first, ffi::Result<ffi::Buffer<ffi::F32>> out, float scale,
                  int64_t window, int64_t kind) {
  auto qd = q.dimensions();
  auto kd = k.dimensions();
  if (qd[3] != HEAD_SIZE) return ffi::Error::Internal("built for another head size");
  Shape d{qd[0], qd[1], qd[2], qd[3], kd[1], kd[2], tables.dimensions()[1], scale, window};
  auto attend = kind == 0 ? AttendAll<float> : kind == 1 ? AttendAll<BFloat16> : AttendAll<Half>;
  attend(pool, d, q.typed_data(), k.untyped_data(), v.untyped_data(), tables.typed_data(), kv_lens.typed_data(), first.typed_data(),
         out->typed_data());
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
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("kind"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(WritePages, Write,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::AnyBuffer>());
