// Layouts of the packed weights of linear layers; `linear.py` packs them.
//
// A weight (outputs, inputs) is stored in blocks of columns, where a column holds the weights of one output. It is
// padded with zeros to whole blocks. `v` is the number of inputs of a column that are interleaved.
//
//   float32         (blocks, inputs, width)
//   bfloat16, int8  (blocks, inputs / v, width, v)      `dots.h`; bfloat16 (v = 2) is widened to float32 on processors
//                                                       that have no faster instructions
//   4 bits          (blocks, inputs / 32, bytes)        `groups.h`
//   for AMX         (blocks, inputs / v, 32, v)         `tiles.h`; bfloat16 (v = 2) and int8 (v = 4)
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "dots.h"
#include "groups.h"
#include "tiles.h"
#include "vectors.h"

namespace orthrus {
// Internal linkage: one file includes this, and the compiler inlines what that file calls once.
namespace {

// Columns of a block of float32 weights.
constexpr int64_t kFloatWidth = kLanes * kVectors;
// Bytes of the interleaved inputs of one column of a block for AMX.
constexpr int64_t kTileInterleavedBytes = 4;
constexpr int64_t kBfloat16Interleaved = 2, kBfloat16Width = kFloatWidth;
static_assert(!ORTHRUS_BFLOAT16_DOTS || kDotWidth == kFloatWidth, "one layout of bfloat16 for both ways to multiply");

// The layout of a packed weight, which follows from its dtype and sizes. Raises an error for a weight that these
// kernels cannot multiply by.
//
// inputs: of the packed weight, padding included. width: columns of a block. step: inputs are padded to a multiple of
// it. tiled: for AMX. dots: interleaved, but not for AMX.
struct Layout {
  int64_t inputs, width, step;
  bool tiled, dots;

  explicit Layout(const at::Tensor& weight) {
    const auto dtype = weight.scalar_type();
    const bool interleaved = weight.dim() == 4;
    TORCH_CHECK(
        dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kChar || dtype == at::kByte,
        "linear: a weight of ", dtype);
    TORCH_CHECK(weight.numel() > 0 && weight.is_cpu(), "linear: a weight that is empty or not on the CPU");
    TORCH_CHECK(
        weight.dim() == 3 || (interleaved && (dtype == at::kBFloat16 || dtype == at::kChar)),
        "linear: a weight that is not packed");
    const int64_t num_interleaved = interleaved ? weight.size(3) : 1;
    tiled = interleaved && weight.size(2) == kTileColumns;
    dots = interleaved && !tiled;
    inputs = weight.size(1) * (dtype == at::kByte ? kGroupSize : num_interleaved);
    step = tiled ? kTileBytes / weight.element_size() : dtype == at::kByte ? kGroupSize : num_interleaved;
    width = tiled                    ? kTileColumns
            : dtype == at::kBFloat16 ? kBfloat16Width
            : dtype == at::kChar     ? kDotWidth
            : dtype == at::kByte     ? kGroupWidth
                                     : kFloatWidth;
    const bool whole_blocks = dtype == at::kByte ? weight.size(2) == kGroupBytes : weight.size(2) == width;
    const bool supported =
        tiled  ? has_tiles() && num_interleaved * weight.element_size() == kTileInterleavedBytes
        : dots ? num_interleaved == (dtype == at::kChar ? Int8Dot::kInterleaved : kBfloat16Interleaved)
               : dtype == at::kFloat || dtype == at::kByte;
    TORCH_CHECK(whole_blocks && supported && weight.is_contiguous(), "linear: a weight packed for another processor");
  }
};

}  // namespace
}  // namespace orthrus
