// How many threads the kernels and compiled layers use: all that OpenMP gives, until one of them comes late.
//
// OpenMP's threads spin while they wait for each other. Where another program wants a core, a thread that has
// lost its core for some milliseconds holds up all the others, hundreds of times in a pass: passes take 30
// times as long. Fewer threads than cores lose no time at all. So each parallel region notes how long its first
// thread waited for its last, and one that waited long takes a thread away, for a while.

#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <mutex>

namespace orthrus {

using Nanoseconds = int64_t;

inline Nanoseconds clock_now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// How many threads serve best, from the regions that waited. Much waiting takes one thread away, then at once more.
// After a pause one comes back, then more; a pause doubles when the thread that came back is late as well, and
// shrinks to a share of the time in which none was. So one hiccup costs a pause of some milliseconds, and a lasting
// neighbour one wait in each of the longest pauses. Any thread may call it.
class ThreadLimit {
 public:
  static constexpr Nanoseconds kFirstPause = 10'000'000, kLongestPause = 1'000'000'000;
  // How long a wait is remembered, and the share of that time that must have been lost to waits: a thread less
  // loses up to a half, and every machine has hiccups.
  static constexpr double kMemory = 20'000'000, kLost = 0.4;

  // Threads to use now, of `usual`.
  int64_t threads(int64_t usual, Nanoseconds now) {
    const int64_t limit = limit_.load(std::memory_order_relaxed);
    if (limit >= usual) return usual;
    if (now < rises_at_.load(std::memory_order_relaxed)) return limit;
    return rise(usual, now);
  }

  // A region of that many threads waited so long for one of them.
  void waited(int64_t threads, Nanoseconds wait, Nanoseconds now);

 private:
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

  int64_t rise(int64_t usual, Nanoseconds now);

  std::mutex mutex_;
  std::atomic<int64_t> limit_{kNone};
  std::atomic<Nanoseconds> rises_at_{0};
  double lost_ = 0.0;
  Nanoseconds waited_at_ = 0;
  Nanoseconds pause_ = kFirstPause, changed_at_ = std::numeric_limits<Nanoseconds>::min() / 2;
  int64_t step_ = 1;
  bool falling_ = false;
};

// Of this process: whether a core is to be had is a fact about the machine, which all callers share.
ThreadLimit& thread_limit();

// While it lives, OpenMP's regions on this thread use as many threads as serve best.
class LimitedThreads {
 public:
  LimitedThreads() : usual_(at::get_num_threads()), started_(usual_ > 1 ? clock_now() : 0), threads_(usual_) {
    if (usual_ > 1) set(threads_ = thread_limit().threads(usual_, started_));
  }
  ~LimitedThreads() {
    if (threads_ != usual_) set(usual_);
  }
  LimitedThreads(const LimitedThreads&) = delete;

  int64_t threads() const { return threads_; }
  Nanoseconds started() const { return started_; }

 private:
  // Not at::set_num_threads, which would throw away what oneDNN has compiled.
  static void set([[maybe_unused]] int64_t threads) {
#ifdef _OPENMP
    if (threads != omp_get_max_threads()) omp_set_num_threads(static_cast<int>(threads));
#endif
  }

  const int64_t usual_;
  const Nanoseconds started_;
  int64_t threads_;
};

// As at::parallel_for, by as many threads as serve best.
template <typename Part>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Part& part) {
  // Less is what threads need to wake up; and shares of work are not all alike.
  constexpr Nanoseconds kLongWait = 500'000, kShares = 2;
  const LimitedThreads limited;
  if (limited.threads() <= 1 || end - begin <= grain) return at::parallel_for(begin, end, grain, part);
  std::atomic<Nanoseconds> first_done{std::numeric_limits<Nanoseconds>::max()};
  at::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    part(from, to);
    const Nanoseconds now = clock_now();
    Nanoseconds first = first_done.load(std::memory_order_relaxed);
    while (now < first && !first_done.compare_exchange_weak(first, now, std::memory_order_relaxed)) {
    }
  });
  const Nanoseconds now = clock_now(), first = first_done.load(std::memory_order_relaxed), wait = now - first;
  if (wait > kLongWait && wait > kShares * (first - limited.started())) thread_limit().waited(limited.threads(), wait, now);
}

}  // namespace orthrus
