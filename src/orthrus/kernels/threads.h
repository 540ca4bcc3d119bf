// How many threads the kernels and compiled layers use: all of OpenMP's, or fewer while other programs need cores.
//
// OpenMP's threads spin while they wait for each other. If another program takes a core for some milliseconds, one late
// thread delays all others. A pass has hundreds of parallel regions, so it then takes 30 times as long. With one thread
// fewer than cores, no thread is late. So each parallel region measures how long its first thread waited for its last.
// If these waits add up, the number of threads is reduced for a while.

#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <mutex>

namespace orthrus {

using Nanoseconds = int64_t;

// The time of a monotonic clock.
inline Nanoseconds clock_now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Limits the number of threads, given how long parallel regions waited. Thread-safe.
//
// * If waits add up, it removes one thread. If they go on, it removes two more, then four, and so on.
// * After a pause it adds one thread, after the next pause two, and so on.
// * If waits return soon after a thread was added, the pause doubles. Otherwise it shrinks to an eighth of the time
//   without waits.
//
// So a single delay costs a pause of some milliseconds. A neighbour that stays busy costs one long wait per longest
// pause.
class ThreadLimit {
 public:
  static constexpr Nanoseconds kFirstPause = 10'000'000, kLongestPause = 1'000'000'000;
  // The sum of waits decays exponentially with this time constant, in nanoseconds. A thread is removed when the sum
  // reaches this share of it. Removing one costs up to half of the speed, and every machine has short delays.
  static constexpr double kDecayTime = 20'000'000, kMaxLostShare = 0.4;

  // The number of threads to use at the time `now`. usual: the number without a limit.
  int64_t threads(int64_t usual, Nanoseconds now) {
    const int64_t limit = limit_.load(std::memory_order_relaxed);
    if (limit >= usual) return usual;
    if (now < rises_at_.load(std::memory_order_relaxed)) return limit;
    return rise(usual, now);
  }

  // Records that a parallel region of `threads` threads waited for `wait` nanoseconds for its last thread.
  void waited(int64_t threads, Nanoseconds wait, Nanoseconds now);

 private:
  static constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

  // Raises the limit after a pause. Returns the number of threads to use.
  int64_t rise(int64_t usual, Nanoseconds now);

  std::mutex mutex_;
  std::atomic<int64_t> limit_{kNoLimit};
  std::atomic<Nanoseconds> rises_at_{0};
  double lost_ = 0.0;
  Nanoseconds waited_at_ = 0;
  Nanoseconds pause_ = kFirstPause, changed_at_ = std::numeric_limits<Nanoseconds>::min() / 2;
  int64_t step_ = 1;
  bool falling_ = false;
};

// The limit of this process. All callers share it, because free cores are a property of the machine.
ThreadLimit& thread_limit();

// Applies the limit to the OpenMP regions that this thread starts, until it is destroyed.
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
  // at::set_num_threads would discard the code that oneDNN has compiled.
  static void set([[maybe_unused]] int64_t threads) {
#ifdef _OPENMP
    if (threads != omp_get_max_threads()) omp_set_num_threads(static_cast<int>(threads));
#endif
  }

  const int64_t usual_;
  const Nanoseconds started_;
  int64_t threads_;
};

// Like at::parallel_for, with the limited number of threads. Measures how long the region waits for its last thread.
template <typename Part>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Part& part) {
  // Shorter waits are not counted, because threads take time to wake up. Nor are waits of less than twice the time that
  // the first thread worked, because the parts of the work differ in size.
  constexpr Nanoseconds kLongWait = 500'000, kMaxImbalance = 2;
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
  if (wait > kLongWait && wait > kMaxImbalance * (first - limited.started()))
    thread_limit().waited(limited.threads(), wait, now);
}

}  // namespace orthrus
