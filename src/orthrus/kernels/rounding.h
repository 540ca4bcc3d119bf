// Rows of float32 rounded to whole numbers: by a scale for each row, or for each group of its numbers.
#pragma once


#include <vector>

#include "threads.h"
#include "vectors.h"

namespace orthrus {

constexpr float kLargestInt8 = 127.0f, kLeastScale = 1e-12f;
// Numbers of a row, and of a weight of four bits, that share a scale.
constexpr int64_t kGroup = 32;

// Magnitudes order as the whole numbers that their bits are, and what is no number is the largest.
constexpr int32_t kMagnitude = 0x7fffffff;
// Adding it leaves no room for a fraction: the sum is rounded, ties to even.
constexpr float kWhole = 12582912.0f;

// The scale by which numbers fit into int8; none if one of them is none.
inline float scale_of(const float* x, int64_t size) {
  Ints most_each = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    const Ints magnitude = read<Ints>(x + k) & kMagnitude;
    most_each = most_each > magnitude ? most_each : magnitude;
  }
  int32_t lanes[kLanes], most = 0;
  write(most_each, lanes);
  for (int i = 0; i < kLanes; ++i) most = std::max(most, lanes[i]);
  for (; k < size; ++k) most = std::max(most, bits<int32_t>(x[k]) & kMagnitude);
  const float largest = bits<float>(most) / kLargestInt8;
  return largest < kLeastScale ? kLeastScale : largest;
}

// Numbers divided by a scale and rounded to type To; returns their sum.
template <typename To>
int32_t round_by(float scale, const float* x, int64_t size, To* to) {
  const float inverse = 1.0f / scale;
  Ints sums = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    const Ints whole = __builtin_convertvector((floats(x + k) * all(inverse) + kWhole) - kWhole, Ints);
    sums += whole;
    const auto narrow = __builtin_convertvector(whole, Vector<To>);
    std::memcpy(to + k, &narrow, sizeof(narrow));
  }
  int32_t lanes[kLanes], sum = 0;
  write(sums, lanes);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  for (; k < size; ++k) {
    const float whole = (x[k] * inverse + kWhole) - kWhole;
    to[k] = whole == whole ? static_cast<To>(whole) : To{};
    sum += to[k];
  }
  return sum;
}

// Calls part(row) for each of the rows, several of them on a thread.
template <typename Part>
void each_row(int64_t rows, const Part& part) {
  parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) part(row);
  });
}

// Rows of int8 or int16 numbers by scales of their own, as `Int8Linear` rounds them, filled up with zeros; their sums.
template <typename To>
struct RoundedRows {
  std::unique_ptr<To[]> x;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  RoundedRows(const float* from, int64_t rows, int64_t inputs, int64_t filled)
      : x(room<To>(rows * filled)), scales(rows), sums(rows) {
    each_row(rows, [&](int64_t row) {
      To* to = x.get() + row * filled;
      scales[row] = scale_of(from + row * inputs, inputs);
      sums[row] = round_by(scales[row], from + row * inputs, inputs, to);
      std::fill(to + inputs, to + filled, To{});
    });
  }
};

// Rows of int8 numbers by scales of their groups, as `Int4Linear` rounds them: scales and sums (rows, groups).
struct GroupedRows {
  std::unique_ptr<int8_t[]> x;
  std::unique_ptr<float[]> scales, sums;

  GroupedRows(const float* from, int64_t rows, int64_t inputs)
      : x(room<int8_t>(rows * inputs)),
        scales(room<float>(rows * inputs / kGroup)),
        sums(room<float>(rows * inputs / kGroup)) {
    each_row(rows, [&](int64_t row) {
      for (int64_t first = row * inputs; first < (row + 1) * inputs; first += kGroup) {
        const float scale = scale_of(from + first, kGroup);
        scales[first / kGroup] = scale;
        sums[first / kGroup] = scale * static_cast<float>(round_by(scale, from + first, kGroup, x.get() + first));
      }
    });
  }
};

}  // namespace orthrus
