// The limit on the number of threads; threads.h explains the rule.

#include "threads.h"

#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace orthrus {

ThreadLimit& thread_limit() {
  static ThreadLimit limit;
  return limit;
}

void ThreadLimit::waited(int64_t threads, Nanoseconds wait, Nanoseconds now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  // Another region has already lowered the limit.
  if (threads > limit_.load(std::memory_order_relaxed)) return;
  lost_ = lost_ * std::exp((waited_at_ - now) / kDecayTime) + static_cast<double>(wait);
  waited_at_ = now;
  if (lost_ < kMaxLostShare * kDecayTime) return;
  lost_ = 0.0;
  const Nanoseconds stayed = now - changed_at_;
  // Waits take up to kDecayTime to add up, so a limit that lasted less than pause + kDecayTime was raised too early.
  pause_ = stayed < pause_ + static_cast<Nanoseconds>(kDecayTime) ? std::min(2 * pause_, kLongestPause)
                           : std::max(kFirstPause, std::min(pause_, stayed / 8));
  step_ = falling_ ? 2 * step_ : 1;
  falling_ = true;
  limit_.store(std::max<int64_t>(1, threads - step_), std::memory_order_relaxed);
  rises_at_.store(now + pause_, std::memory_order_relaxed);
  changed_at_ = now;
}

int64_t ThreadLimit::rise(int64_t usual, Nanoseconds now) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t limit = limit_.load(std::memory_order_relaxed);
  if (limit >= usual || now < rises_at_.load(std::memory_order_relaxed)) return std::min(limit, usual);
  step_ = falling_ ? 1 : 2 * step_;
  falling_ = false;
  const int64_t risen = std::min(usual, limit + step_);
  limit_.store(risen < usual ? risen : kNoLimit, std::memory_order_relaxed);
  rises_at_.store(now + pause_, std::memory_order_relaxed);
  changed_at_ = now;
  return risen;
}

namespace {

// A limit for tests, which pass their own time.
struct ThreadLimitForTests : torch::CustomClassHolder {
  int64_t threads(int64_t usual, int64_t now) { return limit.threads(usual, now); }
  void waited(int64_t threads, int64_t wait, int64_t now) { limit.waited(threads, wait, now); }
  ThreadLimit limit;
};

// The number of threads that a kernel would use now.
int64_t num_threads() { return thread_limit().threads(at::get_num_threads(), clock_now()); }

}  // namespace

}  // namespace orthrus

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.class_<orthrus::ThreadLimitForTests>("ThreadLimit")
      .def(torch::init<>())
      .def("threads", &orthrus::ThreadLimitForTests::threads)
      .def("waited", &orthrus::ThreadLimitForTests::waited);
  library.def("num_threads() -> int", &orthrus::num_threads);
}
