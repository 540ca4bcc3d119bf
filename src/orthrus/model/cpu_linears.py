"""Linears for few rows on a CPU: weights packed once for oneDNN, in the model's precision or in int8.

PyTorch has kernels for packed weights, which its compiler calls only for weights that are constants of the
code; ours are arguments. So the kernels go under names of our own, and compiled code calls the same functions
of PyTorch's C interface: see `C_FUNCTIONS`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.errors import UserInputError

_LARGEST_INT8 = 127
_LEAST_SCALE = 1e-12

_library = torch.library.Library("orthrus", "DEF")
_library.define(
    "_linear_pointwise(Tensor x, Tensor weight, Tensor? bias, str post_op, Scalar?[] post_op_args, "
    "str? post_op_algorithm) -> Tensor"
)
_library.define(
    "_qlinear_pointwise_tensor(Tensor x, Tensor x_scale, Tensor x_zero, Tensor weight, Tensor scales, "
    "Tensor zeros, Tensor? bias, float out_scale, int out_zero, ScalarType? out_dtype, str post_op, "
    "Scalar?[] post_op_args, str post_op_algorithm) -> Tensor"
)


# Looked up when called: a PyTorch without oneDNN has neither.
def _linear(*args: Any) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(*args)  # type: ignore[no-any-return]


def _qlinear(*args: Any) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise.tensor(*args)  # type: ignore[no-any-return]


for _key in ("CPU", "MkldnnCPU"):
    _library.impl("_linear_pointwise", _linear, _key)
    _library.impl("_qlinear_pointwise_tensor", _qlinear, _key)


def _shape_of_linear(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _shape_of_qlinear(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, weight: Tensor, scales: Tensor, *_: object
) -> Tensor:
    return x.new_empty((x.shape[0], scales.shape[0]), dtype=torch.float32)


_library.impl("_linear_pointwise", _shape_of_linear, "Meta")
_library.impl("_qlinear_pointwise_tensor", _shape_of_qlinear, "Meta")

C_FUNCTIONS = {
    torch.ops.orthrus._linear_pointwise.default: [
        "AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle*, const char*, const double**, int64_t, const char**, AtenTensorHandle*)"
    ],
    torch.ops.orthrus._qlinear_pointwise_tensor.default: [
        "AOTITorchError aoti_torch_cpu__qlinear_pointwise_tensor(AtenTensorHandle, AtenTensorHandle, "
        "AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle*, double, "
        "int64_t, const int32_t*, const char*, const double**, int64_t, const char*, AtenTensorHandle*)"
    ],
}
"""Operators of ours, and the C functions of PyTorch that compiled code calls in their place."""


class PackedLinear(nn.Module):
    """A linear with its weight laid out for few rows; rounds a little differently.

    bfloat16 is packed for oneDNN. float32 is transposed: oneDNN's own layout takes half as long again for one
    row, and gains little for 8 to 16.
    """

    def __init__(self, weight_NC: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NC.shape
        self.is_transposed = weight_NC.dtype == torch.float32
        if self.is_transposed:
            laid_out = weight_NC.t().contiguous()
        else:
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight_NC.contiguous(), 8)
        self.register_buffer("weight", laid_out, persistent=False)
        self.register_buffer("bias", bias_N, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_transposed:
            out: Tensor = x @ self.weight  # type: ignore[operator]
            return out if self.bias is None else out + self.bias  # type: ignore[operator]
        if not x.numel():
            return x.new_empty((*x.shape[:-1], self.out_features))
        return torch.ops.orthrus._linear_pointwise(  # type: ignore[no-any-return]
            x, self.weight, self.bias, "none", [], ""
        )


class Int8Linear(nn.Module):
    """A linear with int8 weights, scaled per output, and rows rounded to int8 by a scale of their own.

    One scale per row: a row's result does not depend on the rows beside it, which losslessness needs. The
    products are summed in whole numbers, so it does not depend on their number either. Returns the dtype of
    its input. Raises UserInputError for weights that are on no CPU, or where PyTorch lacks oneDNN.

    Compiled code must bring at least two rows: for a single one oneDNN takes ten times as long.
    """

    def __init__(self, weight_NC: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NC.shape
        self.register_buffer("weight", torch.ops.onednn.qlinear_prepack(weight_NC, None), persistent=False)
        self.register_buffer("scales_N", scales_N, persistent=False)
        self.register_buffer("zeros_N", torch.zeros(len(scales_N), dtype=torch.int32), persistent=False)
        # Rows come rounded already: for oneDNN their scale is one.
        self.register_buffer("one", torch.tensor(1.0), persistent=False)
        self.register_buffer("zero", torch.tensor(0, dtype=torch.int32), persistent=False)
        self.register_buffer("bias", bias_N, persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """A linear's weights, rounded."""
        weight_NC = linear.weight.detach()
        check_int8(weight_NC.device)
        scales_N = (weight_NC.float().abs().amax(1) / _LARGEST_INT8).clamp_min(_LEAST_SCALE)
        int8_NC = (weight_NC.float() / scales_N[:, None]).round().to(torch.int8)
        return cls(int8_NC, scales_N, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        rows_RC = x.flatten(0, -2).float()
        scales_R1 = (rows_RC.abs().amax(-1, keepdim=True) / _LARGEST_INT8).clamp_min(_LEAST_SCALE)
        int8_RC = (rows_RC / scales_R1).round().to(torch.int8)
        out_RN = (self._products(int8_RC) * scales_R1).to(x.dtype)
        out = out_RN.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias  # type: ignore[operator]

    def int8_weight(self) -> Tensor:
        """The weights (N, C) before they were packed, bit by bit: what unit rows are taken to."""
        unit_CC = torch.eye(self.in_features, dtype=torch.int8)
        scales_N: Tensor = self.scales_N  # type: ignore[assignment]
        # In slices: at once it would take four bytes a weight.
        columns = [(self._products(rows) / scales_N).round().to(torch.int8) for rows in unit_CC.split(256)]
        return torch.cat(columns).t().contiguous()

    def _products(self, int8_RC: Tensor) -> Tensor:
        """Rows times weights in float32, scaled per output; the sums are whole numbers, exact."""
        if not torch.compiler.is_compiling() and int8_RC.shape[0] < 2:
            if not int8_RC.shape[0]:
                return torch.empty(0, self.out_features)
            return self._products(int8_RC.expand(2, -1))[:1]
        return torch.ops.orthrus._qlinear_pointwise_tensor(  # type: ignore[no-any-return]
            int8_RC,
            self.one,
            self.zero,
            self.weight,
            self.scales_N,
            self.zeros_N,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )


def fast_linear(linears: Sequence[nn.Module]) -> nn.Module | None:
    """One linear for several that read the same input, their outputs side by side, laid out for few rows.

    None unless all of them are plain linears of one dtype that can be laid out, or all int8 ones.
    """
    if len(linears) == 1 and type(linears[0]) is Int8Linear:
        return linears[0]
    if all(type(linear) is Int8Linear for linear in linears):
        scales_N = torch.cat([linear.scales_N for linear in linears])  # type: ignore[misc]
        weight_NC = torch.cat([linear.int8_weight() for linear in linears])  # type: ignore[operator]
        return Int8Linear(weight_NC, scales_N, _joined_bias(linears))
    if not all(_packable(linear) for linear in linears):
        return None
    weights = [linear.weight.detach() for linear in linears]  # type: ignore[operator]
    if len({weight.dtype for weight in weights}) > 1:
        return None
    return PackedLinear(torch.cat(weights), _joined_bias(linears))


def _joined_bias(linears: Sequence[nn.Module]) -> Tensor | None:
    """Side by side, zeros for those that have none; None where none has one."""
    found = next((linear.bias for linear in linears if linear.bias is not None), None)
    if found is None:
        return None
    parts = []
    for linear in linears:
        none = found.new_zeros(int(linear.out_features))  # type: ignore[arg-type, operator]
        parts.append(none if linear.bias is None else linear.bias.detach())  # type: ignore[operator]
    return torch.cat(parts)


def check_int8(device: torch.device) -> None:
    """UserInputError unless int8 linears can run on this device here."""
    if device.type != "cpu":
        raise UserInputError(
            f"int8 runs on CPUs only, not on {device.type}: choose device 'cpu', or leave int8 out."
        )
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        raise UserInputError("int8 needs a PyTorch with oneDNN: leave it out here.")


def _packable(linear: nn.Module) -> bool:
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        return False
    if linear.weight.device.type != "cpu":
        return False
    return linear.weight.dtype == torch.float32 or (
        linear.weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
