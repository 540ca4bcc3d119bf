// The tokens with the highest scores of each row: sixteen for a draft row, one for an AR row.
//
// PyTorch's topk moves (score, id) pairs one at a time. Here one fast scan finds the maximum of each chunk of a row.
// Then only the few chunks that can contain one of the best scores are searched.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "threads.h"
#include "vectors.h"

namespace {

using namespace orthrus;
constexpr int64_t kChunk = 16 * kLanes;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The sum of exp(score - maximum) over a row, in float64, because a row has many scores.
double sum_exp(const float* scores, int64_t size, float maximum) {
  double sum = 0.0;
  for (int64_t first = 0; first < size; first += kChunk) {
    const int64_t end = std::min(first + kChunk, size);
    Floats part = {};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) part += exponential(load_floats(scores + i) - maximum);
    for (; i < end; ++i) sum += std::exp(scores[i] - maximum);
    for (int lane = 0; lane < kLanes; ++lane) sum += part[lane];
  }
  return sum;
}

// The maximum of the scores [first, end), ignoring NaN; -inf if all are NaN.
template <typename T>
float max_of(const T* scores, int64_t first, int64_t end) {
  Floats lane_maxima = broadcast(kMinusInfinity);
  for (; first + kLanes <= end; first += kLanes) {
    const Floats found = load_floats(scores + first);
    lane_maxima = found > lane_maxima ? found : lane_maxima;
  }
  float maximum = kMinusInfinity;
  for (int lane = 0; lane < kLanes; ++lane) maximum = std::max(maximum, static_cast<float>(lane_maxima[lane]));
  for (; first < end; ++first) maximum = std::max(maximum, static_cast<float>(scores[first]));
  return maximum;
}

// Writes the `num` highest scores of a row to `values`, in descending order, and their token ids to `ids`. Equal scores
// are in ascending order of their ids. NaN scores are left out; if fewer than `num` scores remain, the rest of `values`
// is NaN and the rest of `ids` is 0. Returns the log-sum-exp of the row.
float best_of_row(const float* scores, int64_t size, int64_t num, float* values, int64_t* ids) {
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  std::vector<float> maxima(chunks);
  for (int64_t c = 0; c < chunks; ++c) maxima[c] = max_of(scores, c * kChunk, std::min((c + 1) * kChunk, size));
  // None of the `num` best scores is smaller than the `num`-th largest chunk maximum.
  std::vector<float> ranked = maxima;
  const int64_t last = std::min(num, chunks) - 1;
  std::nth_element(ranked.begin(), ranked.begin() + last, ranked.end(), std::greater<>());
  const float least = num > chunks ? kMinusInfinity : ranked[last];
  std::vector<std::pair<float, int64_t>> found;
  for (int64_t c = 0; c < chunks; ++c) {
    if (maxima[c] < least || maxima[c] == kMinusInfinity) continue;
    for (int64_t i = c * kChunk; i < std::min((c + 1) * kChunk, size); ++i)
      if (scores[i] >= least && scores[i] != kMinusInfinity) found.emplace_back(-scores[i], i);
  }
  // Sampling filters set scores to -inf. These come last, and only if there are too few others.
  for (int64_t i = 0; i < size && static_cast<int64_t>(found.size()) < num; ++i)
    if (scores[i] == kMinusInfinity) found.emplace_back(-kMinusInfinity, i);
  const int64_t num_found = std::min<int64_t>(num, found.size());
  std::partial_sort(found.begin(), found.begin() + num_found, found.end());
  for (int64_t n = 0; n < num; ++n) {
    values[n] = n < num_found ? -found[n].first : std::numeric_limits<float>::quiet_NaN();
    ids[n] = n < num_found ? found[n].second : 0;
  }
  const float top = values[0];
  // If the best score is infinite or NaN, it is the log-sum-exp.
  if (!(std::abs(top) < std::numeric_limits<float>::infinity())) return top;
  return top + static_cast<float>(std::log(sum_exp(scores, size, top)));
}

// The operator `best_tokens`. scores: (rows, V) float32. Returns values and ids (rows, num), best first, and the
// log-sum-exp of each row (rows, 1).
std::tuple<at::Tensor, at::Tensor, at::Tensor> best_tokens(const at::Tensor& scores, int64_t num) {
  TORCH_CHECK(
      scores.dim() == 2 && scores.is_cpu() && scores.scalar_type() == at::kFloat, "best_tokens: rows of float32");
  const int64_t rows = scores.size(0), size = scores.size(1);
  TORCH_CHECK(0 < num && num <= size, "best_tokens: ", num, " of ", size);
  const at::Tensor contiguous = scores.contiguous();
  at::Tensor values = at::empty({rows, num}, scores.options()), totals = at::empty({rows, 1}, scores.options());
  at::Tensor ids = at::empty({rows, num}, scores.options().dtype(at::kLong));
  const float* from = contiguous.const_data_ptr<float>();
  auto* to = values.mutable_data_ptr<float>();
  auto* total_of = totals.mutable_data_ptr<float>();
  auto* id = ids.mutable_data_ptr<int64_t>();
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      total_of[r] = best_of_row(from + r * size, size, num, to + r * num, id + r * num);
  });
  return {values, ids, totals};
}

// Writes to ids (rows) the index of each row's maximum, the first one for equal scores, and 0 if all are NaN or -inf.
template <typename T>
void argmax_of_rows(const at::Tensor& scores, at::Tensor& ids) {
  const int64_t size = scores.size(1);
  const T* from = scores.const_data_ptr<T>();
  auto* id = ids.mutable_data_ptr<int64_t>();
  parallel_for(0, scores.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = from + r * size;
      float maximum = kMinusInfinity;
      int64_t chunk = 0;
      for (int64_t first = 0; first < size; first += kChunk) {
        const float chunk_maximum = max_of(row, first, std::min(first + kChunk, size));
        if (chunk_maximum > maximum) maximum = chunk_maximum, chunk = first;
      }
      const int64_t last = std::min(chunk + kChunk, size);
      const T* found = std::find_if(
          row + chunk, row + last, [&](T score) { return static_cast<float>(score) == maximum; });
      id[r] = found == row + last ? 0 : found - row;
    }
  });
}

// The operator `first_best`. scores: (rows, V) of float32 or bfloat16. Returns the argmax of each row, ids (rows).
at::Tensor first_best(const at::Tensor& scores) {
  TORCH_CHECK(
      scores.dim() == 2 && scores.size(1) > 0 && scores.is_cpu() &&
          (scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kBFloat16),
      "first_best: rows of scores in float32 or bfloat16");
  const at::Tensor contiguous = scores.contiguous();
  at::Tensor ids = at::empty({scores.size(0)}, scores.options().dtype(at::kLong));
  if (scores.scalar_type() == at::kFloat)
    argmax_of_rows<float>(contiguous, ids);
  else
    argmax_of_rows<at::BFloat16>(contiguous, ids);
  return ids;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("first_best(Tensor scores) -> Tensor");
  library.def("best_tokens(Tensor scores, int num) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) {
  library.impl("best_tokens", &best_tokens);
  library.impl("first_best", &first_best);
}
