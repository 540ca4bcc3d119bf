// Linears for the few rows of a decoding pass: x (rows, in) times a packed weight, in float32, bfloat16, int8 or
// four bits.
//
// Libraries tune for one row or for hundreds; between them they read each weight once and then wait for it.
// Here every weight is read once from memory, and each sum runs over the inputs in one order: a row comes out
// alike to the last bit whatever rows are beside it.
//
// Layouts of a weight (out, in), all zero-filled to whole blocks:
//   floats  (blocks, in, width)           float32
//   dots    (blocks, in / v, width, v)    bfloat16 (v = 2) and int8 (`dots.h`); bfloat16 is widened to float32, one
//                                         read for two inputs, where no instructions are faster
//   groups  (blocks, in / 32, bytes)      four bits (`groups.h`)
//   tiles   (blocks, in / v, width, v)    bfloat16 (v = 2) and int8 (v = 4) for AMX (`tiles.h`)
//
// A twin's linear multiplies its first rows with one weight and the others with another, in one go if they are laid
// out alike.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <vector>

#include "dots.h"
#include "groups.h"
#include "rounding.h"
#include "threads.h"
#include "tiles.h"
#include "vectors.h"

namespace {

using namespace orthrus;
constexpr int64_t kPlainWidth = kLanes * kVectors;
constexpr int64_t kTileNumberBytes = 4;
constexpr int64_t kBfloat16Beside = 2, kBfloat16Width = kPlainWidth;
static_assert(!ORTHRUS_BFLOAT16_DOTS || kDotWidth == kPlainWidth, "one layout of bfloat16 for both ways to multiply");

// How a packed weight is laid out, by its dtype and sizes.
struct Layout {
  int64_t inputs, width, step;
  bool tiled, dots;

  explicit Layout(const at::Tensor& weight) {
    const auto dtype = weight.scalar_type();
    const bool beside = weight.dim() == 4;
    TORCH_CHECK(
        dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kChar || dtype == at::kByte,
        "linear: a weight of ", dtype);
    TORCH_CHECK(weight.numel() > 0 && weight.is_cpu(), "linear: a weight that is empty or not on the CPU");
    TORCH_CHECK(
        weight.dim() == 3 || (beside && (dtype == at::kBFloat16 || dtype == at::kChar)),
        "linear: a weight that is not packed");
    const int64_t side_by_side = beside ? weight.size(3) : 1;
    tiled = beside && weight.size(2) == kTileColumns;
    dots = beside && !tiled;
    inputs = weight.size(1) * (dtype == at::kByte ? kGroup : side_by_side);
    step = tiled ? kTileBytes / weight.element_size() : dtype == at::kByte ? kGroup : side_by_side;
    width = tiled                    ? kTileColumns
            : dtype == at::kBFloat16 ? kBfloat16Width
            : dtype == at::kChar     ? kDotWidth
            : dtype == at::kByte     ? kGroupWidth
                                     : kPlainWidth;
    const bool whole = dtype == at::kByte ? weight.size(2) == kGroupBytes : weight.size(2) == width;
    const bool known = tiled  ? has_tiles() && side_by_side * weight.element_size() == kTileNumberBytes
                       : dots ? side_by_side == (dtype == at::kChar ? WholeDot::kBeside : kBfloat16Beside)
                              : dtype == at::kFloat || dtype == at::kByte;
    TORCH_CHECK(whole && known && weight.is_contiguous(), "linear: a weight packed for another processor");
  }
};

// Rows [first, first + rows) of a linear, which share a packed weight. An output is its sum * scale of its column
// * scale of its row + bias of its column.
struct Side {
  int64_t first, rows;
  at::Tensor weight;
  Layout layout;
  const float *column_scales, *bias;
};

// Outputs (rows, columns), and the scales of rows.
template <typename Out>
struct Target {
  Out* out;
  int64_t columns;
  const float* row_scales;
};

// `sums` (rows, width) of a block of columns, to the outputs from row `row` and column `first` on.
template <typename Sum, typename Out>
void finish(
    const Sum* sums, int64_t row, int64_t rows, int64_t first, int64_t width, const Side& side, const Target<Out>& to) {
  const int64_t valid = std::min(width, to.columns - first);
  for (const int64_t end = row + rows; row < end; ++row, sums += width) {
    Out* here = to.out + row * to.columns + first;
    for (int64_t n = 0; n < valid; n += kLanes) {
      // Scales and bias are filled up to whole blocks, so only the output may end within a vector.
      Floats value = std::is_same_v<Sum, float> ? read<Floats>(sums + n)
                                                : __builtin_convertvector(read<Ints>(sums + n), Floats);
      if (side.column_scales) value = value * floats(side.column_scales + first + n) * to.row_scales[row];
      if (side.bias) value += floats(side.bias + first + n);
      if (valid - n >= kLanes) {
        store(value, here + n);
      } else {
        Out last[kLanes];
        store(value, last);
        std::copy_n(last, valid - n, here + n);
      }
    }
  }
}

// Calls multiply(first row, rows, block of weights, what comes next, share of it, sums) for all products, no more than
// kMost rows at a time, and writes the sums (rows, kWidth) to the outputs. asks_alone: whether a single part of rows
// asks for the next block too, rather than a little ahead of where it reads.
template <int kMost, int64_t kWidth, typename Sum, bool asks_alone, typename Out, typename Multiply>
void products_of(const std::vector<Side>& sides, const Target<Out>& to, const Multiply& multiply) {
  const int64_t bytes = sides[0].weight.nbytes() / sides[0].weight.size(0);
  parallel_for(0, sides[0].weight.size(0), 1, [&](int64_t begin, int64_t end) {
    alignas(kCacheLine) Sum sums[kMost * kWidth];
    for (const Side& side : sides) {
      if (side.rows == 0) continue;
      const int64_t parts = (side.rows + kMost - 1) / kMost;
      for (int64_t b = begin; b < end; ++b) {
        const char* here = static_cast<const char*>(side.weight.const_data_ptr()) + b * bytes;
        // Each part of the rows asks for its share of the next block, so that only the first one waits for memory.
        const int64_t share = b + 1 < end && (asks_alone || parts > 1) ? bytes / parts : 0;
        const char* next = here + bytes;
        evenly(side.rows, kMost, [&](int64_t first, int64_t rows) {
          first += side.first;
          multiply(first, rows, here, next, share, sums);
          next += share;
          finish(sums, first, rows, b * kWidth, kWidth, side, to);
        });
      }
    }
  });
}

// Rows that one walk through a block of weights serves, and bytes of weights that stay in the first cache meanwhile.
constexpr int64_t kPanelRows = 64, kPanelBytes = 24576;
// With so many parts of the rows, widening a panel once takes less time than widening it in each part.
constexpr int64_t kWidenFrom = kLanes > 8 ? 4 : 2;

// Multiplies rows x by a block of weights, by panels of its inputs where the block does not stay in the caches. Every
// sum goes on from panel to panel in the order of the inputs. Pairs of bfloat16 that serve many parts of the rows are
// widened once, panel by panel. next: what is wanted afterwards, `share` bytes of it.
template <int kBeside, typename T>
void multiply_block(
    const float* x, int64_t rows, int64_t inputs, const T* weight, float* sums, const char* next, int64_t share) {
  constexpr int64_t kWhole = kPanelBytes / (kPlainWidth * sizeof(float)) / kBeside * kBeside;
  const int64_t parts = (rows + kRows - 1) / kRows;
  const bool widens = kBeside == 2 && parts >= kWidenFrom;
  const int64_t panel = parts == 1 ? inputs : kWhole;
  alignas(kCacheLine) float wide[kBeside == 2 ? kWhole * kPlainWidth : 1];
  for (int64_t k = 0; k < inputs; k += panel) {
    const int64_t size = std::min(panel, inputs - k), wanted = share * size / inputs / parts;
    const T* here = weight + k * kPlainWidth;
    if constexpr (kBeside == 2)
      if (widens) widen_pairs<kVectors>(here, size, wide);
    evenly(rows, kRows, [&](int64_t first, int64_t num) {
      const auto go = [&](auto beside, const auto* from) {
        multiply_rows<kRows, kVectors, decltype(beside)::value>(
            num, x + first * inputs + k, inputs, from, kPlainWidth, size, sums + first * kPlainWidth, kPlainWidth, next,
            wanted / size, k > 0);
      };
      if (widens)
        go(std::integral_constant<int, 1>{}, wide);
      else
        go(std::integral_constant<int, kBeside>{}, here);
      next += wanted;
    });
  }
}

// x: rows filled up to what lies side by side.
template <typename T, int kBeside, typename Out>
void float_rows(const float* x, int64_t inputs, const std::vector<Side>& sides, const Target<Out>& to) {
  products_of<kPanelRows, kPlainWidth, float, true>(
      sides, to, [&](int64_t first, int64_t rows, const char* here, const char* next, int64_t share, float* sums) {
        multiply_block<kBeside>(x + first * inputs, rows, inputs, reinterpret_cast<const T*>(here), sums, next, share);
      });
}

// x: rows filled up to whole steps of the tiles.
template <typename T, typename Out>
void tiles(const T* x, int64_t filled, const std::vector<Side>& sides, const Target<Out>& to) {
#if ORTHRUS_TILES
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  const int64_t bytes = filled * static_cast<int64_t>(sizeof(T)), steps = bytes / kTileBytes;
  parallel_for(0, sides[0].weight.size(0), 1, [&](int64_t begin, int64_t end) {
    alignas(64) Sum sums[kTileMostRows * kTileColumns];
    for (const Side& side : sides) {
      if (side.rows == 0) continue;
      // Parts of equal size, the last of which may compute some rows again: so registers are set up once.
      const int64_t parts = (side.rows + kTileMostRows - 1) / kTileMostRows, size = (side.rows + parts - 1) / parts;
      const auto multiply = size > kTileRows ? &multiply_tiles<T, true> : &multiply_tiles<T, false>;
      const Tiles set(size);
      for (int64_t b = begin; b < end; ++b)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t first = side.first + std::min(part * size, side.rows - size);
          multiply(
              reinterpret_cast<const char*>(x + first * filled), bytes,
              reinterpret_cast<const char*>(side.weight.const_data_ptr<T>() + b * filled * kTileColumns), steps, sums);
          finish(sums, first, size, b * kTileColumns, kTileColumns, side, to);
        }
    }
  });
#else
  TORCH_CHECK(false, "linear: a weight packed for another processor");
#endif
}

// x: rows filled up to whole steps; starts: of the sums of each row, or none.
template <typename Dot, typename Sum, typename Out>
void dots(
    const typename Dot::X* x, int64_t filled, const Sum* starts, const std::vector<Side>& sides,
    const Target<Out>& to) {
  products_of<kDotRows, kDotWidth, Sum, false>(
      sides, to, [&](int64_t first, int64_t rows, const char* here, const char* next, int64_t share, Sum* sums) {
        with_known<kDotRows>(rows, [&](auto num) {
          multiply_dots<Dot, decltype(num)::value>(
              x + first * filled, filled, here, filled, starts ? starts + first : nullptr, sums, next, share);
        });
      });
}

void int8_rows(
    const float* x, int64_t rows, int64_t inputs, int64_t filled, bool tiled, const std::vector<Side>& sides,
    Target<float> to) {
  if (tiled) {
    const RoundedRows<int8_t> rounded(x, rows, inputs, filled);
    to.row_scales = rounded.scales.data();
    tiles(rounded.x.get(), filled, sides, to);
    return;
  }
  const RoundedRows<WholeDot::X> rounded(x, rows, inputs, filled);
  to.row_scales = rounded.scales.data();
  std::vector<int32_t> starts(rounded.sums);
  // The sum of a row that holds no numbers is any; it may wrap around.
  for (int32_t& each : starts) each = static_cast<int32_t>(static_cast<uint32_t>(each) * WholeDot::kShift);
  dots<WholeDot>(rounded.x.get(), filled, starts.data(), sides, to);
}

void int4_rows(
    const float* x, int64_t rows, int64_t inputs, const std::vector<Side>& sides, const Target<float>& to) {
  const GroupedRows grouped(x, rows, inputs);
  products_of<kGroupRows, kGroupWidth, float, false>(
      sides, to, [&](int64_t first, int64_t num, const char* here, const char* next, int64_t share, float* sums) {
        with_known<kGroupRows>(num, [&](auto known) {
          multiply_groups<decltype(known)::value>(grouped, first, here, inputs, sums, next, share);
        });
      });
}

// Rows as numbers of type To, filled up with zeros.
template <typename To>
std::unique_ptr<To[]> filled_rows(const at::BFloat16* x, int64_t rows, int64_t inputs, int64_t filled) {
  auto out = room<To>(rows * filled);
  each_row(rows, [&](int64_t row) {
    To* end = std::copy_n(x + row * inputs, inputs, out.get() + row * filled);
    std::fill(end, out.get() + (row + 1) * filled, To{});
  });
  return out;
}

void bfloat16_rows(
    const at::BFloat16* x, int64_t rows, int64_t inputs, const Layout& layout, const std::vector<Side>& sides,
    const Target<at::BFloat16>& to) {
  const int64_t filled = layout.inputs;
  if (!layout.tiled && !has_fast_bfloat16_dots()) {
    const auto wide = filled_rows<float>(x, rows, inputs, filled);
    float_rows<at::BFloat16, kBfloat16Beside>(wide.get(), filled, sides, to);
    return;
  }
  std::unique_ptr<at::BFloat16[]> whole;
  if (filled != inputs) {
    whole = filled_rows<at::BFloat16>(x, rows, inputs, filled);
    x = whole.get();
  }
  if (layout.tiled) {
    tiles(x, filled, sides, to);
    return;
  }
#if ORTHRUS_BFLOAT16_DOTS
  dots<Bfloat16Dot, float>(x, filled, nullptr, sides, to);
#endif
}

using Given = std::optional<at::Tensor>;

Side side_of(
    int64_t first, int64_t rows, const at::Tensor& x, int64_t columns, const at::Tensor& weight, const Given& scales,
    const Given& bias) {
  const Layout layout(weight);
  const auto dtype = weight.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  TORCH_CHECK(
      x.is_cpu() && x.scalar_type() == dtype, "linear: ", x.scalar_type(), " on ", x.device(),
      " times a weight that takes ", dtype);
  const int64_t inputs = x.size(-1);
  const bool fits = layout.inputs == (inputs + layout.step - 1) / layout.step * layout.step;
  TORCH_CHECK(
      fits && (weight.scalar_type() != at::kByte || layout.inputs == inputs),
      "linear: inputs that do not fit the weight");
  const int64_t room = weight.size(0) * layout.width;
  TORCH_CHECK(0 <= columns && columns <= room, "linear: outputs that do not fit the weight");
  TORCH_CHECK(
      scales.has_value() == (weight.scalar_type() == at::kChar),
      "linear: scales are for weights of int8, and they need them");
  for (const auto& each : {scales, bias})
    TORCH_CHECK(
        !each || (each->numel() >= room && each->is_contiguous() && each->is_cpu() && each->scalar_type() == at::kFloat),
        "linear: scales and bias must be filled up to blocks, in float32 and without gaps");
  return {
      first, rows, weight, layout, scales ? scales->const_data_ptr<float>() : nullptr,
      bias ? bias->const_data_ptr<float>() : nullptr};
}

// Rows of x (rows, inputs) times the weights of their sides, all of one layout, to out (rows, columns).
void multiply_sides(
    const void* x, void* out, int64_t rows, int64_t inputs, int64_t columns, const std::vector<Side>& sides) {
  const Layout& layout = sides[0].layout;
  const auto dtype = sides[0].weight.scalar_type();
  if (dtype == at::kBFloat16) {
    bfloat16_rows(
        static_cast<const at::BFloat16*>(x), rows, inputs, layout, sides,
        {static_cast<at::BFloat16*>(out), columns, nullptr});
    return;
  }
  const Target<float> to{static_cast<float*>(out), columns, nullptr};
  const auto* from = static_cast<const float*>(x);
  if (dtype == at::kFloat)
    float_rows<float, 1>(from, inputs, sides, to);
  else if (dtype == at::kChar)
    int8_rows(from, rows, inputs, layout.inputs, layout.tiled, sides, to);
  else
    int4_rows(from, rows, inputs, sides, to);
}

at::Tensor products(const at::Tensor& x, int64_t columns, std::vector<Side> sides) {
  const auto whole = x.contiguous();
  const int64_t inputs = x.size(-1), rows = x.numel() / inputs;
  auto sizes = x.sizes().vec();
  sizes.back() = columns;
  at::Tensor out = at::empty(sizes, x.options());
  if (rows == 0) return out;
  const auto* from = static_cast<const char*>(whole.const_data_ptr());
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto is_alike = [&](const Side& side) {
    return side.weight.scalar_type() == sides[0].weight.scalar_type() && side.weight.sizes() == sides[0].weight.sizes();
  };
  if (std::all_of(sides.begin(), sides.end(), is_alike)) {
    multiply_sides(from, to, rows, inputs, columns, sides);
    return out;
  }
  for (Side side : sides) {
    const int64_t first = std::exchange(side.first, 0), size = x.element_size();
    if (side.rows > 0)
      multiply_sides(from + first * inputs * size, to + first * columns * size, side.rows, inputs, columns, {side});
  }
  return out;
}

// x (..., in) of float32 or bfloat16, in the dtype of the weight, float32 for int8 and four bits; returns (..., out)
// like x. scales: of int8 outputs; scales and bias are float32, filled up to whole blocks.
at::Tensor linear(
    const at::Tensor& x, const at::Tensor& weight, const Given& scales, const Given& bias, int64_t columns) {
  const int64_t inputs = x.size(-1);
  TORCH_CHECK(inputs > 0, "linear: no inputs");
  return products(x, columns, {side_of(0, x.numel() / inputs, x, columns, weight, scales, bias)});
}

// The same for rows x (1, rows, in) of which the first `num` have a weight of their own.
at::Tensor twin_linear(
    const at::Tensor& x, int64_t num, const at::Tensor& weight, const Given& scales, const Given& bias,
    const at::Tensor& other, const Given& other_scales, const Given& other_bias, int64_t columns) {
  const int64_t inputs = x.size(-1), rows = x.size(-2);
  TORCH_CHECK(inputs > 0, "linear: no inputs");
  TORCH_CHECK(x.numel() == rows * inputs && 0 <= num && num <= rows, "linear: one sequence only");
  const auto rounds_rows = [](const at::Tensor& each) {
    return each.scalar_type() == at::kChar || each.scalar_type() == at::kByte;
  };
  TORCH_CHECK(
      weight.scalar_type() == other.scalar_type() || (rounds_rows(weight) && rounds_rows(other)),
      "linear: weights that are no twins");
  return products(
      x, columns,
      {side_of(0, num, x, columns, weight, scales, bias),
       side_of(num, rows - num, x, columns, other, other_scales, other_bias)});
}

at::Tensor tensor(AtenTensorHandle handle) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle); }

Given tensor_or_none(const AtenTensorHandle* handle) {
  if (handle == nullptr) return std::nullopt;
  return tensor(*handle);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int columns) -> Tensor");
  library.def(
      "few_rows_twin_linear(Tensor x, SymInt num, Tensor weight, Tensor? scales, Tensor? bias, Tensor other, "
      "Tensor? other_scales, Tensor? other_bias, int columns) -> Tensor");
  // Columns of a block of float32, bfloat16, int8 and four bits; numbers side by side of bfloat16 and int8.
  library.def("block_widths() -> int[]", [] {
    return std::vector<int64_t>{kPlainWidth, kBfloat16Width, kDotWidth, kGroupWidth};
  });
  library.def("beside() -> int[]", [] { return std::vector<int64_t>{kBfloat16Beside, WholeDot::kBeside}; });
  library.def("has_tiles() -> bool", [] { return has_tiles(); });
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) {
  library.impl("few_rows_linear", &linear);
  library.impl("few_rows_twin_linear", &twin_linear);
}

// What compiled layers call.
extern "C" AOTITorchError aoti_torch_cpu_few_rows_linear(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* scales, AtenTensorHandle* bias, int64_t columns,
    AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *out = torch::aot_inductor::new_tensor_handle(
        linear(tensor(x), tensor(weight), tensor_or_none(scales), tensor_or_none(bias), columns));
  });
}

extern "C" AOTITorchError aoti_torch_cpu_few_rows_twin_linear(
    AtenTensorHandle x, int64_t num, AtenTensorHandle weight, AtenTensorHandle* scales, AtenTensorHandle* bias,
    AtenTensorHandle other, AtenTensorHandle* other_scales, AtenTensorHandle* other_bias, int64_t columns,
    AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    *out = torch::aot_inductor::new_tensor_handle(twin_linear(
        tensor(x), num, tensor(weight), tensor_or_none(scales), tensor_or_none(bias), tensor(other),
        tensor_or_none(other_scales), tensor_or_none(other_bias), columns));
  });
}
