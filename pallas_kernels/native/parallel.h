// Tasks on XLA's own threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// What to cut work for. Where nobody knows the number of threads it is said to be 0.
inline int64_t NumThreads(const ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

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

}  // namespace
