"""Linears for few rows on a CPU: weights packed once for oneDNN, in the model's precision or in int8.

The packed tensors are opaque to PyTorch's compiler, so each kernel is an operator of our own around the
one of PyTorch: `torch.compile` then calls it as it stands.
"""

import torch
from torch import Tensor, nn

from orthrus.errors import UserInputError

_LARGEST_INT8 = 127
_LEAST_SCALE = 1e-12

_library = torch.library.Library("orthrus", "DEF")
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("int8_linear(Tensor x_int8, Tensor weight, Tensor scales, Tensor zeros) -> Tensor")


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x.numel():
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _int8_linear(x_int8: Tensor, weight: Tensor, scales_N: Tensor, zeros_N: Tensor) -> Tensor:
    """int8 rows (..., C) times int8 weights, in fp32 and scaled per output; sums are whole numbers, exact."""
    num_rows = x_int8.numel() // x_int8.shape[-1]
    if num_rows == 0:
        return x_int8.new_empty((*x_int8.shape[:-1], scales_N.shape[0]), dtype=torch.float32)
    if num_rows == 1:
        # oneDNN has no fast kernel for a single row: it takes ten times as long as two.
        two = _int8_linear(x_int8.reshape(1, -1).expand(2, -1), weight, scales_N, zeros_N)
        return two[:1].view(*x_int8.shape[:-1], -1)
    return torch.ops.onednn.qlinear_pointwise(  # type: ignore[no-any-return]
        x_int8, 1.0, 0, weight, scales_N, zeros_N, None, 1.0, 0, torch.float32, "none", [], ""
    )


for _key in ("CPU", "MkldnnCPU"):
    _library.impl("packed_linear", _packed_linear, _key)
    _library.impl("int8_linear", _int8_linear, _key)
_library.impl("packed_linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), "Meta")
_library.impl(
    "int8_linear",
    lambda x, weight, scales, zeros: x.new_empty((*x.shape[:-1], scales.shape[0]), dtype=torch.float32),
    "Meta",
)


class PackedLinear(nn.Module):
    """`linear` with its weight laid out for few rows; rounds a little differently.

    bfloat16 is packed for oneDNN. float32 is transposed: oneDNN's own layout takes half as long again for one
    row, and gains nothing for 8 to 16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.is_transposed = weight.dtype == torch.float32
        if self.is_transposed:
            laid_out = weight.t().contiguous()
        else:
            laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        self.register_buffer("weight", laid_out, persistent=False)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_transposed:
            return torch.ops.orthrus.packed_linear(x, self.weight, self.bias)  # type: ignore[no-any-return]
        out: Tensor = x @ self.weight  # type: ignore[operator]
        return out if self.bias is None else out + self.bias  # type: ignore[operator]


class Int8Linear(nn.Module):
    """`linear` with int8 weights, scaled per output, and rows rounded to int8 by a scale of their own.

    One scale per row: a row's result does not depend on the rows beside it, which losslessness needs. The
    products are summed in whole numbers, so it does not depend on their number either. Returns the dtype of
    its input. Raises UserInputError for a linear that is on no CPU, or where PyTorch lacks oneDNN.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_NC = linear.weight.detach()
        check_int8(weight_NC.device)
        scales_N = (weight_NC.float().abs().amax(1) / _LARGEST_INT8).clamp_min(_LEAST_SCALE)
        int8_NC = (weight_NC.float() / scales_N[:, None]).round().to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(int8_NC, None)
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer("scales_N", scales_N, persistent=False)
        self.register_buffer("zeros_N", torch.zeros(len(scales_N), dtype=torch.int32), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float()
        scales = (rows.abs().amax(-1, keepdim=True) / _LARGEST_INT8).clamp_min(_LEAST_SCALE)
        int8_rows = (rows / scales).round().to(torch.int8)
        out: Tensor = torch.ops.orthrus.int8_linear(int8_rows, self.weight, self.scales_N, self.zeros_N)
        out = (out * scales).to(x.dtype)
        return out if self.bias is None else out + self.bias  # type: ignore[operator]


def check_int8(device: torch.device) -> None:
    """UserInputError unless int8 linears can run on this device here."""
    if device.type != "cpu":
        raise UserInputError(
            f"int8 runs on CPUs only, not on {device.type}: choose device 'cpu', or leave int8 out."
        )
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        raise UserInputError("int8 needs a PyTorch with oneDNN: leave it out here.")


def packable(linear: nn.Module) -> bool:
    """Whether `PackedLinear` can stand for a module."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        return False
    if linear.weight.device.type != "cpu":
        return False
    return linear.weight.dtype == torch.float32 or (
        linear.weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
