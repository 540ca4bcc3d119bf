// Products of rows with the packed weights of a linear layer, or of both sides of a twin, for each layout of a weight.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "dots.h"
#include "groups.h"
#include "linear_layout.h"
#include "rounding.h"
#include "threads.h"
#include "tiles.h"
#include "vectors.h"

namespace orthrus {
// Internal linkage: one file includes this, and the compiler inlines what that file calls once.
namespace {

// One side of a linear layer: rows [first, first + rows), which share a packed weight.
// output = sum * column scale * row scale + bias; without scales, output = sum + bias.
struct Side {
  int64_t first, rows;
  at::Tensor weight;
  Layout layout;
  const float *column_scales, *bias;
};

// Where the outputs (rows, columns) go, and the scale of each row, or null.
template <typename Out>
struct Output {
  Out* out;
  int64_t columns;
  const float* row_scales;
};

// Applies scales and bias to `sums` (rows, width), one block of columns, and writes the outputs from row `row` and
// column `first` on.
template <typename Sum, typename Out>
void write_outputs(
    const Sum* sums, int64_t row, int64_t rows, int64_t first, int64_t width, const Side& side, const Output<Out>& to) {
  const int64_t valid = std::min(width, to.columns - first);
  for (const int64_t end = row + rows; row < end; ++row, sums += width) {
    Out* out = to.out + row * to.columns + first;
    for (int64_t n = 0; n < valid; n += kLanes) {
      // Scales and bias are padded to whole blocks, so only the output may end within a vector.
      Floats value = std::is_same_v<Sum, float> ? load_unaligned<Floats>(sums + n)
                                                : __builtin_convertvector(load_unaligned<Ints>(sums + n), Floats);
      if (side.column_scales) value = value * load_floats(side.column_scales + first + n) * to.row_scales[row];
      if (side.bias) value += load_floats(side.bias + first + n);
      if (valid - n >= kLanes) {
        store_floats(value, out + n);
      } else {
        Out last[kLanes];
        store_floats(value, last);
        std::copy_n(last, valid - n, out + n);
      }
    }
  }
}

// Splits the rows of each side into parts of at most kMaxRows. Calls multiply(first row, rows, block of weights, next,
// next_bytes, sums) for each block of weights and each part, and writes the sums (rows, kWidth) to the outputs.
//
// Each call prefetches `next_bytes` bytes at `next`, which are its share of the next block. kPrefetchSinglePart:
// whether sides with a single part do this too. If not, `multiply` only prefetches the current block a little ahead.
template <int kMaxRows, int64_t kWidth, typename Sum, bool kPrefetchSinglePart, typename Out, typename Multiply>
void for_each_block(const std::vector<Side>& sides, const Output<Out>& to, const Multiply& multiply) {
  const int64_t bytes = sides[0].weight.nbytes() / sides[0].weight.size(0);
  parallel_for(0, sides[0].weight.size(0), 1, [&](int64_t begin, int64_t end) {
    alignas(kCacheLine) Sum sums[kMaxRows * kWidth];
    for (const Side& side : sides) {
      if (side.rows == 0) continue;
      const int64_t parts = (side.rows + kMaxRows - 1) / kMaxRows;
      for (int64_t b = begin; b < end; ++b) {
        const char* block = static_cast<const char*>(side.weight.const_data_ptr()) + b * bytes;
        // Only the first block has to wait for memory.
        const int64_t next_bytes = b + 1 < end && (kPrefetchSinglePart || parts > 1) ? bytes / parts : 0;
        const char* next = block + bytes;
        for_each_part(side.rows, kMaxRows, [&](int64_t first, int64_t rows) {
          first += side.first;
          multiply(first, rows, block, next, next_bytes, sums);
          next += next_bytes;
          write_outputs(sums, first, rows, b * kWidth, kWidth, side, to);
        });
      }
    }
  });
}

// Most rows that are multiplied by a block before the next block, and bytes of weights (a panel) that stay in the
// first-level cache meanwhile.
constexpr int64_t kPanelRows = 64, kPanelBytes = 24576;
// With at least this many parts of the rows, widening a panel once takes less time than widening it for each part.
constexpr int64_t kMinPartsToWiden = kLanes > 8 ? 4 : 2;

// sums (rows, kFloatWidth) = x (rows, inputs) times a block of weights of float32 or interleaved bfloat16.
//
// If the rows have more than one part, the block is multiplied panel by panel, where a panel is a range of inputs. The
// sums continue from panel to panel in the order of the inputs. If the rows have many parts, each panel of bfloat16 is
// widened once. next, next_bytes: memory that the caller reads afterwards; it is prefetched meanwhile.
template <int kInterleaved, typename T>
void multiply_block(
    const float* x, int64_t rows, int64_t inputs, const T* weight, float* sums, const char* next, int64_t next_bytes) {
  constexpr int64_t kPanelInputs = kPanelBytes / (kFloatWidth * sizeof(float)) / kInterleaved * kInterleaved;
  const int64_t parts = (rows + kRows - 1) / kRows;
  const bool widens = kInterleaved == 2 && parts >= kMinPartsToWiden;
  const int64_t panel = parts == 1 ? inputs : kPanelInputs;
  alignas(kCacheLine) float widened[kInterleaved == 2 ? kPanelInputs * kFloatWidth : 1];
  for (int64_t k = 0; k < inputs; k += panel) {
    const int64_t size = std::min(panel, inputs - k), prefetch_bytes = next_bytes * size / inputs / parts;
    const T* panel_weights = weight + k * kFloatWidth;
    if constexpr (kInterleaved == 2)
      if (widens) widen_pairs<kVectors>(panel_weights, size, widened);
    for_each_part(rows, kRows, [&](int64_t first, int64_t num) {
      const auto multiply_part = [&](auto interleaved, const auto* from) {
        multiply_rows<kRows, kVectors, decltype(interleaved)::value>(
            num, x + first * inputs + k, inputs, from, kFloatWidth, size, sums + first * kFloatWidth, kFloatWidth, next,
            prefetch_bytes / size, k > 0);
      };
      if (widens)
        multiply_part(std::integral_constant<int, 1>{}, widened);
      else
        multiply_part(std::integral_constant<int, kInterleaved>{}, panel_weights);
      next += prefetch_bytes;
    });
  }
}

// Outputs for weights of type T that are multiplied in float32. x: rows padded with zeros to `inputs`, a multiple of
// kInterleaved.
template <typename T, int kInterleaved, typename Out>
void float_products(const float* x, int64_t inputs, const std::vector<Side>& sides, const Output<Out>& to) {
  for_each_block<kPanelRows, kFloatWidth, float, true>(
      sides, to, [&](int64_t first, int64_t num, const char* block, const char* next, int64_t next_bytes, float* sums) {
        multiply_block<kInterleaved>(
            x + first * inputs, num, inputs, reinterpret_cast<const T*>(block), sums, next, next_bytes);
      });
}

// Outputs for weights in tiles. x: rows padded with zeros to `padded` inputs, a multiple of kTileBytes bytes.
template <typename T, typename Out>
void tile_products(const T* x, int64_t padded, const std::vector<Side>& sides, const Output<Out>& to) {
#if ORTHRUS_TILES
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  const int64_t bytes = padded * static_cast<int64_t>(sizeof(T)), steps = bytes / kTileBytes;
  parallel_for(0, sides[0].weight.size(0), 1, [&](int64_t begin, int64_t end) {
    alignas(64) Sum sums[kMaxTileRows * kTileColumns];
    for (const Side& side : sides) {
      if (side.rows == 0) continue;
      // All parts have the same size, so that the registers are configured once. The last part may compute some rows a
      // second time.
      const int64_t parts = (side.rows + kMaxTileRows - 1) / kMaxTileRows, size = (side.rows + parts - 1) / parts;
      const auto multiply = size > kTileRows ? &multiply_tiles<T, true> : &multiply_tiles<T, false>;
      const TileConfig config(size);
      for (int64_t b = begin; b < end; ++b)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t first = side.first + std::min(part * size, side.rows - size);
          multiply(
              reinterpret_cast<const char*>(x + first * padded), bytes,
              reinterpret_cast<const char*>(side.weight.const_data_ptr<T>() + b * padded * kTileColumns), steps, sums);
          write_outputs(sums, first, size, b * kTileColumns, kTileColumns, side, to);
        }
    }
  });
#else
  TORCH_CHECK(false, "linear: a weight packed for another processor");
#endif
}

// Outputs for interleaved weights. x: rows padded with zeros to `padded` inputs. initial_sums: a start value for the
// sums of each row, or null.
template <typename Dot, typename Sum, typename Out>
void dot_products(
    const typename Dot::X* x, int64_t padded, const Sum* initial_sums, const std::vector<Side>& sides,
    const Output<Out>& to) {
  for_each_block<kDotRows, kDotWidth, Sum, false>(
      sides, to, [&](int64_t first, int64_t rows, const char* block, const char* next, int64_t next_bytes, Sum* sums) {
        with_static_count<kDotRows>(rows, [&](auto count) {
          multiply_dots<Dot, decltype(count)::value>(
              x + first * padded, padded, block, padded, initial_sums ? initial_sums + first : nullptr, sums, next,
              next_bytes);
        });
      });
}

// Outputs for int8 weights. x: (rows, inputs), quantised here to `padded` inputs, one scale per row.
void int8_products(
    const float* x, int64_t rows, int64_t inputs, int64_t padded, bool tiled, const std::vector<Side>& sides,
    Output<float> to) {
  if (tiled) {
    const QuantisedRows<int8_t> quantised(x, rows, inputs, padded);
    to.row_scales = quantised.scales.data();
    tile_products(quantised.x.get(), padded, sides, to);
    return;
  }
  const QuantisedRows<Int8Dot::X> quantised(x, rows, inputs, padded);
  to.row_scales = quantised.scales.data();
  std::vector<int32_t> initial_sums(quantised.sums);
  // The product may wrap around for a row that contains NaN, whose sum is arbitrary. Unsigned arithmetic permits that.
  for (int32_t& each : initial_sums) each = static_cast<int32_t>(static_cast<uint32_t>(each) * Int8Dot::kRowSumFactor);
  dot_products<Int8Dot>(quantised.x.get(), padded, initial_sums.data(), sides, to);
}

// Outputs for 4-bit weights. x: (rows, inputs), quantised here, one scale per group of inputs.
void int4_products(
    const float* x, int64_t rows, int64_t inputs, const std::vector<Side>& sides, const Output<float>& to) {
  const GroupQuantisedRows quantised(x, rows, inputs);
  for_each_block<kGroupRows, kGroupWidth, float, false>(
      sides, to, [&](int64_t first, int64_t num, const char* block, const char* next, int64_t next_bytes, float* sums) {
        with_static_count<kGroupRows>(num, [&](auto count) {
          multiply_groups<decltype(count)::value>(quantised, first, block, inputs, sums, next, next_bytes);
        });
      });
}

// Rows x (rows, inputs) as (rows, padded) of type To, padded with zeros.
template <typename To>
std::unique_ptr<To[]> padded_rows(const at::BFloat16* x, int64_t rows, int64_t inputs, int64_t padded) {
  auto out = uninitialized<To>(rows * padded);
  for_each_row(rows, [&](int64_t row) {
    To* end = std::copy_n(x + row * inputs, inputs, out.get() + row * padded);
    std::fill(end, out.get() + (row + 1) * padded, To{});
  });
  return out;
}

// Outputs for bfloat16 weights. x: (rows, inputs).
void bfloat16_products(
    const at::BFloat16* x, int64_t rows, int64_t inputs, const Layout& layout, const std::vector<Side>& sides,
    const Output<at::BFloat16>& to) {
  const int64_t padded = layout.inputs;
  if (!layout.tiled && !has_fast_bfloat16_dots()) {
    const auto widened = padded_rows<float>(x, rows, inputs, padded);
    float_products<at::BFloat16, kBfloat16Interleaved>(widened.get(), padded, sides, to);
    return;
  }
  std::unique_ptr<at::BFloat16[]> copy;
  if (padded != inputs) {
    copy = padded_rows<at::BFloat16>(x, rows, inputs, padded);
    x = copy.get();
  }
  if (layout.tiled) {
    tile_products(x, padded, sides, to);
    return;
  }
#if ORTHRUS_BFLOAT16_DOTS
  dot_products<Bfloat16Dot, float>(x, padded, nullptr, sides, to);
#endif
}

// out (rows, columns) = x (rows, inputs) times the weights of `sides`, which all have the same layout.
void multiply_sides(
    const void* x, void* out, int64_t rows, int64_t inputs, int64_t columns, const std::vector<Side>& sides) {
  const Layout& layout = sides[0].layout;
  const auto dtype = sides[0].weight.scalar_type();
  if (dtype == at::kBFloat16) {
    bfloat16_products(
        static_cast<const at::BFloat16*>(x), rows, inputs, layout, sides,
        {static_cast<at::BFloat16*>(out), columns, nullptr});
    return;
  }
  const Output<float> to{static_cast<float*>(out), columns, nullptr};
  const auto* from = static_cast<const float*>(x);
  if (dtype == at::kFloat)
    float_products<float, 1>(from, inputs, sides, to);
  else if (dtype == at::kChar)
    int8_products(from, rows, inputs, layout.inputs, layout.tiled, sides, to);
  else
    int4_products(from, rows, inputs, sides, to);
}

}  // namespace
}  // namespace orthrus
