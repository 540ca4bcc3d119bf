// Attention of the few rows of a decoding pass to the slots that each of them sees, in float32 or bfloat16.
//
// All sums are in float32 and in the order of the slots, and slots that a row does not see count zero, as long as
// they hold numbers. So a row comes out alike to the last bit in whatever pass it stands and wherever its past lies
// in the cache, if later tokens lie behind earlier ones: a drafted token's row as a tree's node or alone.

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

// Keys [first, first + count) as (size filled up, kSlots) float32, zeros where there is none.
template <typename T>
void turned(const Head<T>& head, int64_t first, int64_t count, float* out) {
  for (int64_t s = 0; s < kSlots; s += kLanes)
    for (int64_t d = 0; d < head.key_size; d += kLanes) {
      Floats square[kLanes];
      const int64_t width = std::min<int64_t>(kLanes, head.key_size - d);
      const T* from = head.keys + (first + s) * head.key_step + d;
      if (s + kLanes <= count && width == kLanes) {
#pragma GCC unroll 16
        for (int row = 0; row < kLanes; ++row) square[row] = floats(from + row * head.key_step);
      } else {
        for (int64_t row = 0; row < kLanes; ++row) {
          float some[kLanes] = {};
          if (s + row < count) widen(from + row * head.key_step, 0, 1, width, some, 0);
          square[row] = floats(some);
        }
      }
      turn(square);
#pragma GCC unroll 16
      for (int row = 0; row < kLanes; ++row) store(square[row], out + (d + row) * kSlots + s);
    }
}

// Scores (num, padded) of queries (num, key size), -inf where the row does not see; most: the largest of each.
template <typename T>
void score(
    const Head<T>& head, const float* queries, const int64_t* rows, int64_t num, float* scores, int64_t padded,
    Floats* most) {
  const auto keys = room<float>(whole(head.key_size, kLanes) * kSlots);
  for (int64_t first = 0; first < head.slots; first += kSlots) {
    turned(head, first, std::min(kSlots, head.slots - first), keys.get());
    evenly(num, kRows, [&](int64_t q, int64_t rows_here) {
      multiply_rows<kRows, kKeyVectors>(
          rows_here, queries + q * head.key_size, head.key_size, keys.get(), kSlots, head.key_size,
          scores + q * padded + first, padded);
    });
  }
  int64_t seen = 0;
  for (int64_t q = 0; q < num; ++q) {
    if (q == 0 || rows[q] != rows[q - 1]) seen = head.seen(rows[q]);
    const bool* sees = head.visible + rows[q] * head.visible_step;
    float* here = scores + q * padded;
    for (int64_t s = seen; s < head.slots; ++s)
      if (!sees[s]) here[s] = -std::numeric_limits<float>::infinity();
    std::fill(here + head.slots, here + padded, -std::numeric_limits<float>::infinity());
    Floats largest = all(-std::numeric_limits<float>::infinity());
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
  constexpr int64_t kVectors = 4;
  // Below it weights are zero; and within it a number's exponential hangs on no other one's, on any processor.
  constexpr float kLeast = -87.0f;
  float largest = most[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, static_cast<float>(most[i]));
  VectorOf<int64_t>::type sums = {};
  for (int64_t first = 0; first < padded; first += kVectors * kLanes) {
    Ints part = {};
    for (int64_t s = first; s < std::min(first + kVectors * kLanes, padded); s += kLanes) {
      const Floats below = floats(scores + s) - largest;
      Floats weight = exponential(below < kLeast ? all(kLeast) : below);
      weight = below >= kLeast ? weight : Floats{};
      part += __builtin_convertvector(weight * kOne + 0.5f, Ints);
      // What is no number stays none.
      store(below == below ? weight : below, scores + s);
    }
    sums += __builtin_convertvector(part, VectorOf<int64_t>::type);
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
  const auto scores = room<float>(num * padded);
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
  const T* from = query.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  // Threads share the queries in the order of the heads of keys, few of which they share.
  parallel_for(0, num_kv * num_queries, std::min<int64_t>(kRows, num_queries), [&](int64_t begin, int64_t end) {
    const int64_t most = std::min(kMostQueries, end - begin);
    const auto scratch = room<float>(most * (key_size + width + 1));
    float *queries = scratch.get(), *sums = queries + most * key_size, *totals = sums + most * width;
    int64_t rows[kMostQueries];
    for (int64_t num; begin < end; begin += num) {
      const int64_t kv = begin / num_queries, first = begin % num_queries;
      const int64_t left = std::min(end - begin, num_queries - first), parts = (left + most - 1) / most;
      num = (left + parts - 1) / parts;
      const auto head_of = [&](int64_t q) { return kv * group + (first + q) % group; };
      for (int64_t q = 0; q < num; ++q) {
        rows[q] = (first + q) / group;
        const T* here = from + head_of(q) * query.stride(1) + rows[q] * query.stride(2);
        widen(here, 0, 1, key_size, queries + q * key_size, 0, scale);
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
      attend(head, queries, rows, num, sums, totals);
      for (int64_t q = 0; q < num; ++q) {
        T* there = to + (rows[q] * num_heads + head_of(q)) * value_size;
        divided(sums + q * width, value_size, totals[q], there);
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
