// Attention of a pass over rows of many requests to the paged slots that each row reads. Queries are float32 or
// bfloat16, and so is the pool, which may also hold bfloat16 for queries in float32.
//
// A row reads the committed history of its own request, and of this pass the rows that its request's tail allows.
// All sums are in float32 and in the order of the positions, and a slot that a row may not read is never multiplied
// by its weight. So a row comes out equal to the last bit in whatever pass it stands, beside whatever requests, and
// wherever its history lies in the pool; and a NaN in a slot that it may not read cannot reach it.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

using namespace orthrus;
// Vectors, and rows, that are summed at once; and so many slots are scored at once.
constexpr int kWide = kLanes > 8 ? 4 : kVectors, kHigh = kLanes > 8 ? 6 : kRows;
constexpr int64_t kSlots = kWide * kLanes, kMostQueries = 96;
// Slots of a page (`model/pool.py` has the same number).
constexpr int64_t kPage = 64;
static_assert(kPage % kSlots == 0, "slots that are scored at once lie in one page");
constexpr float kNever = -std::numeric_limits<float>::infinity();
// Numbers that describe a span in a plan, see `Span`.
constexpr int64_t kSpanNumbers = 8, kPlanHead = 2;

int64_t whole(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// One request's part of a pass. Its rows are counted from 0, AR rows first; row j writes position length + j of
// the request's slots. tail: a bit for each pair of rows, or null where AR rows read all rows up to themselves.
struct Span {
  int64_t ar_first, num_ar, draft_first, num_draft, length, words;
  const int64_t *table, *tail, *positions;

  int64_t rows() const { return num_ar + num_draft; }
  int64_t slots() const { return length + rows(); }
  int64_t row_of_pass(int64_t row) const { return row < num_ar ? ar_first + row : draft_first + row - num_ar; }
  int64_t place(int64_t slot) const { return table[slot / kPage] * kPage + slot % kPage; }
  bool reads(int64_t row, int64_t other) const {
    if (tail == nullptr) return other <= row;
    return static_cast<uint64_t>(tail[row * words + other / 64]) >> (other % 64) & 1u;
  }
  // Slots up to the first that the row may not read.
  int64_t lead(int64_t row) const {
    int64_t other = 0;
    if (tail == nullptr) return length + row + 1;
    while (other < rows() && reads(row, other)) ++other;
    return length + other;
  }
  // Behind the last slot that the row may read.
  int64_t end(int64_t row) const { return tail == nullptr ? length + row + 1 : slots(); }
  // What queries up to so many cost, those of one head of keys behind those of another: each reads up to its row.
  double cost(int64_t queries, int64_t group) const {
    const auto rows_cost = [&](double num) {
      const double each = static_cast<double>(length + kPage) + (tail == nullptr ? 0.5 * num : rows());
      return group * num * each;
    };
    const int64_t of_head = group * rows();
    return static_cast<double>(queries / of_head) * rows_cost(rows()) +
           rows_cost(static_cast<double>(queries % of_head) / group);
  }
  // The first slot of the history inside the row's window.
  int64_t from(int64_t row, int64_t window) const {
    return window <= 0 ? 0 : std::clamp<int64_t>(positions[row_of_pass(row)] - window + 1, 0, length);
  }
  bool sees(int64_t row, int64_t other, int64_t window) const {
    return reads(row, other) &&
           (window <= 0 || positions[row_of_pass(row)] - positions[row_of_pass(other)] < window);
  }
};

std::vector<Span> spans_of(const at::Tensor& plan, int64_t num_rows) {
  const int64_t size = plan.numel();
  const int64_t* numbers = plan.const_data_ptr<int64_t>();
  TORCH_CHECK(size >= kPlanHead, "attention: a plan without a head");
  const int64_t num = numbers[0], positions = numbers[1];
  TORCH_CHECK(
      num > 0 && kPlanHead + num * kSpanNumbers <= size && positions > 0 && positions + num_rows <= size,
      "attention: a plan that ends too early");
  std::vector<Span> spans;
  for (int64_t i = 0; i < num; ++i) {
    const int64_t* s = numbers + kPlanHead + i * kSpanNumbers;
    const int64_t table = s[5], tail = s[6], rows = s[1] + s[3], words = s[7];
    const int64_t pages = (s[4] + rows + kPage - 1) / kPage;
    TORCH_CHECK(
        s[1] >= 0 && s[3] >= 0 && rows > 0 && s[4] >= 0 && s[0] >= 0 && s[0] + s[1] <= num_rows && s[2] >= 0 &&
            s[2] + s[3] <= num_rows && table > 0 && table + pages <= size &&
            (tail == 0 ? s[3] == 0 : tail > 0 && words * 64 >= rows && tail + rows * words <= size),
        "attention: a span that does not fit its plan");
    spans.push_back(
        {s[0], s[1], s[2], s[3], s[4], words, numbers + table, tail == 0 ? nullptr : numbers + tail,
         numbers + positions});
  }
  return spans;
}

// One head of a pool: pages of keys, (key size, kPage) each, and values, numbers `value_step` apart from slot to slot.
template <typename T>
struct Head {
  const T *keys, *values;
  int64_t value_step, key_size, value_size;
  const Span* span;

  // The first numbers of a slot's key and of those behind it in its page; the others follow kPage numbers apart.
  const T* key(int64_t slot) const {
    return keys + span->table[slot / kPage] * key_size * kPage + slot % kPage;
  }
};

// Numbers as float32, times `scale`.
template <typename T>
void widen(const T* from, int64_t size, float* to, float scale = 1.0f) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(floats(from + d) * scale, to + d);
  for (; d < size; ++d) to[d] = static_cast<float>(from[d]) * scale;
}

// Numbers divided by a total; `sums` is filled up to whole vectors.
template <typename T>
void divided(const float* sums, int64_t size, float total, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(floats(sums + d) / total, to + d);
  for (; d < size; ++d) to[d] = static_cast<T>(sums[d] / total);
}

// Brings the keys and values of slots [first, first + count) near, which lie in one page.
template <typename T>
void ask_for_slots(const Head<T>& head, int64_t first, int64_t count) {
  if (count <= 0) return;
  const auto* keys = reinterpret_cast<const char*>(head.key(first));
  for (int64_t d = 0; d < head.key_size; ++d) ask_for(keys + d * kPage * sizeof(T), count * sizeof(T));
  const int64_t value_bytes = head.value_step * sizeof(T);
  ask_for(
      reinterpret_cast<const char*>(head.values) + head.span->place(first) * value_bytes, count * value_bytes);
}

// Queries of a head, scaled, and the rows of the span that they belong to.
struct Queries {
  const float* numbers;
  const int64_t* rows;
  int64_t num;

  // Whether keys and values are widened as they are read; for many queries they are widened once.
  template <typename T>
  bool in_place() const {
    return std::is_same_v<T, float> || num <= kHigh;
  }
};

// Scores (num, padded) of slots from `start` on, -inf where the row does not read; most: the largest of each.
template <typename T>
void score(
    const Head<T>& head, const Queries& queries, int64_t start, int64_t slots, int64_t window, float cap,
    float* scores, int64_t padded, Floats* most) {
  const Span& span = *head.span;
  const bool in_place = queries.in_place<T>();
  const auto wide = room<float>(in_place ? 0 : head.key_size * kSlots);
  ask_for_slots(head, start, std::min(kSlots, slots));
  for (int64_t first = 0; first < slots; first += kSlots) {
    ask_for_slots(head, start + first + kSlots, std::min(kSlots, slots - first - kSlots));
    const T* keys = head.key(start + first);
    const int64_t here = std::min(kSlots, padded - first);
    const auto multiplied = [&](const auto* numbers, int64_t step) {
      with_known<kWide>(here / kLanes, [&](auto vectors) {
        evenly(queries.num, kHigh, [&](int64_t q, int64_t rows_here) {
          multiply_rows<kHigh, decltype(vectors)::value>(
              rows_here, queries.numbers + q * head.key_size, head.key_size, numbers, step, head.key_size,
              scores + q * padded + first, padded);
        });
      });
    };
    if (in_place) {
      multiplied(keys, kPage);
      continue;
    }
    for (int64_t d = 0; d < head.key_size; ++d) widen(keys + d * kPage, here, wide.get() + d * kSlots);
    multiplied(wide.get(), kSlots);
  }
  int64_t lead = 0, from = 0;
  for (int64_t q = 0; q < queries.num; ++q) {
    const int64_t row = queries.rows[q];
    if (q == 0 || row != queries.rows[q - 1]) {
      lead = window > 0 ? span.length : span.lead(row);
      from = span.from(row, window);
    }
    float* here = scores + q * padded;
    if (cap > 0.0f)
      for (int64_t s = 0; s < slots; ++s) here[s] = cap * std::tanh(here[s] / cap);
    std::fill(here, here + std::max<int64_t>(0, from - start), kNever);
    // Without a tail a row reads nothing behind itself.
    const int64_t end = std::min(span.end(row) - start, slots);
    for (int64_t s = lead; s < start + end; ++s)
      if (!span.sees(row, s - span.length, window)) here[s - start] = kNever;
    std::fill(here + end, here + padded, kNever);
    Floats largest = all(kNever);
    for (int64_t s = 0; s < padded; s += kLanes) {
      const Floats found = floats(here + s);
      largest = largest > found ? largest : found;
    }
    most[q] = largest;
  }
}

// Scores to weights, the largest of which is one; returns their sum. It is taken in whole numbers of 2^-28, so
// it does not depend on an order.
float exponentials(float* scores, int64_t padded, Floats most) {
  constexpr float kOne = 1 << 28;
  // So many of them fit into 32 bits.
  constexpr int64_t kFit = 4;
  // Below it weights are zero; and within it a number's exponential depends on no other one's, on any processor.
  constexpr float kLeast = -87.0f;
  float largest = most[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, static_cast<float>(most[i]));
  VectorOf<int64_t>::type sums = {};
  for (int64_t first = 0; first < padded; first += kFit * kLanes) {
    Ints part = {};
    for (int64_t s = first; s < std::min(first + kFit * kLanes, padded); s += kLanes) {
      const Floats below = floats(scores + s) - largest;
      Floats weight = exponential(below < kLeast ? all(kLeast) : below);
      weight = below >= kLeast ? weight : Floats{};
      part += __builtin_convertvector(weight * kOne + 0.5f, Ints);
      // A NaN stays a NaN.
      store(below == below ? weight : below, scores + s);
    }
    sums += __builtin_convertvector(part, VectorOf<int64_t>::type);
  }
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return static_cast<float>(static_cast<double>(sum) / kOne);
}

// Weights (num, count) times values (count, width), `step` apart, added to sums (num, width); in whole vectors.
template <typename T>
void weigh(
    int64_t num, const float* weights, int64_t padded, const T* values, int64_t step, int64_t count, int64_t width,
    float* sums, bool onward) {
  for (int64_t d = 0; d < width; d += kWide * kLanes) {
    with_known<kWide>(std::min<int64_t>(kWide, (width - d) / kLanes), [&](auto vectors) {
      multiply_rows<kHigh, decltype(vectors)::value>(
          num, weights, padded, values + d, step, count, sums + d, width, nullptr, 0, onward);
    });
  }
}

// Slots [first, last) as runs that lie one behind another in the pool: calls run(slot, place, count).
template <typename Run>
void runs(const Span& span, int64_t first, int64_t last, const Run& run) {
  while (first < last) {
    const int64_t place = span.place(first);
    int64_t end = std::min(last, (first / kPage + 1) * kPage);
    while (end < last && span.place(end) == place + end - first) end = std::min(last, end + kPage);
    run(first, place, end - first);
    first = end;
  }
}

// Values of slots by their number, wherever they lie: of the pool itself, or widened copies one behind another.
template <typename T, typename Each>
void sums_of(
    const Head<T>& head, const Queries& queries, int64_t start, int64_t window, const float* weights, int64_t padded,
    int64_t width, float* sums, const Each& each) {
  const Span& span = *head.span;
  evenly(queries.num, kHigh, [&](int64_t q, int64_t num) {
    int64_t common = span.slots();
    for (int64_t i = q; i < q + num; ++i) common = std::min(common, span.lead(queries.rows[i]));
    // What all of these rows read up to is one product; a weight outside of a row's window is zero.
    each(start, common, [&](int64_t slot, auto* values, int64_t step, int64_t count) {
      weigh(
          num, weights + q * padded + slot - start, padded, values, step, count, width, sums + q * width,
          slot > start);
    });
    if (common <= start) std::fill(sums + q * width, sums + (q + num) * width, 0.0f);
    for (int64_t i = q; i < q + num; ++i)
      for (int64_t s = std::max(common, start); s < span.end(queries.rows[i]); ++s)
        if (span.sees(queries.rows[i], s - span.length, window))
          each(s, s + 1, [&](int64_t slot, auto* values, int64_t step, int64_t count) {
            weigh(1, weights + i * padded + slot - start, padded, values, step, count, width, sums + i * width, true);
          });
  });
}

// Queries of one head of keys to sums (num, width) of values and the totals of their weights.
template <typename T>
void attend(
    const Head<T>& head, const Queries& queries, int64_t window, float cap, float* sums, float* totals) {
  const Span& span = *head.span;
  int64_t start = span.length, end = 0;
  for (int64_t q = 0; q < queries.num; ++q) {
    start = std::min(start, span.from(queries.rows[q], window));
    end = std::max(end, span.end(queries.rows[q]));
  }
  start = start / kSlots * kSlots;
  const int64_t slots = end - start, padded = whole(slots, kLanes), width = whole(head.value_size, kLanes);
  const auto scores = room<float>(queries.num * padded);
  std::vector<Floats> most(queries.num);
  score(head, queries, start, slots, window, cap, scores.get(), padded, most.data());
  for (int64_t q = 0; q < queries.num; ++q) totals[q] = exponentials(scores.get() + q * padded, padded, most[q]);
  if (queries.in_place<T>() && width == head.value_size) {
    sums_of(
        head, queries, start, window, scores.get(), padded, width, sums,
        [&](int64_t first, int64_t last, const auto& part) {
          runs(span, first, last, [&](int64_t slot, int64_t place, int64_t count) {
            part(slot, head.values + place * head.value_step, head.value_step, count);
          });
        });
    return;
  }
  const auto values = room<float>(slots * width);
  std::fill(values.get(), values.get() + slots * width, 0.0f);
  for (int64_t s = 0; s < slots; ++s)
    widen(head.values + span.place(start + s) * head.value_step, head.value_size, values.get() + s * width);
  sums_of(
      head, queries, start, window, scores.get(), padded, width, sums,
      [&](int64_t first, int64_t last, const auto& part) {
        if (first < last) part(first, values.get() + (first - start) * width, width, last - first);
      });
}

struct Shape {
  int64_t num_heads, num_kv, group, key_size, value_size, width;
};

// Queries [begin, end) of a span, in the order of the heads of keys. Q: dtype of queries and outputs; T: of the pool.
template <typename Q, typename T>
void attend_some(
    const Span& span, const Shape& shape, int64_t begin, int64_t end, const at::Tensor& query, const at::Tensor& keys,
    const at::Tensor& values, float scale, int64_t window, float cap, Q* to) {
  const int64_t num_queries = shape.group * span.rows(), most = std::min(kMostQueries, end - begin);
  const Q* from = query.const_data_ptr<Q>();
  const auto scratch = room<float>(most * (shape.key_size + shape.width + 1));
  float *numbers = scratch.get(), *sums = numbers + most * shape.key_size, *totals = sums + most * shape.width;
  int64_t rows[kMostQueries];
  for (int64_t num; begin < end; begin += num) {
    const int64_t kv = begin / num_queries, first = begin % num_queries;
    const int64_t left = std::min(end - begin, num_queries - first), parts = (left + most - 1) / most;
    num = (left + parts - 1) / parts;
    const auto head_of = [&](int64_t q) { return kv * shape.group + (first + q) % shape.group; };
    for (int64_t q = 0; q < num; ++q) {
      rows[q] = (first + q) / shape.group;
      const Q* here = from + head_of(q) * query.stride(1) + span.row_of_pass(rows[q]) * query.stride(2);
      widen(here, shape.key_size, numbers + q * shape.key_size, scale);
    }
    const Head<T> head{
        keys.const_data_ptr<T>() + kv * keys.stride(1),
        values.const_data_ptr<T>() + kv * values.stride(1),
        values.stride(2),
        shape.key_size,
        shape.value_size,
        &span};
    attend(head, {numbers, rows, num}, window, cap, sums, totals);
    for (int64_t q = 0; q < num; ++q)
      divided(
          sums + q * shape.width, shape.value_size, totals[q],
          to + (span.row_of_pass(rows[q]) * shape.num_heads + head_of(q)) * shape.value_size);
  }
}

template <typename Q, typename T>
void attend_all(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const std::vector<Span>& spans,
    float scale, int64_t window, float cap, at::Tensor& out) {
  const Shape shape{
      query.size(1), keys.size(1), query.size(1) / keys.size(1), keys.size(3), values.size(3),
      whole(values.size(3), kLanes)};
  Q* to = out.mutable_data_ptr<Q>();
  // Threads share all queries by what they cost.
  std::vector<double> costs{0.0};
  int64_t num_queries = 0;
  for (const Span& span : spans) {
    const int64_t queries = shape.num_heads * span.rows();
    num_queries += queries;
    costs.push_back(costs.back() + span.cost(queries, shape.group));
  }
  const int64_t threads = num_queries > kRows ? std::max<int64_t>(1, at::get_num_threads()) : 1;
  parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
    const double low = costs.back() * first_thread / threads, high = costs.back() * last_thread / threads;
    for (size_t i = 0; i < spans.size(); ++i) {
      const int64_t queries = shape.num_heads * spans[i].rows();
      // The first query with which the cost so far is reached.
      const auto place = [&](double at) {
        int64_t first = 0, last = queries;
        while (first < last) {
          const int64_t middle = (first + last) / 2;
          if (costs[i] + spans[i].cost(middle, shape.group) < at)
            first = middle + 1;
          else
            last = middle;
        }
        return first;
      };
      const int64_t begin = place(low), end = place(high);
      if (begin < end)
        attend_some<Q, T>(spans[i], shape, begin, end, query, keys, values, scale, window, cap, to);
    }
  });
}

// query (1, heads, rows, key size); keys (1, kv heads, pages, key size, kPage) and values (1, kv heads, slots, value
// size), the pool's, which hold the pass's own rows already; plan int64, see `model/passes.py`. window: positions that a
// row reads back, itself included, 0 for all; cap: what scores are squeezed into by a tanh, 0 for none. Returns
// (1, rows, heads, value size).
at::Tensor attention(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& plan, double scale,
    int64_t window, double cap) {
  TORCH_CHECK(
      query.dim() == 4 && keys.dim() == 5 && values.dim() == 4 && query.size(0) == 1 && keys.size(0) == 1 &&
          values.size(0) == 1,
      "attention: queries and values (1, heads, rows, size), keys (1, heads, pages, size, slots of a page)");
  TORCH_CHECK(
      keys.scalar_type() == values.scalar_type() &&
          (query.scalar_type() == at::kFloat || query.scalar_type() == at::kBFloat16) &&
          (keys.scalar_type() == query.scalar_type() || keys.scalar_type() == at::kBFloat16),
      "attention: float32 or bfloat16, and a pool of the queries' dtype or of bfloat16");
  TORCH_CHECK(
      query.stride(3) == 1 && values.stride(3) == 1 && keys.stride(4) == 1 && keys.size(4) == kPage &&
          keys.stride(3) == kPage && keys.stride(2) == keys.size(3) * kPage,
      "attention: strided numbers");
  TORCH_CHECK(
      query.size(3) == keys.size(3) && keys.size(1) > 0 && query.size(1) % keys.size(1) == 0 &&
          values.size(1) == keys.size(1) && values.size(2) == keys.size(2) * kPage,
      "attention: heads that do not fit");
  TORCH_CHECK(plan.scalar_type() == at::kLong && plan.is_contiguous(), "attention: a plan of whole numbers");
  const std::vector<Span> spans = spans_of(plan, query.size(2));
  for (const Span& span : spans)
    for (int64_t page = 0; page < (span.slots() + kPage - 1) / kPage; ++page)
      TORCH_CHECK(
          span.table[page] >= 0 && span.table[page] < keys.size(2), "attention: no such page");
  at::Tensor out = at::empty({1, query.size(2), query.size(1), values.size(3)}, query.options());
  const auto attend_with = [&](auto of_query, auto of_pool) {
    attend_all<decltype(of_query), decltype(of_pool)>(
        query, keys, values, spans, static_cast<float>(scale), window, static_cast<float>(cap), out);
  };
  if (query.scalar_type() == at::kBFloat16)
    attend_with(at::BFloat16{}, at::BFloat16{});
  else if (keys.scalar_type() == at::kBFloat16)
    attend_with(float{}, at::BFloat16{});
  else
    attend_with(float{}, float{});
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def(
      "paged_attention(Tensor query, Tensor keys, Tensor values, Tensor plan, float scale, int window, float cap)"
      " -> Tensor");
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) { library.impl("paged_attention", &attention); }

// What compiled layers call.
extern "C" AOTITorchError aoti_torch_cpu_paged_attention(
    AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle plan, double scale,
    int64_t window, double cap, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const auto tensor = [](AtenTensorHandle handle) {
      return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
    };
    *out = torch::aot_inductor::new_tensor_handle(
        attention(tensor(query), tensor(keys), tensor(values), tensor(plan), scale, window, cap));
  });
}
