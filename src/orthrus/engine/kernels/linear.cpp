// Linears for the few rows of a decoding pass: x (rows, in) times a packed weight, in float32, bfloat16 or int8.
//
// Libraries tune for one row or for hundreds; between them they read each weight once and then wait for it.
// Here every weight is read once from memory, and each sum runs over the inputs in one order: a row comes out
// alike to the last bit whatever rows are beside it.
//
// Two layouts of a weight (out, in), both zero-filled to whole blocks:
//   plain  (blocks, in, width)           any processor, vectors of the compiler
//   tiles  (blocks, in / v, width, v)    bfloat16 (v = 2) and int8 (v = 4) for AMX
//
// A twin's linear multiplies its first rows with one weight and the others with another, in one go.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <vector>

#include "tiles.h"
#include "vectors.h"

namespace {

using namespace orthrus;
constexpr int kVectors = 3;
constexpr int64_t kPlainWidth = kLanes * kVectors;
constexpr float kLargestInt8 = 127.0f, kLeastScale = 1e-12f;

// Rows [first, first + rows) of a linear, which share a packed weight. An output is its sum * scale of its column
// * scale of its row + bias of its column.
struct Side {
  int64_t first, rows;
  at::Tensor weight;
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

template <typename T, typename Out>
void plain(const float* x, int64_t inputs, const std::vector<Side>& sides, const Target<Out>& to) {
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  const int64_t block = inputs * kPlainWidth;
  at::parallel_for(0, sides[0].weight.size(0), 1, [&](int64_t begin, int64_t end) {
    float sums[kRows * kPlainWidth];
    for (const Side& side : sides) {
      if (side.rows == 0) continue;
      const int64_t parts = (side.rows + kRows - 1) / kRows;
      for (int64_t b = begin; b < end; ++b) {
        const T* here = side.weight.const_data_ptr<T>() + b * block;
        const char* next = reinterpret_cast<const char*>(here + block);
        // Each part of the rows asks for its share of the next block.
        const int64_t step = b + 1 < end ? kPlainWidth * static_cast<int64_t>(sizeof(T)) / parts : 0;
        evenly(side.rows, kRows, [&](int64_t first, int64_t rows) {
          first += side.first;
          multiply_rows<kRows, kVectors>(
              rows, x + first * inputs, inputs, here, kPlainWidth, inputs, sums, kPlainWidth, next, step);
          next += inputs * step;
          finish(reinterpret_cast<const Sum*>(sums), first, rows, b * kPlainWidth, kPlainWidth, side, to);
        });
      }
    }
  });
}

// x: rows filled up to whole steps of the tiles.
template <typename T, typename Out>
void tiles(const T* x, int64_t filled, const std::vector<Side>& sides, const Target<Out>& to) {
#if ORTHRUS_TILES
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  const int64_t bytes = filled * static_cast<int64_t>(sizeof(T)), steps = bytes / kTileBytes;
  at::parallel_for(0, sides[0].weight.size(0), 1, [&](int64_t begin, int64_t end) {
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

// A row rounded to int8 by a scale of its own, as `Int8Linear` does; `to` has room for `filled` numbers.
template <typename To>
float round_row(const float* x, int64_t inputs, To* to, int64_t filled) {
  // Magnitudes order as the whole numbers that their bits are, and what is no number is the largest.
  constexpr int32_t kMagnitude = 0x7fffffff;
  Ints most_each = {};
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    const Ints magnitude = read<Ints>(x + k) & kMagnitude;
    most_each = most_each > magnitude ? most_each : magnitude;
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = std::max<int32_t>(most, most_each[i]);
  for (int64_t i = k; i < inputs; ++i) most = std::max(most, bits<int32_t>(x[i]) & kMagnitude);
  const float largest = bits<float>(most) / kLargestInt8;
  const float scale = largest < kLeastScale ? kLeastScale : largest, inverse = 1.0f / scale;
  // Adding it leaves no room for a fraction: the sum is rounded, ties to even.
  constexpr float kWhole = 12582912.0f;
  for (k = 0; k + kLanes <= inputs; k += kLanes) {
    const Floats whole = (floats(x + k) * all(inverse) + kWhole) - kWhole;
    const auto narrow = __builtin_convertvector(__builtin_convertvector(whole, Ints), Vector<To>);
    std::memcpy(to + k, &narrow, sizeof(narrow));
  }
  for (; k < inputs; ++k) to[k] = static_cast<To>((x[k] * inverse + kWhole) - kWhole);
  std::fill(to + inputs, to + filled, To{});
  return scale;
}

template <typename To>
std::vector<float> round_rows(const float* x, int64_t rows, int64_t inputs, To* to, int64_t filled) {
  std::vector<float> scales(rows);
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      scales[row] = round_row(x + row * inputs, inputs, to + row * filled, filled);
  });
  return scales;
}

// Rows rounded to numbers of type To: int8 for tiles, float32 of whole numbers for vectors.
template <typename To>
void int8_rows(
    const float* x, int64_t rows, int64_t inputs, int64_t filled, const std::vector<Side>& sides, Target<float> to) {
  const auto whole = room<To>(rows * filled);
  const auto scales = round_rows(x, rows, inputs, whole.get(), filled);
  to.row_scales = scales.data();
  if constexpr (std::is_same_v<To, int8_t>)
    tiles(whole.get(), filled, sides, to);
  else
    plain<int8_t>(whole.get(), inputs, sides, to);
}

void bfloat16_rows(
    const at::BFloat16* x, int64_t rows, int64_t inputs, int64_t filled, bool tiled, const std::vector<Side>& sides,
    const Target<at::BFloat16>& to) {
  if (!tiled) {
    const std::vector<float> wide(x, x + rows * inputs);
    plain<at::BFloat16>(wide.data(), inputs, sides, to);
    return;
  }
  if (filled == inputs) {
    tiles(x, filled, sides, to);
    return;
  }
  std::vector<at::BFloat16> whole(rows * filled);
  for (int64_t row = 0; row < rows; ++row) std::copy_n(x + row * inputs, inputs, whole.data() + row * filled);
  tiles(whole.data(), filled, sides, to);
}

using Given = std::optional<at::Tensor>;

// Inputs of a packed weight, filled up where it is made for tiles.
int64_t inputs_of(const at::Tensor& weight) { return weight.size(1) * (weight.dim() == 4 ? weight.size(3) : 1); }

Side side_of(
    int64_t first, int64_t rows, int64_t inputs, int64_t columns, const at::Tensor& weight, const Given& scales,
    const Given& bias) {
  const bool tiled = weight.dim() == 4;
  const auto dtype = weight.scalar_type();
  TORCH_CHECK(!tiled || (has_tiles() && dtype != at::kFloat), "linear: a weight packed for another processor");
  const int64_t step = tiled ? kTileBytes / weight.element_size() : 1;
  TORCH_CHECK(inputs_of(weight) == (inputs + step - 1) / step * step, "linear: inputs that do not fit the weight");
  TORCH_CHECK(
      weight.size(2) == (tiled ? kTileColumns : kPlainWidth), "linear: a weight packed for another processor");
  const int64_t room = weight.size(0) * weight.size(2);
  TORCH_CHECK(columns <= room, "linear: outputs that do not fit the weight");
  for (const auto& each : {scales, bias})
    TORCH_CHECK(!each || each->numel() >= room, "linear: scales and bias must be filled up to blocks");
  return {
      first, rows, weight, scales ? scales->const_data_ptr<float>() : nullptr,
      bias ? bias->const_data_ptr<float>() : nullptr};
}

at::Tensor products(const at::Tensor& x, int64_t columns, const std::vector<Side>& sides) {
  const auto whole = x.contiguous();
  const int64_t inputs = x.size(-1), rows = x.numel() / inputs;
  auto sizes = x.sizes().vec();
  sizes.back() = columns;
  at::Tensor out = at::empty(sizes, x.options());
  if (rows == 0) return out;
  const at::Tensor& weight = sides[0].weight;
  const int64_t filled = inputs_of(weight);
  const bool tiled = weight.dim() == 4;
  if (weight.scalar_type() == at::kBFloat16) {
    bfloat16_rows(
        whole.const_data_ptr<at::BFloat16>(), rows, inputs, filled, tiled, sides,
        {out.mutable_data_ptr<at::BFloat16>(), columns, nullptr});
    return out;
  }
  const Target<float> to{out.mutable_data_ptr<float>(), columns, nullptr};
  const float* from = whole.const_data_ptr<float>();
  if (weight.scalar_type() != at::kChar)
    plain<float>(from, inputs, sides, to);
  else if (tiled)
    int8_rows<int8_t>(from, rows, inputs, filled, sides, to);
  else
    int8_rows<float>(from, rows, inputs, filled, sides, to);
  return out;
}

// x (..., in) of float32 or bfloat16, in the dtype of the weight, float32 for int8; returns (..., out) like x.
// scales: of int8 outputs; scales and bias are float32, filled up to whole blocks.
at::Tensor linear(
    const at::Tensor& x, const at::Tensor& weight, const Given& scales, const Given& bias, int64_t columns) {
  const int64_t inputs = x.size(-1);
  TORCH_CHECK(inputs > 0, "linear: no inputs");
  return products(x, columns, {side_of(0, x.numel() / inputs, inputs, columns, weight, scales, bias)});
}

// The same for rows x (1, rows, in) of which the first `num` have a weight of their own.
at::Tensor twin_linear(
    const at::Tensor& x, int64_t num, const at::Tensor& weight, const Given& scales, const Given& bias,
    const at::Tensor& other, const Given& other_scales, const Given& other_bias, int64_t columns) {
  const int64_t inputs = x.size(-1), rows = x.size(-2);
  TORCH_CHECK(inputs > 0, "linear: no inputs");
  TORCH_CHECK(x.numel() == rows * inputs && 0 <= num && num <= rows, "linear: one sequence only");
  TORCH_CHECK(
      weight.sizes() == other.sizes() && weight.scalar_type() == other.scalar_type(),
      "linear: weights that are no twins");
  return products(
      x, columns,
      {side_of(0, num, inputs, columns, weight, scales, bias),
       side_of(num, rows - num, inputs, columns, other, other_scales, other_bias)});
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
  library.def("plain_width() -> int", [] { return kPlainWidth; });
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
