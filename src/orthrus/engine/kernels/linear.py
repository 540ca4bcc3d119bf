"""Linears for the few rows of a pass on a CPU, by kernels of our own: `linear.cpp` says why and how."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from orthrus.model.int8_linear import Int8Linear

TILE_WIDTH = 32
"""Outputs that oneDNN's kernel takes at once."""
_TILE_DEPTH = {torch.bfloat16: 2, torch.int8: 4}
"""Inputs that lie side by side for it."""


@cache
def has_tiles(dtype: torch.dtype) -> bool:
    """Whether oneDNN's kernels multiply numbers of this dtype here, and rightly: with AMX, mostly."""
    if dtype not in _TILE_DEPTH or not torch.backends.mkldnn.is_available():
        return False
    # Whole numbers, of which the largest in a row is 127: int8 rounds nothing.
    weight_NC = (torch.arange(TILE_WIDTH * 70).view(TILE_WIDTH, 70) % 11 - 5.0).to(dtype)
    x = (torch.arange(17 * 70).view(17, 70) % 13 - 6.0).index_fill(1, torch.tensor([0]), 127.0)
    scales = torch.ones(TILE_WIDTH) if dtype == torch.int8 else None
    given = x.to(dtype) if dtype.is_floating_point else x
    packed = _tiles(weight_NC)
    try:
        for rows, expected in ((given, x), (given[:1], x[:1])):
            out = torch.ops.orthrus.few_rows_linear(rows, packed, scales, None, TILE_WIDTH)
            if not torch.equal(out, (expected @ weight_NC.float().T).to(given.dtype)):
                return False
    except RuntimeError:
        return False
    return True


def pack(weight_NC: Tensor, *, tiles: bool | None = None) -> Tensor:
    """A weight of float32, bfloat16 or int8, laid out for the kernel; tiles: left out, where they run."""
    if tiles is None:
        # bfloat16 rows are taken as they come, two inputs at a time.
        fits = weight_NC.dtype == torch.int8 or weight_NC.shape[1] % 2 == 0
        tiles = fits and has_tiles(weight_NC.dtype)
    if tiles:
        return _tiles(weight_NC)
    width = torch.ops.orthrus.plain_width()
    blocks: Tensor = _filled(weight_NC, width).unflatten(0, (-1, width))
    return blocks.transpose(1, 2).contiguous()


def _tiles(weight_NC: Tensor) -> Tensor:
    depth = _TILE_DEPTH[weight_NC.dtype]
    filled = _filled(weight_NC, TILE_WIDTH, depth)
    blocks: Tensor = filled.unflatten(0, (-1, TILE_WIDTH)).unflatten(2, (-1, depth))
    return blocks.transpose(1, 2).contiguous()


def _filled(weight_NC: Tensor, width: int, depth: int = 1) -> Tensor:
    outputs, inputs = weight_NC.shape
    missing = (0, -inputs % depth, 0, -outputs % width)
    return pad(weight_NC, missing) if any(missing) else weight_NC


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
