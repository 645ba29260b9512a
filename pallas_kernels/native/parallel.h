// Tasks on XLA's own threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// What to cut work for. Where nobody knows the number of threads it is said to be 0.
inline int64_t NumThreads(const ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// Several threads take tasks, each from a part of its own, in order, and from the others' parts once that has none left: what follows a
// task in memory is mostly the thread's next. The caller works too and waits only for tasks that have begun, so a pool whose threads are
// all busy costs time but cannot deadlock.
template <typename Task>
void ParallelFor(ffi::ThreadPool& pool, int64_t num_tasks, const Task& task) {
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct State {
    std::vector<Part> parts;
    std::atomic<int64_t> num_threads{0}, done{0};
  };
  const int64_t count = std::clamp<int64_t>(num_tasks, 1, NumThreads(pool));
  auto state = std::make_shared<State>();
  state->parts = std::vector<Part>(count);
  for (int64_t i = 0; i < count; ++i) {
    state->parts[i].next = i * num_tasks / count;
    state->parts[i].end = (i + 1) * num_tasks / count;
  }
  // `task` lives until all num_tasks are done; a helper that starts later finds no task and does not touch it.
  auto work = [state, count, &task] {
    const int64_t first = state->num_threads.fetch_add(1);
    for (int64_t i = 0; i < count; ++i) {
      Part& part = state->parts[(first + i) % count];
      for (int64_t t; (t = part.next.fetch_add(1)) < part.end;) {
        task(t);
        state->done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  for (int64_t i = 1; i < count; ++i) pool.Schedule([work] { work(); });
  work();
  while (state->done.load(std::memory_order_acquire) < num_tasks) std::this_thread::yield();
}

}  // namespace
