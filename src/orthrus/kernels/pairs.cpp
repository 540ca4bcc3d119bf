// The repair head's scores of pairs of candidates: the log probability of each candidate (child), given each candidate
// of the draft row before it (parent).
//
// The tensors are small and the steps many, so with one PyTorch operator per step, calls would take most of the time.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

using namespace orthrus;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// log(sum(exp(x))); -inf if all are -inf.
float log_sum_exp(const float* x, int64_t size) {
  const float maximum = *std::max_element(x, x + size);
  if (maximum == kMinusInfinity) return kMinusInfinity;
  float sum = 0.0f;
  for (int64_t i = 0; i < size; ++i) sum += std::exp(x[i] - maximum);
  return maximum + std::log(sum);
}

// log(exp(a) + exp(b)).
float log_add_exp(float a, float b) {
  const float maximum = std::max(a, b);
  if (maximum == kMinusInfinity) return kMinusInfinity;
  return maximum + std::log1p(std::exp(std::min(a, b) - maximum));
}

// out = silu(row + parent), element by element; each has `rank` elements.
template <typename T>
void silu_of_sum(const float* row, const T* parent, int64_t rank, float* out) {
  int64_t k = 0;
  for (; k + kLanes <= rank; k += kLanes) {
    const Floats x = load_floats(row + k) + load_floats(parent + k);
    store_floats(x / (exponential(-x) + 1.0f), out + k);
  }
  for (; k < rank; ++k) {
    const float x = row[k] + static_cast<float>(parent[k]);
    out[k] = x / (std::exp(-x) + 1.0f);
  }
}

// The dot product of two vectors.
template <typename T>
float dot(const float* a, const T* b, int64_t size) {
  Floats sums = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) sums = multiply_add(load_floats(a + k), load_floats(b + k), sums);
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  for (; k < size; ++k) sum += a[k] * static_cast<float>(b[k]);
  return sum;
}

// Writes `pair_log_probs` to out (D, P, M), for arguments that have been checked.
template <typename T>
void fill_log_probs(
    const at::Tensor& rows, const at::Tensor& parents, const at::Tensor& children, const at::Tensor& parent_ids,
    const at::Tensor& child_ids, const at::Tensor& scores, const at::Tensor& totals, float temperature,
    at::Tensor& out) {
  const int64_t rank = rows.size(1), num_parents = parent_ids.size(1), num_children = child_ids.size(1);
  const T *parent = parents.const_data_ptr<T>(), *child = children.const_data_ptr<T>();
  const auto *parent_id = parent_ids.const_data_ptr<int64_t>(), *child_id = child_ids.const_data_ptr<int64_t>();
  const float *row = rows.const_data_ptr<float>(), *score = scores.const_data_ptr<float>();
  const float* total = totals.const_data_ptr<float>();
  auto* to = out.mutable_data_ptr<float>();
  // rest[d]: the log-sum-exp of the scores of all tokens that are no candidates. They keep their scores. It is -inf if
  // the candidates have all of the probability, as far as float32 can tell.
  std::vector<float> rest(rows.size(0));
  for (size_t d = 0; d < rest.size(); ++d) {
    const float log_share = std::min(log_sum_exp(score + d * num_children, num_children) - total[d], 0.0f);
    rest[d] = total[d] + std::log(-std::expm1(log_share));
  }
  parallel_for(0, parent_ids.numel(), 16, [&](int64_t begin, int64_t end) {
    std::vector<float> activations(rank);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t d = i / num_parents;
      silu_of_sum(row + d * rank, parent + parent_id[i] * rank, rank, activations.data());
      float* pair_scores = to + i * num_children;
      const float* own_scores = score + d * num_children;
      for (int64_t m = 0; m < num_children; ++m)
        pair_scores[m] =
            own_scores[m] +
            dot(activations.data(), child + child_id[d * num_children + m] * rank, rank) / temperature;
      const float normalizer = log_add_exp(log_sum_exp(pair_scores, num_children), rest[d]);
      for (int64_t m = 0; m < num_children; ++m) pair_scores[m] -= normalizer;
    }
  });
}

// The ids as a contiguous tensor. Raises an error if an id has no row in the table.
at::Tensor checked_ids(const at::Tensor& ids, const at::Tensor& table) {
  TORCH_CHECK(ids.scalar_type() == at::kLong, "pair_log_probs: ids in int64");
  at::Tensor contiguous = ids.contiguous();
  const auto* id = contiguous.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < contiguous.numel(); ++i)
    TORCH_CHECK(0 <= id[i] && id[i] < table.size(0), "pair_log_probs: id ", id[i], " of ", table.size(0));
  return contiguous;
}

// The operator `pair_log_probs`, for D draft rows with P parents and M children each, and a head of rank r.
//
// rows: (D, r) float32. parents, children: tables (V, r) of float32 or bfloat16. parent_ids (D, P) and child_ids
// (D, M): token ids in int64. scores: (D, M) float32, the children's. totals: (D, 1) float32, the log-sum-exp of the
// scores of all tokens. temperature: scores and totals have been computed with it.
//
// Adds dot(silu(row + parent), child) / temperature to a child's score, and normalises over all tokens. Returns the log
// probabilities (D, P, M).
at::Tensor pair_log_probs(
    const at::Tensor& rows, const at::Tensor& parents, const at::Tensor& children, const at::Tensor& parent_ids,
    const at::Tensor& child_ids, const at::Tensor& scores, const at::Tensor& totals, double temperature) {
  for (const at::Tensor* each : {&rows, &parents, &children, &parent_ids, &child_ids, &scores})
    TORCH_CHECK(each->dim() == 2 && each->is_cpu(), "pair_log_probs: tensors of two dimensions on the CPU");
  for (const at::Tensor* each : {&rows, &scores, &totals})
    TORCH_CHECK(each->scalar_type() == at::kFloat, "pair_log_probs: rows, scores and totals in float32");
  TORCH_CHECK(
      (parents.scalar_type() == at::kFloat || parents.scalar_type() == at::kBFloat16) &&
          children.scalar_type() == parents.scalar_type(),
      "pair_log_probs: tables of one dtype, float32 or bfloat16");
  const int64_t num = rows.size(0), rank = rows.size(1);
  TORCH_CHECK(parents.size(1) == rank && children.size(1) == rank, "pair_log_probs: tables of another rank");
  TORCH_CHECK(
      parent_ids.size(0) == num && child_ids.size(0) == num && scores.sizes() == child_ids.sizes() &&
          totals.numel() == num && totals.is_cpu() && child_ids.size(1) > 0,
      "pair_log_probs: sizes");
  TORCH_CHECK(parents.is_contiguous() && children.is_contiguous(), "pair_log_probs: tables with gaps");
  const at::Tensor of_parents = checked_ids(parent_ids, parents), of_children = checked_ids(child_ids, children);
  at::Tensor out = at::empty({num, parent_ids.size(1), child_ids.size(1)}, scores.options());
  const auto run = parents.scalar_type() == at::kFloat ? fill_log_probs<float> : fill_log_probs<at::BFloat16>;
  run(rows.contiguous(), parents, children, of_parents, of_children, scores.contiguous(), totals.contiguous(),
      static_cast<float>(temperature), out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def(
      "pair_log_probs(Tensor rows, Tensor parents, Tensor children, Tensor parent_ids, Tensor child_ids, "
      "Tensor scores, Tensor totals, float temperature) -> Tensor");
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) { library.impl("pair_log_probs", &pair_log_probs); }
