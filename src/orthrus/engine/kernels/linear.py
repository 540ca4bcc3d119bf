"""Linears for the few rows of a pass on a CPU, by kernels of our own: `linear.cpp` says why and how."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from orthrus.model.int8_linear import Int8Linear
from orthrus.model.twin import RowSplit, Twin

_TILE_WIDTH, _TILE_BYTES, _NUMBER_BYTES = 32, 64, 4
"""Of a block for AMX (`tiles.h`): its outputs; a step of its inputs; what lies side by side of an output."""


def has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 and int8 numbers by AMX, and the kernels were made for it."""
    return bool(torch.ops.orthrus.has_tiles())


def pack(weight_NC: Tensor, *, tiles: bool | None = None) -> Tensor:
    """A weight of float32, bfloat16 or int8, laid out for the kernel; tiles: left out, where they run."""
    if tiles is None:
        tiles = weight_NC.dtype != torch.float32 and has_tiles()
    width = _TILE_WIDTH if tiles else torch.ops.orthrus.plain_width()
    step = _TILE_BYTES // weight_NC.itemsize if tiles else 1
    outputs, inputs = weight_NC.shape
    missing = (0, -inputs % step, 0, -outputs % width)
    filled = pad(weight_NC, missing) if any(missing) else weight_NC
    blocks: Tensor = filled.unflatten(0, (-1, width))
    if tiles:
        blocks = blocks.unflatten(2, (-1, _NUMBER_BYTES // weight_NC.itemsize))
    return blocks.transpose(1, 2).contiguous()


class FewRowsLinear(nn.Module):
    """A linear of float32, bfloat16 or int8 weights; a row's result does not depend on the rows beside it.

    scales_N: of int8 weights, whose rows are rounded as `Int8Linear` rounds them. x: (..., in) of the
    weight's dtype, of any for int8; returns (..., out) of the same. `load_kernels` must have been called.
    """

    def __init__(
        self,
        weight_NC: Tensor,
        bias_N: Tensor | None = None,
        scales_N: Tensor | None = None,
        *,
        tiles: bool | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NC.shape
        packed = pack(weight_NC, tiles=tiles)
        filled = packed.shape[0] * packed.shape[2] - self.out_features
        self.is_int8 = scales_N is not None
        # The kernel adds the bias in float32; after int8 it is added as `Int8Linear` does.
        in_kernel = None if bias_N is None or self.is_int8 else pad(bias_N.float(), (0, filled))
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer(
            "scales", None if scales_N is None else pad(scales_N, (0, filled)), persistent=False
        )
        self.register_buffer("kernel_bias", in_kernel, persistent=False)
        self.register_buffer("bias", bias_N if self.is_int8 else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        given = x.float() if self.is_int8 else x
        out: Tensor = torch.ops.orthrus.few_rows_linear(
            given, self.weight, self.scales, self.kernel_bias, self.out_features
        ).to(x.dtype)
        return out if self.bias is None else out + self.bias  # type: ignore[operator]


class FewRowsTwin(Twin):
    """A twin of two such linears: both weights are read in one go. x: (1, T, in)."""

    def __init__(self, ar: FewRowsLinear, diffusion: FewRowsLinear, split: RowSplit) -> None:
        super().__init__(ar, diffusion, split)
        assert ar.bias is None and diffusion.bias is None, "added after the product"

    def forward(self, x: Tensor) -> Tensor:
        num_ar, num_diffusion = self._num_rows(x)
        if num_ar == 0 or num_diffusion == 0:
            return super().forward(x)
        ar, diffusion = self.ar, self.diffusion
        out: Tensor = torch.ops.orthrus.few_rows_twin_linear(
            x.float() if ar.is_int8 else x,
            num_ar,
            *(ar.weight, ar.scales, ar.kernel_bias),
            *(diffusion.weight, diffusion.scales, diffusion.kernel_bias),
            ar.out_features,
        )
        return out.to(x.dtype)


def fast_twin(ar: nn.Module | None, diffusion: nn.Module | None, split: RowSplit) -> Twin | None:
    """A twin of two linears made by `fast_linear`, in one go where they are alike; None without them."""
    if not isinstance(ar, FewRowsLinear) or not isinstance(diffusion, FewRowsLinear):
        return None
    alike = ar.weight.shape == diffusion.weight.shape and ar.weight.dtype == diffusion.weight.dtype
    if alike and ar.bias is None and diffusion.bias is None:
        return FewRowsTwin(ar, diffusion, split)
    return Twin(ar, diffusion, split)


def fast_linear(linears: Sequence[nn.Module]) -> FewRowsLinear | None:
    """One linear for several that read the same input, their outputs side by side, laid out for few rows.

    None unless all of them are plain linears of one dtype that the kernels know, or all int8 ones.
    """
    if all(type(linear) is Int8Linear for linear in linears):
        scales_N = torch.cat([linear.scales_N for linear in linears])  # type: ignore[misc]
        weight_NC = torch.cat([linear.int8_weight() for linear in linears])  # type: ignore[operator]
        return FewRowsLinear(weight_NC, _joined_bias(linears), scales_N)
    if not all(_is_known(linear) for linear in linears):
        return None
    weights = [linear.weight.detach() for linear in linears]  # type: ignore[operator]
    if len({weight.dtype for weight in weights}) > 1:
        return None
    return FewRowsLinear(torch.cat(weights), _joined_bias(linears))


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


def _is_known(linear: nn.Module) -> bool:
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype in (torch.float32, torch.bfloat16)
    )
