// The plan of a pass, which tells the attention kernel what each row reads. `model/passes.py` builds it.
//
// A plan is an int64 tensor. Offsets count from its start:
//   [0]  number of spans
//   [1]  offset of the positions of all rows of the pass
//   then for each span:
//     its first AR row in the pass, its number of AR rows, its first diffusion row in the pass, its number of diffusion
//     rows, the length of its history, the offset of its page table, the offset of its tail or 0, 64-bit words per row
//     of the tail
//   then page tables and tails, and last the positions
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace orthrus {
// Internal linkage: one file includes this, and the compiler inlines what that file calls once.
namespace {

// Slots of a page; `PAGE` in `model/pool.py` is the same number.
constexpr int64_t kPage = 64;
// Numbers before the spans, and numbers that describe one span.
constexpr int64_t kPlanHeader = 2, kSpanNumbers = 8;

// One request's part of a pass. Its rows are numbered from 0, AR rows first. Its slots are numbered from 0 too: the
// history is below `length`, and row j has slot length + j.
//
// table: the request's pages in the pool. positions: of all rows of the pass. tail: a bit for each pair of rows, in
// `tail_words` words per row; it is set if the first row reads the second. A null tail means that there are only AR
// rows, and that each reads all rows up to itself.
struct Span {
  int64_t ar_first, num_ar, draft_first, num_draft, length, tail_words;
  const int64_t *table, *tail, *positions;

  int64_t rows() const { return num_ar + num_draft; }
  int64_t slots() const { return length + rows(); }
  // The number of a row in the pass.
  int64_t pass_row(int64_t row) const { return row < num_ar ? ar_first + row : draft_first + row - num_ar; }
  // The number of a slot in the pool.
  int64_t pool_slot(int64_t slot) const { return table[slot / kPage] * kPage + slot % kPage; }
  // Whether the tail lets `row` read `other`.
  bool tail_allows(int64_t row, int64_t other) const {
    if (tail == nullptr) return other <= row;
    return static_cast<uint64_t>(tail[row * tail_words + other / 64]) >> (other % 64) & 1u;
  }
  // Number of slots before the first one that the tail forbids the row to read.
  int64_t readable_prefix(int64_t row) const {
    int64_t other = 0;
    if (tail == nullptr) return length + row + 1;
    while (other < rows() && tail_allows(row, other)) ++other;
    return length + other;
  }
  // One more than the last slot that the row may read.
  int64_t read_end(int64_t row) const { return tail == nullptr ? length + row + 1 : slots(); }
  // The estimated cost of the first `queries` queries, in slots read. Queries are ordered by key/value head, then by
  // row, then by query head; `group` is the number of query heads per key/value head.
  double cost(int64_t queries, int64_t group) const {
    const auto rows_cost = [&](double num) {
      const double each = static_cast<double>(length + kPage) + (tail == nullptr ? 0.5 * num : rows());
      return group * num * each;
    };
    const int64_t of_head = group * rows();
    return static_cast<double>(queries / of_head) * rows_cost(rows()) +
           rows_cost(static_cast<double>(queries % of_head) / group);
  }
  // The first slot of the history that is inside the row's sliding window. window: its size in positions, 0 for none.
  int64_t window_start(int64_t row, int64_t window) const {
    return window <= 0 ? 0 : std::clamp<int64_t>(positions[pass_row(row)] - window + 1, 0, length);
  }
  // Whether `row` reads `other`, given the tail and the sliding window.
  bool reads(int64_t row, int64_t other, int64_t window) const {
    return tail_allows(row, other) &&
           (window <= 0 || positions[pass_row(row)] - positions[pass_row(other)] < window);
  }
};

// The spans of a plan for `num_rows` rows. They point into the plan's memory. Raises an error if anything that the plan
// describes is outside of it; page numbers are not checked.
std::vector<Span> parse_plan(const at::Tensor& plan, int64_t num_rows) {
  const int64_t size = plan.numel();
  const int64_t* numbers = plan.const_data_ptr<int64_t>();
  TORCH_CHECK(size >= kPlanHeader, "attention: a plan without a head");
  const int64_t num = numbers[0], positions = numbers[1];
  TORCH_CHECK(
      num > 0 && kPlanHeader + num * kSpanNumbers <= size && positions > 0 && positions + num_rows <= size,
      "attention: a plan that ends too early");
  std::vector<Span> spans;
  for (int64_t i = 0; i < num; ++i) {
    const int64_t* s = numbers + kPlanHeader + i * kSpanNumbers;
    const int64_t table = s[5], tail = s[6], rows = s[1] + s[3], tail_words = s[7];
    const int64_t pages = (s[4] + rows + kPage - 1) / kPage;
    TORCH_CHECK(
        s[1] >= 0 && s[3] >= 0 && rows > 0 && s[4] >= 0 && s[0] >= 0 && s[0] + s[1] <= num_rows && s[2] >= 0 &&
            s[2] + s[3] <= num_rows && table > 0 && table + pages <= size &&
            (tail == 0 ? s[3] == 0 : tail > 0 && tail_words * 64 >= rows && tail + rows * tail_words <= size),
        "attention: a span that does not fit its plan");
    spans.push_back(
        {s[0], s[1], s[2], s[3], s[4], tail_words, numbers + table, tail == 0 ? nullptr : numbers + tail,
         numbers + positions});
  }
  return spans;
}

}  // namespace
}  // namespace orthrus
