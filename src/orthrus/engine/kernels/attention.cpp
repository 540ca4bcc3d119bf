// Attention of the few rows of a decoding pass to the slots that each of them sees, in float32 or bfloat16.
//
// All sums are in float32 and in the order of the slots, and slots that a row does not see count zero, as long as
// they hold numbers. So a row comes out alike to the last bit in whatever pass it stands and wherever its past lies
// in the cache, if later tokens lie behind earlier ones: a drafted token's row as a tree's node or alone.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "vectors.h"

namespace {

using namespace orthrus;
// Slots whose keys are turned at once; vectors of a value, and rows, that are summed at once.
constexpr int kKeyVectors = 3, kValueVectors = 4, kValueRows = kRows * 3 / 4;
constexpr int64_t kSlots = kKeyVectors * kLanes, kMostQueries = 96;

int64_t whole(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// One head of keys, (slots, size) numbers `step` apart, and of values; which rows see which slots.
template <typename T>
struct Head {
  const T *keys, *values;
  int64_t key_step, value_step, key_size, value_size, slots;
  const bool* visible;
  int64_t visible_step;

  // Slots that a row sees all of, before the first that it does not.
  int64_t seen(int64_t row) const {
    const bool* sees = visible + row * visible_step;
    const void* hidden = std::memchr(sees, false, slots);
    return hidden == nullptr ? slots : static_cast<const bool*>(hidden) - sees;
  }
};

// Rows (count, size) of numbers, `from_step` apart, as float32, `to_step` apart, times `scale`.
template <typename T>
void widen(
    const T* from, int64_t from_step, int64_t count, int64_t size, float* to, int64_t to_step, float scale = 1.0f) {
  for (int64_t row = 0; row < count; ++row) {
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) store(floats(from + row * from_step + d) * scale, to + row * to_step + d);
    for (; d < size; ++d) to[row * to_step + d] = static_cast<float>(from[row * from_step + d]) * scale;
  }
}

// Numbers divided by a total; `sums` is filled up to whole vectors.
template <typename T>
void divided(const float* sums, int64_t size, float total, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(floats(sums + d) / total, to + d);
  for (; d < size; ++d) to[d] = static_cast<T>(sums[d] / total);
}

// Keys [first, first + count) as (size, kSlots) float32, zeros behind the last; `wide` has room for them.
template <typename T>
void turned(const Head<T>& head, int64_t first, int64_t count, float* wide, float* out) {
  const T* from = head.keys + first * head.key_step;
  const float* keys = wide;
  int64_t step = head.key_size;
  if constexpr (std::is_same_v<T, float>) {
    keys = from;
    step = head.key_step;
  } else {
    widen(from, head.key_step, count, head.key_size, wide, step);
  }
  if (count < kSlots) std::fill_n(out, head.key_size * kSlots, 0.0f);
  constexpr int64_t kSquare = at::vec::Vectorized<float>::size();
  for (int64_t s = 0; s < count; s += kSquare)
    for (int64_t d = 0; d < head.key_size; d += kSquare)
      at::vec::transpose_mxn<float>(
          keys + s * step + d, step, out + d * kSlots + s, kSlots, static_cast<int>(std::min(kSquare, count - s)),
          static_cast<int>(std::min(kSquare, head.key_size - d)));
}

// Scores (num, padded) of queries (num, key size), -inf where the row does not see; most: the largest of each.
template <typename T>
void score(
    const Head<T>& head, const float* queries, const int64_t* rows, int64_t num, float* scores, int64_t padded,
    Floats* most) {
  std::vector<float> wide(std::is_same_v<T, float> ? 0 : kSlots * head.key_size), keys(head.key_size * kSlots);
  std::fill_n(most, num, all(-std::numeric_limits<float>::infinity()));
  std::vector<int64_t> seen(num);
  for (int64_t q = 0; q < num; ++q) seen[q] = q > 0 && rows[q] == rows[q - 1] ? seen[q - 1] : head.seen(rows[q]);
  for (int64_t first = 0; first < head.slots; first += kSlots) {
    const int64_t count = std::min(kSlots, head.slots - first);
    turned(head, first, count, wide.data(), keys.data());
    evenly(num, kRows, [&](int64_t q, int64_t rows_here) {
      multiply_rows<kRows, kKeyVectors>(
          rows_here, queries + q * head.key_size, head.key_size, keys.data(), kSlots, head.key_size,
          scores + q * padded + first, padded);
    });
    for (int64_t q = 0; q < num; ++q) {
      const bool* sees = head.visible + rows[q] * head.visible_step + first;
      float* here = scores + q * padded + first;
      if (seen[q] < first + kSlots) {
        for (int64_t s = 0; s < kSlots; ++s)
          if (s >= count || !sees[s]) here[s] = -std::numeric_limits<float>::infinity();
      }
      Floats largest = most[q];
      for (int64_t s = 0; s < kSlots; s += kLanes) {
        const Floats found = floats(here + s);
        largest = largest > found ? largest : found;
      }
      most[q] = largest;
    }
  }
}

// Scores to weights, the largest of which is one; returns their sum. It is taken in whole numbers of 2^-30, so
// it does not depend on an order.
float exponentials(float* scores, int64_t padded, Floats most) {
  using Vec = at::vec::Vectorized<float>;
  using Longs = VectorOf<int64_t>::type;
  constexpr float kOne = 1 << 30;
  // Below it weights are zero; and within it a number's exponential hangs on no other one's, on any processor.
  constexpr float kLeast = -87.0f;
  float largest = most[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, static_cast<float>(most[i]));
  Longs sums = {};
  for (int64_t s = 0; s < padded; s += kLanes) {
    const Floats below = floats(scores + s) - largest;
    store(below < kLeast ? all(kLeast) : below, scores + s);
    for (int64_t part = s; part < s + kLanes; part += Vec::size())
      Vec::loadu(scores + part).exp_u20().store(scores + part);
    Floats weight = below < kLeast ? Floats{} : floats(scores + s);
    // What is no number stays none.
    weight = below == below ? weight : below;
    store(weight, scores + s);
    sums += __builtin_convertvector(__builtin_convertvector(weight * kOne + 0.5f, Ints), Longs);
  }
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return static_cast<float>(static_cast<double>(sum) / kOne);
}

// Weights (num, padded) times values (slots, width), `step` apart, to sums (num, width); in whole vectors.
template <typename T>
void weigh(
    int64_t num, const float* weights, int64_t padded, const T* values, int64_t step, int64_t slots, int64_t width,
    float* sums) {
  for (int64_t d = 0; d < width; d += kValueVectors * kLanes)
    evenly(num, kValueRows, [&](int64_t q, int64_t rows) {
      const auto part = [&](auto vectors) {
        multiply_rows<kValueRows, decltype(vectors)::value>(
            rows, weights + q * padded, padded, values + d, step, slots, sums + q * width + d, width);
      };
      switch (std::min<int64_t>(kValueVectors, (width - d) / kLanes)) {
        case 4: part(std::integral_constant<int, 4>{}); break;
        case 3: part(std::integral_constant<int, 3>{}); break;
        case 2: part(std::integral_constant<int, 2>{}); break;
        default: part(std::integral_constant<int, 1>{});
      }
    });
}

// Queries (num, key size), scaled, of the pass's rows `rows` and all of one head of keys, to sums (num, width) of
// values and the totals of their weights.
template <typename T>
void attend(
    const Head<T>& head, const float* queries, const int64_t* rows, int64_t num, float* sums, float* totals) {
  const int64_t padded = whole(head.slots, kSlots), width = whole(head.value_size, kLanes);
  const auto scores = std::make_unique_for_overwrite<float[]>(num * padded);
  std::vector<Floats> most(num);
  score(head, queries, rows, num, scores.get(), padded, most.data());
  for (int64_t q = 0; q < num; ++q) totals[q] = exponentials(scores.get() + q * padded, padded, most[q]);
  const bool in_place = std::is_same_v<T, float> || num <= kValueRows;
  if (in_place && width == head.value_size) {
    weigh(num, scores.get(), padded, head.values, head.value_step, head.slots, width, sums);
    return;
  }
  std::vector<float> values(head.slots * width);
  widen(head.values, head.value_step, head.slots, head.value_size, values.data(), width);
  weigh(num, scores.get(), padded, values.data(), width, head.slots, width, sums);
}

template <typename T>
void attend_heads(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& visible, float scale,
    at::Tensor& out) {
  const int64_t num_heads = query.size(1), num_rows = query.size(2), num_kv = keys.size(1);
  const int64_t group = num_heads / num_kv, num_queries = group * num_rows;
  const int64_t key_size = keys.size(3), value_size = values.size(3), width = whole(value_size, kLanes);
  // Enough parts for all threads, none too large for the cache.
  const int64_t wanted = (2 * at::get_num_threads() + num_kv - 1) / num_kv;
  const int64_t parts = std::max(
      (num_queries + kMostQueries - 1) / kMostQueries, std::min((num_queries + kRows - 1) / kRows, wanted));
  const T* from = query.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  at::parallel_for(0, num_kv * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> queries(kMostQueries * key_size), sums(kMostQueries * width), totals(kMostQueries);
    std::vector<int64_t> rows(kMostQueries);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t kv = task / parts, part = task % parts;
      const int64_t first = num_queries * part / parts, num = num_queries * (part + 1) / parts - first;
      const auto head_of = [&](int64_t q) { return kv * group + (first + q) % group; };
      for (int64_t q = 0; q < num; ++q) {
        rows[q] = (first + q) / group;
        const T* here = from + head_of(q) * query.stride(1) + rows[q] * query.stride(2);
        widen(here, 0, 1, key_size, queries.data() + q * key_size, 0, scale);
      }
      const Head<T> head{
          keys.const_data_ptr<T>() + kv * keys.stride(1),
          values.const_data_ptr<T>() + kv * values.stride(1),
          keys.stride(2),
          values.stride(2),
          key_size,
          value_size,
          visible.size(-1),
          visible.const_data_ptr<bool>(),
          visible.stride(-2)};
      attend(head, queries.data(), rows.data(), num, sums.data(), totals.data());
      for (int64_t q = 0; q < num; ++q) {
        T* there = to + (rows[q] * num_heads + head_of(q)) * value_size;
        divided(sums.data() + q * width, value_size, totals[q], there);
      }
    }
  });
}

// query (1, heads, rows, key size), keys and values (1, kv heads, at least slots, size), visible (1, 1, rows,
// slots) bool, each row of which sees something; returns (1, rows, heads, value size).
at::Tensor attention(
    const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& visible,
    double scale) {
  TORCH_CHECK(query.size(0) == 1 && keys.size(0) == 1 && values.size(0) == 1, "attention: one sequence only");
  TORCH_CHECK(query.stride(3) == 1 && keys.stride(3) == 1 && values.stride(3) == 1, "attention: strided numbers");
  TORCH_CHECK(
      query.size(3) == keys.size(3) && query.size(1) % keys.size(1) == 0 && values.size(1) == keys.size(1),
      "attention: heads that do not fit");
  TORCH_CHECK(
      visible.stride(-1) == 1 && visible.size(-2) == query.size(2) &&
          visible.size(-1) <= std::min(keys.size(2), values.size(2)),
      "attention: a mask that does not fit");
  at::Tensor out = at::empty({1, query.size(2), query.size(1), values.size(3)}, query.options());
  if (query.scalar_type() == at::kFloat)
    attend_heads<float>(query, keys, values, visible, static_cast<float>(scale), out);
  else
    attend_heads<at::BFloat16>(query, keys, values, visible, static_cast<float>(scale), out);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("few_rows_attention(Tensor query, Tensor keys, Tensor values, Tensor visible, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) { library.impl("few_rows_attention", &attention); }

// What compiled layers call.
extern "C" AOTITorchError aoti_torch_cpu_few_rows_attention(
    AtenTensorHandle query, AtenTensorHandle keys, AtenTensorHandle values, AtenTensorHandle visible, double scale,
    AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const auto tensor = [](AtenTensorHandle handle) {
      return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
    };
    *out = torch::aot_inductor::new_tensor_handle(
        attention(tensor(query), tensor(keys), tensor(values), tensor(visible), scale));
  });
}
