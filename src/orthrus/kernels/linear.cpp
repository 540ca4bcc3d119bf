// Linear layers for passes of few rows: x (rows, inputs) times a packed weight of float32, bfloat16, int8 or 4 bits.
//
// Libraries tune matrix products for one row or for hundreds. Between the two, they wait for memory and for the
// multiplications in turn. These kernels read each weight from memory once, and prefetch the next ones while they
// multiply. Each sum adds its products in one fixed order, so a row has the same bits whatever other rows are computed.
//
// The linear layer of a twin multiplies its first rows by one weight and the others by another. If both weights have
// the same layout (`linear_layout.h`), both products are computed together.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "linear_layout.h"
#include "linear_products.h"

namespace {

using namespace orthrus;

using OptionalTensor = std::optional<at::Tensor>;

// A side whose arguments have been checked. x: all rows of the layer. columns: the number of outputs.
Side checked_side(
    int64_t first, int64_t rows, const at::Tensor& x, int64_t columns, const at::Tensor& weight,
    const OptionalTensor& scales, const OptionalTensor& bias) {
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
  const int64_t padded_columns = weight.size(0) * layout.width;
  TORCH_CHECK(0 <= columns && columns <= padded_columns, "linear: outputs that do not fit the weight");
  TORCH_CHECK(
      scales.has_value() == (weight.scalar_type() == at::kChar),
      "linear: scales are for weights of int8, and they need them");
  for (const auto& each : {scales, bias})
    TORCH_CHECK(
        !each || (each->numel() >= padded_columns && each->is_contiguous() && each->is_cpu() &&
                  each->scalar_type() == at::kFloat),
        "linear: scales and bias must be filled up to blocks, in float32 and without gaps");
  return {
      first, rows, weight, layout, scales ? scales->const_data_ptr<float>() : nullptr,
      bias ? bias->const_data_ptr<float>() : nullptr};
}

// x (..., inputs) times the weights of `sides`, as (..., columns).
at::Tensor linear_products(const at::Tensor& x, int64_t columns, std::vector<Side> sides) {
  const auto contiguous = x.contiguous();
  const int64_t inputs = x.size(-1), rows = x.numel() / inputs;
  auto sizes = x.sizes().vec();
  sizes.back() = columns;
  at::Tensor out = at::empty(sizes, x.options());
  if (rows == 0) return out;
  const auto* from = static_cast<const char*>(contiguous.const_data_ptr());
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

// The operator `few_rows_linear`. x: (..., inputs), in bfloat16 for a bfloat16 weight and in float32 for all others.
// scales: of the columns of an int8 weight. scales and bias are in float32, padded to whole blocks. columns: the number
// of outputs. Returns (..., columns) in the dtype of x.
at::Tensor linear(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& scales, const OptionalTensor& bias,
    int64_t columns) {
  const int64_t inputs = x.size(-1);
  TORCH_CHECK(inputs > 0, "linear: no inputs");
  return linear_products(x, columns, {checked_side(0, x.numel() / inputs, x, columns, weight, scales, bias)});
}

// The operator `few_rows_twin_linear`. x: (1, rows, inputs). The first `num` rows are multiplied by `weight`, and the
// rest by `other`.
at::Tensor twin_linear(
    const at::Tensor& x, int64_t num, const at::Tensor& weight, const OptionalTensor& scales,
    const OptionalTensor& bias, const at::Tensor& other, const OptionalTensor& other_scales,
    const OptionalTensor& other_bias, int64_t columns) {
  const int64_t inputs = x.size(-1), rows = x.size(-2);
  TORCH_CHECK(inputs > 0, "linear: no inputs");
  TORCH_CHECK(x.numel() == rows * inputs && 0 <= num && num <= rows, "linear: one sequence only");
  const auto quantises_rows = [](const at::Tensor& each) {
    return each.scalar_type() == at::kChar || each.scalar_type() == at::kByte;
  };
  TORCH_CHECK(
      weight.scalar_type() == other.scalar_type() || (quantises_rows(weight) && quantises_rows(other)),
      "linear: weights that are no twins");
  return linear_products(
      x, columns,
      {checked_side(0, num, x, columns, weight, scales, bias),
       checked_side(num, rows - num, x, columns, other, other_scales, other_bias)});
}

at::Tensor tensor(AtenTensorHandle handle) { return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle); }

OptionalTensor tensor_or_none(const AtenTensorHandle* handle) {
  if (handle == nullptr) return std::nullopt;
  return tensor(*handle);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int columns) -> Tensor");
  library.def(
      "few_rows_twin_linear(Tensor x, SymInt num, Tensor weight, Tensor? scales, Tensor? bias, Tensor other, "
      "Tensor? other_scales, Tensor? other_bias, int columns) -> Tensor");
  // The columns of a block of float32, bfloat16, int8 and 4-bit weights.
  library.def("block_widths() -> int[]", [] {
    return std::vector<int64_t>{kFloatWidth, kBfloat16Width, kDotWidth, kGroupWidth};
  });
  // How many inputs are interleaved in bfloat16 and in int8 weights.
  library.def("interleaved() -> int[]", [] { return std::vector<int64_t>{kBfloat16Interleaved, Int8Dot::kInterleaved}; });
  library.def("has_tiles() -> bool", [] { return has_tiles(); });
}

TORCH_LIBRARY_IMPL(orthrus, CPU, library) {
  library.impl("few_rows_linear", &linear);
  library.impl("few_rows_twin_linear", &twin_linear);
}

// The C functions that compiled layers call instead of the operators.
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
