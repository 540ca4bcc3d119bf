// Attention of queries of one key/value head to the slots of one span: scores, softmax, and weighted sums of values.
//
// Keys are stored transposed in their pages, so a vector holds the same element of several keys. All templates take T,
// the dtype of the pool: float or bfloat16.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention_plan.h"
#include "vectors.h"

namespace orthrus {
// Internal linkage: one file includes this, and the compiler inlines what that file calls once.
namespace {

// The tile of sums that stays in registers: vectors of slots (or of elements of values), and queries. kSlotBlock: slots
// that are scored at once. kMaxQueries: queries that share one reading of keys and values.
constexpr int kSlotVectors = kLanes > 8 ? 4 : kVectors, kQueryRows = kLanes > 8 ? 6 : kRows;
constexpr int64_t kSlotBlock = kSlotVectors * kLanes, kMaxQueries = 96;
static_assert(kPage % kSlotBlock == 0, "slots that are scored at once lie in one page");
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The smallest multiple of `step` that is not below `number`.
int64_t round_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// One key/value head of a pool, as one span reads it. keys: pages of (key_size, kPage). values: one row per slot;
// `value_step` is the number of elements from one slot to the next.
template <typename T>
struct Head {
  const T *keys, *values;
  int64_t value_step, key_size, value_size;
  const Span* span;

  // Points to element 0 of a slot's key; the next slots of the page follow. Element d is d * kPage elements further.
  const T* key(int64_t slot) const {
    return keys + span->table[slot / kPage] * key_size * kPage + slot % kPage;
  }
};

// to = from * scale, in float32.
template <typename T>
void widen(const T* from, int64_t size, float* to, float scale = 1.0f) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store_floats(load_floats(from + d) * scale, to + d);
  for (; d < size; ++d) to[d] = static_cast<float>(from[d]) * scale;
}

// to = sums / total, rounded to type T.
template <typename T>
void divide(const float* sums, int64_t size, float total, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store_floats(load_floats(sums + d) / total, to + d);
  for (; d < size; ++d) to[d] = static_cast<T>(sums[d] / total);
}

// Prefetches the keys and values of slots [first, first + count) of one page.
template <typename T>
void prefetch_slots(const Head<T>& head, int64_t first, int64_t count) {
  if (count <= 0) return;
  const auto* keys = reinterpret_cast<const char*>(head.key(first));
  for (int64_t d = 0; d < head.key_size; ++d) prefetch(keys + d * kPage * sizeof(T), count * sizeof(T));
  const int64_t value_bytes = head.value_step * sizeof(T);
  prefetch(
      reinterpret_cast<const char*>(head.values) + head.span->pool_slot(first) * value_bytes, count * value_bytes);
}

// Queries of one key/value head: elements (num, key size), already scaled, and each query's row of the span.
struct Queries {
  const float* elements;
  const int64_t* rows;
  int64_t num;

  // Whether keys and values are converted to float32 as they are loaded. For many queries they are converted once, into
  // a buffer.
  template <typename T>
  bool in_place() const {
    return std::is_same_v<T, float> || num <= kQueryRows;
  }
};

// Writes the scores of slots [start, start + slots) to `scores` (num, padded), -inf where a row does not read a slot.
// cap: limits scores to (-cap, cap) by tanh; 0 for no limit. lane_maxima: for each query, a vector whose largest lane
// is the query's largest score.
template <typename T>
void score(
    const Head<T>& head, const Queries& queries, int64_t start, int64_t slots, int64_t window, float cap,
    float* scores, int64_t padded, Floats* lane_maxima) {
  const Span& span = *head.span;
  const bool in_place = queries.in_place<T>();
  const auto widened = uninitialized<float>(in_place ? 0 : head.key_size * kSlotBlock);
  prefetch_slots(head, start, std::min(kSlotBlock, slots));
  for (int64_t first = 0; first < slots; first += kSlotBlock) {
    prefetch_slots(head, start + first + kSlotBlock, std::min(kSlotBlock, slots - first - kSlotBlock));
    const T* keys = head.key(start + first);
    const int64_t count = std::min(kSlotBlock, padded - first);
    const auto multiply_keys = [&](const auto* transposed, int64_t step) {
      with_static_count<kSlotVectors>(count / kLanes, [&](auto vectors) {
        for_each_part(queries.num, kQueryRows, [&](int64_t q, int64_t num) {
          multiply_rows<kQueryRows, decltype(vectors)::value>(
              num, queries.elements + q * head.key_size, head.key_size, transposed, step, head.key_size,
              scores + q * padded + first, padded);
        });
      });
    };
    if (in_place) {
      multiply_keys(keys, kPage);
      continue;
    }
    for (int64_t d = 0; d < head.key_size; ++d) widen(keys + d * kPage, count, widened.get() + d * kSlotBlock);
    multiply_keys(widened.get(), kSlotBlock);
  }
  // All slots in [window_start, prefix) are readable; later ones are tested one by one.
  int64_t prefix = 0, window_start = 0;
  for (int64_t q = 0; q < queries.num; ++q) {
    const int64_t row = queries.rows[q];
    if (q == 0 || row != queries.rows[q - 1]) {
      prefix = window > 0 ? span.length : span.readable_prefix(row);
      window_start = span.window_start(row, window);
    }
    float* own = scores + q * padded;
    if (cap > 0.0f)
      for (int64_t s = 0; s < slots; ++s) own[s] = cap * std::tanh(own[s] / cap);
    std::fill(own, own + std::max<int64_t>(0, window_start - start), kMinusInfinity);
    // Without a tail, a row reads no later rows.
    const int64_t end = std::min(span.read_end(row) - start, slots);
    for (int64_t s = prefix; s < start + end; ++s)
      if (!span.reads(row, s - span.length, window)) own[s - start] = kMinusInfinity;
    std::fill(own + end, own + padded, kMinusInfinity);
    Floats largest = broadcast(kMinusInfinity);
    for (int64_t s = 0; s < padded; s += kLanes) {
      const Floats found = load_floats(own + s);
      largest = largest > found ? largest : found;
    }
    lane_maxima[q] = largest;
  }
}

// Replaces scores by exp(score - largest score), the weights of a softmax before normalisation. Returns their sum. The
// weights are summed as integer multiples of 2^-28, so the sum does not depend on the order.
float softmax_weights(float* scores, int64_t padded, Floats lane_maxima) {
  constexpr float kOne = 1 << 28;
  // The sum of so many weights fits into 32 bits.
  constexpr int64_t kFit = 4;
  // Weights are zero for scores further below the largest. Above this bound, no lane's exponential depends on the other
  // lanes, on any processor.
  constexpr float kLeast = -87.0f;
  float largest = lane_maxima[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, static_cast<float>(lane_maxima[i]));
  VectorOf<int64_t>::type sums = {};
  for (int64_t first = 0; first < padded; first += kFit * kLanes) {
    Ints part = {};
    for (int64_t s = first; s < std::min(first + kFit * kLanes, padded); s += kLanes) {
      const Floats below = load_floats(scores + s) - largest;
      Floats weight = exponential(below < kLeast ? broadcast(kLeast) : below);
      weight = below >= kLeast ? weight : Floats{};
      part += __builtin_convertvector(weight * kOne + 0.5f, Ints);
      // NaN stays NaN.
      store_floats(below == below ? weight : below, scores + s);
    }
    sums += __builtin_convertvector(part, VectorOf<int64_t>::type);
  }
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return static_cast<float>(static_cast<double>(sum) / kOne);
}

// sums (num, width) = weights (num, count) times values (count, width), added to `sums` if `accumulate` is set. `width`
// is a multiple of kLanes. padded, step: elements from one row to the next of weights, and of values.
template <typename T>
void add_weighted_values(
    int64_t num, const float* weights, int64_t padded, const T* values, int64_t step, int64_t count, int64_t width,
    float* sums, bool accumulate) {
  for (int64_t d = 0; d < width; d += kSlotVectors * kLanes) {
    with_static_count<kSlotVectors>(std::min<int64_t>(kSlotVectors, (width - d) / kLanes), [&](auto vectors) {
      multiply_rows<kQueryRows, decltype(vectors)::value>(
          num, weights, padded, values + d, step, count, sums + d, width, nullptr, 0, accumulate);
    });
  }
}

// Splits slots [first, last) into runs that are contiguous in the pool. Calls run(slot, its number in the pool, count)
// for each.
template <typename Run>
void for_each_run(const Span& span, int64_t first, int64_t last, const Run& run) {
  while (first < last) {
    const int64_t in_pool = span.pool_slot(first);
    int64_t end = std::min(last, (first / kPage + 1) * kPage);
    while (end < last && span.pool_slot(end) == in_pool + end - first) end = std::min(last, end + kPage);
    run(first, in_pool, end - first);
    first = end;
  }
}

// Writes the weighted sums of values to `sums` (num, width). weights: (num, padded), from slot `start` on.
// each(first, last, part): calls part(slot, values, elements per slot, count) for slots [first, last), in one or more
// runs. The values are in the pool, or in a widened copy.
template <typename T, typename Each>
void weighted_sums(
    const Head<T>& head, const Queries& queries, int64_t start, int64_t window, const float* weights, int64_t padded,
    int64_t width, float* sums, const Each& each) {
  const Span& span = *head.span;
  for_each_part(queries.num, kQueryRows, [&](int64_t q, int64_t num) {
    int64_t common = span.slots();
    for (int64_t i = q; i < q + num; ++i) common = std::min(common, span.readable_prefix(queries.rows[i]));
    // One product covers the slots that all of these rows read. It includes slots outside of a row's sliding window,
    // whose weights are zero.
    each(start, common, [&](int64_t slot, auto* values, int64_t step, int64_t count) {
      add_weighted_values(
          num, weights + q * padded + slot - start, padded, values, step, count, width, sums + q * width,
          slot > start);
    });
    if (common <= start) std::fill(sums + q * width, sums + (q + num) * width, 0.0f);
    for (int64_t i = q; i < q + num; ++i)
      for (int64_t s = std::max(common, start); s < span.read_end(queries.rows[i]); ++s)
        if (span.reads(queries.rows[i], s - span.length, window))
          each(s, s + 1, [&](int64_t slot, auto* values, int64_t step, int64_t count) {
            add_weighted_values(
                1, weights + i * padded + slot - start, padded, values, step, count, width, sums + i * width, true);
          });
  });
}

// Attention of queries of one key/value head. Writes the weighted sums of values to `sums` (num, width), and the sums
// of weights to `totals` (num).
template <typename T>
void attend(
    const Head<T>& head, const Queries& queries, int64_t window, float cap, float* sums, float* totals) {
  const Span& span = *head.span;
  int64_t start = span.length, end = 0;
  for (int64_t q = 0; q < queries.num; ++q) {
    start = std::min(start, span.window_start(queries.rows[q], window));
    end = std::max(end, span.read_end(queries.rows[q]));
  }
  start = start / kSlotBlock * kSlotBlock;
  const int64_t slots = end - start, padded = round_up(slots, kLanes), width = round_up(head.value_size, kLanes);
  const auto scores = uninitialized<float>(queries.num * padded);
  std::vector<Floats> lane_maxima(queries.num);
  score(head, queries, start, slots, window, cap, scores.get(), padded, lane_maxima.data());
  for (int64_t q = 0; q < queries.num; ++q)
    totals[q] = softmax_weights(scores.get() + q * padded, padded, lane_maxima[q]);
  if (queries.in_place<T>() && width == head.value_size) {
    weighted_sums(
        head, queries, start, window, scores.get(), padded, width, sums,
        [&](int64_t first, int64_t last, const auto& part) {
          for_each_run(span, first, last, [&](int64_t slot, int64_t in_pool, int64_t count) {
            part(slot, head.values + in_pool * head.value_step, head.value_step, count);
          });
        });
    return;
  }
  const auto values = uninitialized<float>(slots * width);
  std::fill(values.get(), values.get() + slots * width, 0.0f);
  for (int64_t s = 0; s < slots; ++s)
    widen(head.values + span.pool_slot(start + s) * head.value_step, head.value_size, values.get() + s * width);
  weighted_sums(
      head, queries, start, window, scores.get(), padded, width, sums,
      [&](int64_t first, int64_t last, const auto& part) {
        if (first < last) part(first, values.get() + (first - start) * width, width, last - first);
      });
}

}  // namespace
}  // namespace orthrus
