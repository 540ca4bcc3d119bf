// Quantises rows of float32 to integers, with one scale for each row or for each group of 32 elements.
#pragma once

#include <vector>

#include "threads.h"
#include "vectors.h"

namespace orthrus {

constexpr float kLargestInt8 = 127.0f, kLeastScale = 1e-12f;
// Number of elements of a row that share a scale, and of inputs whose 4-bit weights share a step and a minimum.
constexpr int64_t kGroupSize = 32;

// Without their sign bits, floats order like the integers with the same bits, and NaN is the largest.
constexpr int32_t kMagnitudeMask = 0x7fffffff;
// 1.5 * 2^23. A float of this size has no bits for a fraction, so adding it rounds to an integer, ties to even.
constexpr float kRoundingOffset = 12582912.0f;

// The scale that maps the largest magnitude of x to 127, at least kLeastScale. NaN if x contains NaN.
inline float int8_scale(const float* x, int64_t size) {
  Ints lane_maxima = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    const Ints magnitude = load_unaligned<Ints>(x + k) & kMagnitudeMask;
    lane_maxima = lane_maxima > magnitude ? lane_maxima : magnitude;
  }
  int32_t lanes[kLanes], maximum = 0;
  store_unaligned(lane_maxima, lanes);
  for (int i = 0; i < kLanes; ++i) maximum = std::max(maximum, lanes[i]);
  for (; k < size; ++k) maximum = std::max(maximum, bit_cast<int32_t>(x[k]) & kMagnitudeMask);
  const float scale = bit_cast<float>(maximum) / kLargestInt8;
  return scale < kLeastScale ? kLeastScale : scale;
}

// Writes x / scale to `to`, rounded to integers of type To. Returns their sum.
template <typename To>
int32_t quantise(float scale, const float* x, int64_t size, To* to) {
  const float inverse = 1.0f / scale;
  Ints sums = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    const Ints rounded = __builtin_convertvector(
        (load_floats(x + k) * broadcast(inverse) + kRoundingOffset) - kRoundingOffset, Ints);
    sums += rounded;
    const auto narrow = __builtin_convertvector(rounded, Vector<To>);
    std::memcpy(to + k, &narrow, sizeof(narrow));
  }
  int32_t lanes[kLanes], sum = 0;
  store_unaligned(sums, lanes);
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  for (; k < size; ++k) {
    const float rounded = (x[k] * inverse + kRoundingOffset) - kRoundingOffset;
    to[k] = rounded == rounded ? static_cast<To>(rounded) : To{};
    sum += to[k];
  }
  return sum;
}

// Calls part(row) for each row, in parallel, with at least four rows per thread.
template <typename Part>
void for_each_row(int64_t rows, const Part& part) {
  parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) part(row);
  });
}

// Rows quantised as `Int8Linear` does, one scale per row: x (rows, padded) of int8 or int16, padded with zeros; scales
// (rows); and the sums (rows) of the integers of each row.
template <typename To>
struct QuantisedRows {
  std::unique_ptr<To[]> x;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  QuantisedRows(const float* from, int64_t rows, int64_t inputs, int64_t padded)
      : x(uninitialized<To>(rows * padded)), scales(rows), sums(rows) {
    for_each_row(rows, [&](int64_t row) {
      To* to = x.get() + row * padded;
      scales[row] = int8_scale(from + row * inputs, inputs);
      sums[row] = quantise(scales[row], from + row * inputs, inputs, to);
      std::fill(to + inputs, to + padded, To{});
    });
  }
};

// Rows quantised as `Int4Linear` does, one scale per group of inputs: x (rows, inputs), scales (rows, groups), and sums
// (rows, groups), each a scale times the sum of its group's integers.
struct GroupQuantisedRows {
  std::unique_ptr<int8_t[]> x;
  std::unique_ptr<float[]> scales, sums;

  GroupQuantisedRows(const float* from, int64_t rows, int64_t inputs)
      : x(uninitialized<int8_t>(rows * inputs)),
        scales(uninitialized<float>(rows * inputs / kGroupSize)),
        sums(uninitialized<float>(rows * inputs / kGroupSize)) {
    for_each_row(rows, [&](int64_t row) {
      for (int64_t first = row * inputs; first < (row + 1) * inputs; first += kGroupSize) {
        const float scale = int8_scale(from + first, kGroupSize);
        scales[first / kGroupSize] = scale;
        sums[first / kGroupSize] =
            scale * static_cast<float>(quantise(scale, from + first, kGroupSize, x.get() + first));
      }
    });
  }
};

}  // namespace orthrus
