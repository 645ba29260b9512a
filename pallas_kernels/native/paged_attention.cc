// Paged attention and page writes for a CPU, called by XLA through its foreign function interface.
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

inline void FromFloat(float x, float* out) { *out = x; }
inline void FromFloat(float x, Half* out) { out->value = static_cast<_Float16>(x); }
inline void FromFloat(float x, BFloat16* out) {  // round to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out->bits = static_cast<uint16_t>(bits >> 16) | 0x40;
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
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

template <int H_>
struct HeadSize {
  static constexpr int Get(int) { return H_; }
};
template <>
struct HeadSize<0> {
  static int Get(int h) { return h; }
};

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

template <typename Q, typename P, int H_>
void AttendRow(const Shape& d, const Q* q, const P* k_pages, const P* v_pages, const int32_t* table, int64_t kv_len, int64_t first,
               int64_t head, Q* out) {
  const int H = HeadSize<H_>::Get(d.H);
  const int G = d.N / d.K, num_queries = G * d.T;
  // Reused by every task of a thread: an allocation for each costs more than a short row.
  thread_local std::vector<float> buffer;
  buffer.resize(static_cast<size_t>(num_queries) * (2 * H + 2) + 2 * kBlock * H);
  float* queries = buffer.data();
  float* sums = queries + num_queries * H;
  float* peaks = sums + num_queries * H;
  float* totals = peaks + num_queries;
  float* k_block = totals + num_queries;
  float* v_block = k_block + kBlock * H;

  for (int t = 0; t < d.T; ++t)
    for (int g = 0; g < G; ++g) {
      const Q* source = q + (t * d.N + head * G + g) * H;
      float* query = queries + (t * G + g) * H;
      for (int h = 0; h < H; ++h) query[h] = ToFloat(source[h]) * d.scale;
    }
  std::fill(sums, sums + num_queries * H, 0.0f);
  std::fill(peaks, peaks + num_queries, kLowest);
  std::fill(totals, totals + num_queries, 0.0f);

  const int64_t begin = d.window ? std::max<int64_t>(0, first - d.window + 1) : 0;
  for (int64_t start = begin; start < kv_len; start += kBlock) {
    const int count = std::min<int64_t>(kBlock, kv_len - start);
    const float* k_rows[kBlock];
    const float* v_rows[kBlock];
    for (int j = 0; j < count; ++j) {
      const int64_t place = start + j;
      const int64_t offset = ((table[place / d.S] * d.K + head) * d.S + place % d.S) * H;
      if constexpr (std::is_same_v<P, float>) {
        k_rows[j] = k_pages + offset;
        v_rows[j] = v_pages + offset;
      } else {
        float* k_row = k_block + j * H;
        float* v_row = v_block + j * H;
        for (int h = 0; h < H; ++h) k_row[h] = ToFloat(k_pages[offset + h]);
        for (int h = 0; h < H; ++h) v_row[h] = ToFloat(v_pages[offset + h]);
        k_rows[j] = k_row;
        v_rows[j] = v_row;
      }
    }
    for (int t = 0; t < d.T; ++t) {
      // Query t sees [low, high) of the context; [a, b) of this block.
      const int64_t high = std::min(kv_len, first + t + 1);
      const int64_t low = d.window ? std::max<int64_t>(0, first + t + 1 - d.window) : 0;
      const int a = std::clamp<int64_t>(low - start, 0, count), b = std::clamp<int64_t>(high - start, 0, count);
      if (a >= b) continue;
      for (int g = 0; g < G; ++g) {
        const int i = t * G + g;
        const float* query = queries + i * H;
        float scores[kBlock];
        float peak = peaks[i];
        for (int j = a; j < b; ++j) {
          const float* k_row = k_rows[j];
          float dot = 0.0f;
          for (int h = 0; h < H; ++h) dot += query[h] * k_row[h];
          scores[j] = dot;
        }
        for (int j = a; j < b; ++j) peak = scores[j] > peak ? scores[j] : peak;
        float total = 0.0f;
        for (int j = a; j < b; ++j) scores[j] = ExpNonPositive(scores[j] - peak);
        for (int j = a; j < b; ++j) total += scores[j];
        const float rescale = ExpNonPositive(peaks[i] - peak);
        float* sum = sums + i * H;
        float local[H_ ? H_ : 1];
        float* acc = H_ ? local : sum;  // a head size known at compile time keeps the sum in registers
        for (int h = 0; h < H; ++h) acc[h] = sum[h] * rescale;
        for (int j = a; j < b; ++j) {
          const float weight = scores[j];
          const float* v_row = v_rows[j];
          for (int h = 0; h < H; ++h) acc[h] += weight * v_row[h];
        }
        if (H_) std::memcpy(sum, acc, H * sizeof(float));
        peaks[i] = peak;
        totals[i] = totals[i] * rescale + total;
      }
    }
  }

  for (int t = 0; t < d.T; ++t)
    for (int g = 0; g < G; ++g) {
      const int i = t * G + g;
      const float inverse = totals[i] == 0.0f ? 0.0f : 1.0f / totals[i];
      Q* target = out + (t * d.N + head * G + g) * H;
      for (int h = 0; h < H; ++h) FromFloat(sums[i * H + h] * inverse, target + h);
    }
}

template <typename Q, typename P>
void AttendAll(ffi::ThreadPool& pool, const Shape& d, const void* q, const void* k, const void* v, const int32_t* tables,
               const int32_t* kv_lens, const int32_t* first, void* out) {
  auto attend = d.H == 64 ? AttendRow<Q, P, 64> : d.H == 128 ? AttendRow<Q, P, 128> : d.H == 32 ? AttendRow<Q, P, 32> : AttendRow<Q, P, 0>;
  ParallelFor(pool, d.B * d.K, [&](int64_t task) {
    const int64_t b = task / d.K, head = task % d.K, row = b * d.T * d.N * d.H;
    attend(d, static_cast<const Q*>(q) + row, static_cast<const P*>(k), static_cast<const P*>(v), tables + b * d.M, kv_lens[b],
           first[b], head, static_cast<Q*>(out) + row);
  });
}

// Calls `f` with a null pointer of the C++ type of an element type; false for one that is not a float of 16 or 32 bits.
template <typename F>
bool WithType(ffi::DataType type, const F& f) {
  switch (type) {
    case ffi::DataType::F32: f(static_cast<float*>(nullptr)); return true;
    case ffi::DataType::BF16: f(static_cast<BFloat16*>(nullptr)); return true;
    case ffi::DataType::F16: f(static_cast<Half*>(nullptr)); return true;
    default: return false;
  }
}

ffi::DataType PageType(ffi::AnyBuffer pages, int64_t kind) {
  // Pages of 16-bit floats travel as uint16; `kind` says which: 1 bfloat16, 2 float16.
  if (kind == 1) return ffi::DataType::BF16;
  if (kind == 2) return ffi::DataType::F16;
  return pages.element_type();
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> tables,
                  ffi::Buffer<ffi::S32> kv_lens, ffi::Buffer<ffi::S32> first, ffi::Result<ffi::AnyBuffer> out, float scale,
                  int64_t window, int64_t kind) {
  auto qd = q.dimensions();
  auto kd = k.dimensions();
  Shape d{qd[0], qd[1], qd[2], qd[3], kd[1], kd[2], tables.dimensions()[1], scale, window};
  bool known = false;
  WithType(q.element_type(), [&](auto* q_type) {
    known = WithType(PageType(k, kind), [&](auto* page_type) {
      using Q = std::remove_pointer_t<decltype(q_type)>;
      using P = std::remove_pointer_t<decltype(page_type)>;
      AttendAll<Q, P>(pool, d, q.untyped_data(), k.untyped_data(), v.untyped_data(), tables.typed_data(), kv_lens.typed_data(),
                      first.typed_data(), out->untyped_data());
    });
  });
  return known ? ffi::Error::Success() : ffi::Error::InvalidArgument("queries and pages must be float32, bfloat16 or float16");
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxpagedAttend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("kind"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxpagedWrite, Write,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::AnyBuffer>());
