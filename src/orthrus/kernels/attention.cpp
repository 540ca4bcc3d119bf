// Attention of the rows of a pass, which may belong to many requests, to paged slots. Queries are float32 or bfloat16.
// The pool has the same dtype, or bfloat16 for queries in float32.
//
// A row reads the committed history of its own request, and those rows of this pass that its request's tail allows.
// Sums are in float32 and in the order of the slots. A slot that the tail forbids is never multiplied by a weight, so a
// NaN in it does not affect the row. A row has the same bits in every pass, beside any other requests, and wherever its
// history is stored in the pool.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "attention_head.h"
#include "attention_plan.h"
#include "threads.h"
#include "vectors.h"

namespace {

using namespace orthrus;

// group: query heads per key/value head. width: value_size, rounded up to whole vectors.
struct Shape {
  int64_t num_heads, num_kv, group, key_size, value_size, width;
};

// Attention of queries [begin, end) of a span, in the order that `Span::cost` describes. Q: dtype of queries and
// outputs. T: dtype of the pool.
template <typename Q, typename T>
void attend_queries(
    const Span& span, const Shape& shape, int64_t begin, int64_t end, const at::Tensor& query, const at::Tensor& keys,
    const at::Tensor& values, float scale, int64_t window, float cap, Q* to) {
  const int64_t num_queries = shape.group * span.rows(), max_num = std::min(kMaxQueries, end - begin);
  const Q* from = query.const_data_ptr<Q>();
  const auto scratch = uninitialized<float>(max_num * (shape.key_size + shape.width + 1));
  float *elements = scratch.get(), *sums = elements + max_num * shape.key_size, *totals = sums + max_num * shape.width;
  int64_t rows[kMaxQueries];
  for (int64_t num; begin < end; begin += num) {
    const int64_t kv = begin / num_queries, first = begin % num_queries;
    const int64_t left = std::min(end - begin, num_queries - first), parts = (left + max_num - 1) / max_num;
    num = (left + parts - 1) / parts;
    const auto head_of = [&](int64_t q) { return kv * shape.group + (first + q) % shape.group; };
    for (int64_t q = 0; q < num; ++q) {
      rows[q] = (first + q) / shape.group;
      const Q* here = from + head_of(q) * query.stride(1) + span.pass_row(rows[q]) * query.stride(2);
      widen(here, shape.key_size, elements + q * shape.key_size, scale);
    }
    const Head<T> head{
        keys.const_data_ptr<T>() + kv * keys.stride(1),
        values.const_data_ptr<T>() + kv * values.stride(1),
        values.stride(2),
        shape.key_size,
        shape.value_size,
        &span};
    attend(head, {elements, rows, num}, window, cap, sums, totals);
    for (int64_t q = 0; q < num; ++q)
      divide(
          sums + q * shape.width, shape.value_size, totals[q],
          to + (span.pass_row(rows[q]) * shape.num_heads + head_of(q)) * shape.value_size);
  }
}

// Attention of all queries of all spans, in parallel.
template <typename Q, typename T>
void attend_all(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const std::vector<Span>& spans,
    float scale, int64_t window, float cap, at::Tensor& out) {
  const Shape shape{
      query.size(1), keys.size(1), query.size(1) / keys.size(1), keys.size(3), values.size(3),
      round_up(values.size(3), kLanes)};
  Q* to = out.mutable_data_ptr<Q>();
  // Each thread takes consecutive queries of about the same total cost.
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
      // The number of this span's queries that come before the cost `at` is reached, by binary search.
      const auto first_query_at = [&](double at) {
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
      const int64_t begin = first_query_at(low), end = first_query_at(high);
      if (begin < end)
        attend_queries<Q, T>(spans[i], shape, begin, end, query, keys, values, scale, window, cap, to);
    }
  });
}

// The operator `paged_attention`.
//
// query: (1, heads, rows, key size). keys: (1, kv heads, pages, key size, kPage), and values: (1, kv heads, slots,
// value size), both of the pool; they already contain the rows of this pass. plan: see attention_plan.h. scale: factor
// of the scores. window: size of the sliding window in positions, the row's own included; 0 for no window. cap: limits
// scores to (-cap, cap) by tanh; 0 for no limit. Returns (1, rows, heads, value size).
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
  const std::vector<Span> spans = parse_plan(plan, query.size(2));
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

// The C function that compiled layers call instead of the operator.
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
