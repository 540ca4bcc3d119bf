// Linears for the few rows of a decoding pass: x (rows, in) times a packed weight, in float32, bfloat16 or int8.
//
// Libraries tune for one row or for hundreds; between them they read each weight once and then wait for it.
// Here every weight is read once from memory, the next ones are asked for while these are multiplied, and each
// sum runs over the inputs in order: a row comes out alike to the last bit whatever rows are beside it.
//
// Two layouts of a weight (out, in), both zero-filled to whole blocks of outputs:
//   plain  (blocks, in, width)           any processor, vectors of the compiler
//   tiles  (blocks, in / v, width, v)    bfloat16 (v = 2) and int8 (v = 4) for AMX, products by oneDNN's kernels

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <vector>

#include "vectors.h"

namespace {

using namespace orthrus;
constexpr int kVectors = 3;
constexpr int64_t kPlainWidth = kLanes * kVectors, kMostWidth = 64, kMostRows = 128;
constexpr float kLargestInt8 = 127.0f, kLeastScale = 1e-12f;

// How an output is finished: sum * scale of its column * scale of its row + bias of its column.
struct Finish {
  const float* column_scales;
  const float* row_scales;
  const float* bias;
};

// `sums` (rows, width) of one block, into columns [first, first + width) of `out` (rows, columns).
template <typename Sum, typename Out>
void finish(const Sum* sums, int64_t rows, int64_t width, Out* out, int64_t first, int64_t columns, Finish f) {
  const int64_t valid = std::min(width, columns - first);
  for (int64_t row = 0; row < rows; ++row) {
    const Sum* from = sums + row * width;
    Out* to = out + row * columns + first;
    for (int64_t n = 0; n < valid; n += kLanes) {
      // Scales and bias are filled up to whole blocks, so only the output may end within a vector.
      Floats value = std::is_same_v<Sum, float> ? read<Floats>(from + n)
                                                : __builtin_convertvector(read<Ints>(from + n), Floats);
      if (f.column_scales) value = value * floats(f.column_scales + first + n) * f.row_scales[row];
      if (f.bias) value += floats(f.bias + first + n);
      if (valid - n >= kLanes) {
        store(value, to + n);
      } else {
        Out last[kLanes];
        store(value, last);
        std::copy_n(last, valid - n, to + n);
      }
    }
  }
}

template <typename T, typename Out>
void plain(
    const float* x, const T* weight, Out* out, int64_t rows, int64_t inputs, int64_t columns, int64_t blocks, Finish f) {
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;
  const int64_t parts = (rows + kRows - 1) / kRows, block = inputs * kPlainWidth;
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    float sums[kMostRows * kPlainWidth];
    for (int64_t b = begin; b < end; ++b) {
      const T* here = weight + b * block;
      // Each part of the rows asks for its share of the next block.
      const int64_t step = b + 1 < end ? kPlainWidth * static_cast<int64_t>(sizeof(T)) / parts : 0;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
        multiply_rows<kRows, kVectors>(
            last - first, x + first * inputs, inputs, here, kPlainWidth, inputs, sums + first * kPlainWidth,
            kPlainWidth, reinterpret_cast<const char*>(here + block) + part * inputs * step, step);
      }
      finish(reinterpret_cast<const Sum*>(sums), rows, kPlainWidth, out, b * kPlainWidth, columns, f);
    }
  });
}

template <typename X, typename T, typename Sum, typename Out>
void tiles(
    const X* x, const T* weight, Out* out, int64_t rows, int64_t inputs, int64_t columns, int64_t blocks, int64_t width,
    Finish f) {
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) Sum sums[kMostRows * kMostWidth];
    for (int64_t b = begin; b < end; ++b) {
      at::native::cpublas::brgemm(
          rows, width, inputs, inputs, width, width, false, x, weight + b * inputs * width, sums);
      finish(sums, rows, width, out, b * width, columns, f);
    }
    at::native::cpublas::brgemm_release();
  });
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
  const float scale = largest < kLeastScale ? kLeastScale : largest;
  // Adding it leaves no room for a fraction: the sum is rounded, ties to even.
  constexpr float kWhole = 12582912.0f;
  for (k = 0; k + kLanes <= inputs; k += kLanes) {
    const Floats whole = (floats(x + k) / all(scale) + kWhole) - kWhole;
    const auto narrow = __builtin_convertvector(__builtin_convertvector(whole, Ints), Vector<To>);
    std::memcpy(to + k, &narrow, sizeof(narrow));
  }
  for (; k < inputs; ++k) to[k] = static_cast<To>((x[k] / scale + kWhole) - kWhole);
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

// Up to kMostRows rows of float32 x with int8 weights.
void int8_rows(
    const float* x, const at::Tensor& weight, float* out, int64_t rows, int64_t inputs, int64_t columns, Finish f) {
  const auto* packed = weight.const_data_ptr<int8_t>();
  const int64_t blocks = weight.size(0);
  if (weight.dim() == 4) {
    const int64_t filled = weight.size(1) * weight.size(3);
    std::vector<int8_t> whole(rows * filled);
    const auto scales = round_rows(x, rows, inputs, whole.data(), filled);
    f.row_scales = scales.data();
    tiles<signed char, signed char, int32_t>(
        reinterpret_cast<const signed char*>(whole.data()), reinterpret_cast<const signed char*>(packed), out, rows,
        filled, columns, blocks, weight.size(2), f);
  } else {
    std::vector<float> whole(rows * inputs);
    const auto scales = round_rows(x, rows, inputs, whole.data(), inputs);
    f.row_scales = scales.data();
    plain(whole.data(), packed, out, rows, inputs, columns, blocks, f);
  }
}

void bfloat16_rows(
    const at::BFloat16* x, const at::Tensor& weight, at::BFloat16* out, int64_t rows, int64_t inputs, int64_t columns,
    Finish f) {
  const auto* packed = weight.const_data_ptr<at::BFloat16>();
  if (weight.dim() == 4) {
    tiles<at::BFloat16, at::BFloat16, float>(
        x, packed, out, rows, inputs, columns, weight.size(0), weight.size(2), f);
    return;
  }
  const std::vector<float> wide(x, x + rows * inputs);
  plain(wide.data(), packed, out, rows, inputs, columns, weight.size(0), f);
}

// x (..., in) of float32 or bfloat16, in the dtype of the weight, float32 for int8; returns (..., out) like x.
// scales: of int8 outputs; scales and bias are float32, filled up to whole blocks.
at::Tensor linear(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
    const std::optional<at::Tensor>& bias, int64_t columns) {
  const auto whole = x.contiguous();
  const int64_t inputs = x.size(-1), blocks = weight.size(0), width = weight.size(2);
  const int64_t packed = weight.dim() == 4 ? weight.size(1) * weight.size(3) : weight.size(1);
  TORCH_CHECK(inputs > 0 && packed >= inputs && packed - inputs < 4, "linear: inputs that do not fit the weight");
  TORCH_CHECK(columns <= blocks * width, "linear: outputs that do not fit the weight");
  for (const auto& each : {scales, bias})
    TORCH_CHECK(!each || each->numel() >= blocks * width, "linear: scales and bias must be filled up to blocks");
  const int64_t rows = x.numel() / inputs;
  auto sizes = x.sizes().vec();
  sizes.back() = columns;
  at::Tensor out = at::empty(sizes, x.options());
  TORCH_CHECK(weight.dim() == 4 || width == kPlainWidth, "linear: a weight packed for another processor");
  TORCH_CHECK(width <= kMostWidth && width % kLanes == 0, "linear: blocks of a wrong width");
  const Finish f{
      scales ? scales->const_data_ptr<float>() : nullptr, nullptr, bias ? bias->const_data_ptr<float>() : nullptr};
  for (int64_t first = 0; first < rows; first += kMostRows) {
    const int64_t num = std::min(rows - first, kMostRows);
    if (weight.scalar_type() == at::kBFloat16) {
      bfloat16_rows(
          whole.const_data_ptr<at::BFloat16>() + first * inputs, weight,
          out.mutable_data_ptr<at::BFloat16>() + first * columns, num, inputs, columns, f);
      continue;
    }
    const float* here = whole.const_data_ptr<float>() + first * inputs;
    float* there = out.mutable_data_ptr<float>() + first * columns;
    if (weight.scalar_type() == at::kChar)
      int8_rows(here, weight, there, num, inputs, columns, f);
    else
      plain(here, weight.const_data_ptr<float>(), there, num, inputs, columns, weight.size(0), f);
  }
  return out;
}

std::optional<at::Tensor> tensor_or_none(const AtenTensorHandle* handle) {
  if (handle == nullptr) return std::nullopt;
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(*handle);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int columns) -> Tensor");
  library.def("plain_width() -> int", [] { return kPlainWidth; });
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) { library.impl("few_rows_linear", &linear); }

// What compiled layers call.
extern "C" AOTITorchError aoti_torch_cpu_few_rows_linear(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* scales, AtenTensorHandle* bias, int64_t columns,
    AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    const auto tensor = [](AtenTensorHandle handle) {
      return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
    };
    *out = torch::aot_inductor::new_tensor_handle(
        linear(tensor(x), tensor(weight), tensor_or_none(scales), tensor_or_none(bias), columns));
  });
}
