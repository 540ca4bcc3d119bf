// The best tokens of rows of scores over a vocabulary: a dozen of a draft's, the first of an AR row's.
//
// PyTorch's topk moves pairs of numbers about, one at a time; here one look finds the largest score of each chunk
// of a row, and only the few chunks that can hold one of the best are looked into.

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
constexpr float kNone = -std::numeric_limits<float>::infinity();

// The sum of exp(score - most) over a row, in float64, since there are many.
double total(const float* scores, int64_t size, float most) {
  double sum = 0.0;
  for (int64_t first = 0; first < size; first += kChunk) {
    const int64_t end = std::min(first + kChunk, size);
    Floats part = {};
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) part += exponential(floats(scores + i) - most);
    for (; i < end; ++i) sum += std::exp(scores[i] - most);
    for (int lane = 0; lane < kLanes; ++lane) sum += part[lane];
  }
  return sum;
}

// The largest of the scores [first, end), -inf where none is a number.
template <typename T>
float largest_of(const T* scores, int64_t first, int64_t end) {
  Floats largest = all(kNone);
  for (; first + kLanes <= end; first += kLanes) {
    const Floats found = floats(scores + first);
    largest = found > largest ? found : largest;
  }
  float most = kNone;
  for (int lane = 0; lane < kLanes; ++lane) most = std::max(most, static_cast<float>(largest[lane]));
  for (; first < end; ++first) most = std::max(most, static_cast<float>(scores[first]));
  return most;
}

// Fills values and ids with the `num` best of a row, best first, equal ones by their ids; returns the log of the
// row's sum of exponentials. What is no number is never among the best, unless there is nothing else.
float best_of_row(const float* scores, int64_t size, int64_t num, float* values, int64_t* ids) {
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  std::vector<float> most(chunks);
  for (int64_t c = 0; c < chunks; ++c) most[c] = largest_of(scores, c * kChunk, std::min((c + 1) * kChunk, size));
  // The best lie in chunks whose largest is among the `num` largest, and are no smaller than the last of these.
  std::vector<float> ranked = most;
  const int64_t last = std::min(num, chunks) - 1;
  std::nth_element(ranked.begin(), ranked.begin() + last, ranked.end(), std::greater<>());
  const float least = num > chunks ? kNone : ranked[last];
  std::vector<std::pair<float, int64_t>> found;
  for (int64_t c = 0; c < chunks; ++c) {
    if (most[c] < least || most[c] == kNone) continue;
    for (int64_t i = c * kChunk; i < std::min((c + 1) * kChunk, size); ++i)
      if (scores[i] >= least && scores[i] != kNone) found.emplace_back(-scores[i], i);
  }
  // What filters have thrown away comes last, and only where there is too little else.
  for (int64_t i = 0; i < size && static_cast<int64_t>(found.size()) < num; ++i)
    if (scores[i] == kNone) found.emplace_back(-kNone, i);
  const int64_t here = std::min<int64_t>(num, found.size());
  std::partial_sort(found.begin(), found.begin() + here, found.end());
  for (int64_t n = 0; n < num; ++n) {
    values[n] = n < here ? -found[n].first : std::numeric_limits<float>::quiet_NaN();
    ids[n] = n < here ? found[n].second : 0;
  }
  const float top = values[0];
  // Scores of nothing but -inf, or with an infinite one among them, have no other total.
  if (!(std::abs(top) < std::numeric_limits<float>::infinity())) return top;
  return top + static_cast<float>(std::log(total(scores, size, top)));
}

// scores (rows, V) float32 -> values and ids (rows, num), best first, and totals (rows, 1): log-sum-exp.
std::tuple<at::Tensor, at::Tensor, at::Tensor> best_tokens(const at::Tensor& scores, int64_t num) {
  TORCH_CHECK(
      scores.dim() == 2 && scores.is_cpu() && scores.scalar_type() == at::kFloat, "best_tokens: rows of float32");
  const int64_t rows = scores.size(0), size = scores.size(1);
  TORCH_CHECK(0 < num && num <= size, "best_tokens: ", num, " of ", size);
  const at::Tensor whole = scores.contiguous();
  at::Tensor values = at::empty({rows, num}, scores.options()), totals = at::empty({rows, 1}, scores.options());
  at::Tensor ids = at::empty({rows, num}, scores.options().dtype(at::kLong));
  const float* from = whole.const_data_ptr<float>();
  auto* to = values.mutable_data_ptr<float>();
  auto* total_of = totals.mutable_data_ptr<float>();
  auto* id = ids.mutable_data_ptr<int64_t>();
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      total_of[r] = best_of_row(from + r * size, size, num, to + r * num, id + r * num);
  });
  return {values, ids, totals};
}

// The first of the largest scores of each row, ids (rows).
template <typename T>
void first_of_rows(const at::Tensor& scores, at::Tensor& ids) {
  const int64_t size = scores.size(1);
  const T* from = scores.const_data_ptr<T>();
  auto* id = ids.mutable_data_ptr<int64_t>();
  parallel_for(0, scores.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = from + r * size;
      float most = kNone;
      int64_t chunk = 0;
      for (int64_t first = 0; first < size; first += kChunk) {
        const float found = largest_of(row, first, std::min(first + kChunk, size));
        if (found > most) most = found, chunk = first;
      }
      const int64_t last = std::min(chunk + kChunk, size);
      const T* place = std::find_if(row + chunk, row + last, [&](T score) { return static_cast<float>(score) == most; });
      id[r] = place == row + last ? 0 : place - row;
    }
  });
}

// scores (rows, V) of float32 or bfloat16 -> ids (rows): the first of the largest of each.
at::Tensor first_best(const at::Tensor& scores) {
  TORCH_CHECK(
      scores.dim() == 2 && scores.size(1) > 0 && scores.is_cpu() &&
          (scores.scalar_type() == at::kFloat || scores.scalar_type() == at::kBFloat16),
      "first_best: rows of scores in float32 or bfloat16");
  const at::Tensor whole = scores.contiguous();
  at::Tensor ids = at::empty({scores.size(0)}, scores.options().dtype(at::kLong));
  if (scores.scalar_type() == at::kFloat)
    first_of_rows<float>(whole, ids);
  else
    first_of_rows<at::BFloat16>(whole, ids);
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
