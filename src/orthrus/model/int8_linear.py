"""A linear layer in int8, by PyTorch's own kernels: quantised models use it with the eager runner."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from orthrus.errors import UserInputError

_LARGEST_INT8 = 127
_EXACT_INPUTS = 1024
"""float32 holds sums of so many products of two int8 numbers exactly."""
_LEAST_SCALE = 1e-12
_ZERO_POINT = 128
"""Added to make rows unsigned, because VNNI multiplies unsigned by signed numbers. Without AMX, oneDNN has only a plain
loop for two signed numbers."""


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, scaled per output, and rows that are rounded to int8.

    Each row has its own scale, so its result does not depend on the other rows, which losslessness needs. The products
    are summed as integers, so it does not depend on the number of rows either. Returns the dtype of its input. Raises
    UserInputError for weights that are not on a CPU.

    oneDNN computes the sums if the processor has instructions for it. Otherwise oneDNN would add two products in 16
    bits, which may overflow. Then the sums are computed in float32, which is exact but slow.
    """

    weight: Tensor
    scales_N: Tensor
    prepacked: Tensor | None

    def __init__(self, weight_NC: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NC.shape
        self.register_buffer("weight", weight_NC, persistent=False)
        self.register_buffer("scales_N", scales_N, persistent=False)
        self.register_buffer("bias", bias_N, persistent=False)
        # For oneDNN. Made at the first use, because compiled code packs the weights itself.
        self.register_buffer("prepacked", None, persistent=False)
        self.register_buffer("zeros_N", torch.zeros(len(scales_N), dtype=torch.int32), persistent=False)
        # Rows are rounded already, so their scale for oneDNN is one.
        self.register_buffer("one", torch.tensor(1.0), persistent=False)
        self.register_buffer("zero_point", torch.tensor(_ZERO_POINT, dtype=torch.int32), persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """A linear layer's weights, rounded."""
        weight_NC = linear.weight.detach()
        check_quantised("int8", weight_NC.device)
        scales_N = (weight_NC.float().abs().amax(1) / _LARGEST_INT8).clamp_min(_LEAST_SCALE)
        int8_NC = (weight_NC.float() / scales_N[:, None]).round().to(torch.int8)
        return cls(int8_NC, scales_N, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        whole_RC, scales_R1 = rounded(x.flatten(0, -2).float())
        out_RN = (self._products(whole_RC.to(torch.int8)) * scales_R1).to(x.dtype)
        out = out_RN.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias  # type: ignore[operator]

    def _products(self, int8_RC: Tensor) -> Tensor:
        """Rows times weights in float32, scaled per output. The sums are exact whole numbers."""
        if not onednn_is_exact():
            parts = zip(int8_RC.split(_EXACT_INPUTS, 1), self.weight.split(_EXACT_INPUTS, 1), strict=True)
            sums = [(rows.float() @ weight.float().t()).int() for rows, weight in parts]
            return torch.stack(sums).sum(0).float() * self.scales_N
        # A single row is computed as two rows, because oneDNN takes ten times as long for one.
        if int8_RC.shape[0] < 2:
            if not int8_RC.shape[0]:
                return torch.empty(0, self.out_features)
            return self._products(int8_RC.expand(2, -1))[:1]
        if self.prepacked is None:
            self.prepacked = torch.ops.onednn.qlinear_prepack(self.weight, None)
        return torch.ops.onednn.qlinear_pointwise.tensor(  # type: ignore[no-any-return]
            int8_RC.view(torch.uint8) ^ _ZERO_POINT,
            self.one,
            self.zero_point,
            self.prepacked,
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


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., C) as whole numbers that fit into int8, and the scales (..., 1) with which to multiply them."""
    scales = (x.abs().amax(-1, keepdim=True) / _LARGEST_INT8).clamp_min(_LEAST_SCALE)
    return (x * scales.reciprocal()).round(), scales


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN multiplies int8 on this processor without sums that overflow 16 bits."""
    # Older releases of PyTorch do not have this function.
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_sums = any(has.get(name) for name in ("avx_vnni", "avx512_vnni", "amx_int8"))
    return has_sums and torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")


def check_quantised(precision: str, device: torch.device) -> None:
    """Raises UserInputError unless our int8 and 4-bit layers can run on this device."""
    if device.type != "cpu":
        raise UserInputError(
            f"{precision} runs on CPUs only, not on {device.type}: choose device 'cpu', or another dtype."
        )
