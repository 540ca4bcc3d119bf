"""Linear layers for passes of few rows on a CPU, by our own kernels; `linear.cpp` says why and how."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from orthrus.model.int4_linear import Int4Linear
from orthrus.model.int8_linear import Int8Linear
from orthrus.model.twin import RowSplit, Twin

_TILE_WIDTH, _TILE_BYTES, _NUMBER_BYTES = 32, 64, 4
"""Sizes of a block for AMX (`tiles.h`): outputs, inputs of one step, inputs of one output that are stored side by
side.
"""


def has_tiles() -> bool:
    """Whether the processor has AMX for bfloat16 and int8, and the kernels were compiled for it."""
    return bool(torch.ops.orthrus.has_tiles())


def pack(weight_NC: Tensor, *, tiles: bool | None = None) -> Tensor:
    """A weight of float32, bfloat16 or int8, laid out for the kernel; tiles: left out, where they run."""
    if tiles is None:
        tiles = weight_NC.dtype != torch.float32 and has_tiles()
    floats, bfloats, dots, _ = torch.ops.orthrus.block_widths()
    of_bfloat16, of_int8 = torch.ops.orthrus.interleaved()
    width, interleaved = {torch.bfloat16: (bfloats, of_bfloat16), torch.int8: (dots, of_int8)}.get(
        weight_NC.dtype, (floats, 1)
    )
    step = interleaved
    if tiles:
        width, step = _TILE_WIDTH, _TILE_BYTES // weight_NC.itemsize
        interleaved = _NUMBER_BYTES // weight_NC.itemsize
    elif interleaved == _NUMBER_BYTES:
        # The kernel takes four weights side by side without signs.
        weight_NC = weight_NC ^ -128
    blocks: Tensor = _filled(weight_NC, width, step).unflatten(0, (-1, width))
    if interleaved > 1:
        blocks = blocks.unflatten(2, (-1, interleaved))
    return blocks.transpose(1, 2).contiguous()


def pack_groups(four_bits_NC: Tensor, steps_NG: Tensor, least_NG: Tensor) -> Tensor:
    """Weights 0 to 15 (uint8) and their groups' float16 steps and smallest values, laid out for the kernel."""
    width = torch.ops.orthrus.block_widths()[3]

    def blocks(each: Tensor) -> Tensor:
        parts: Tensor = _filled(each, width, 1).unflatten(0, (-1, width))
        return parts

    # (blocks, width, groups, half, quarter, 4): halves of a group share bytes.
    halves = blocks(four_bits_NC).unflatten(2, (-1, 2, 4, 4))
    bytes_BWG44 = halves[:, :, :, 0] | halves[:, :, :, 1] << 4
    ranges = [blocks(each).transpose(1, 2).contiguous().view(torch.uint8) for each in (steps_NG, least_NG)]
    return torch.cat([*ranges, bytes_BWG44.permute(0, 2, 3, 1, 4).flatten(2)], dim=2)


def _filled(weight_NC: Tensor, width: int, step: int) -> Tensor:
    """Zeros after the last output and input, up to whole blocks and steps."""
    missing = (0, -weight_NC.shape[1] % step, 0, -weight_NC.shape[0] % width)
    return pad(weight_NC, missing) if any(missing) else weight_NC


class FewRowsLinear(nn.Module):
    """A linear layer with packed weights (`of`). A row's result does not depend on the other rows.

    x: (..., in) of the weight's dtype, of any where rows are rounded; returns (..., out) of the same.
    `load_kernels` must have been called.
    """

    def __init__(
        self, packed: Tensor, sizes: tuple[int, int], bias_N: Tensor | None, scales_N: Tensor | None = None
    ) -> None:
        """sizes: out and in; scales_N: of int8 weights, whose rows are rounded as by `Int8Linear`."""
        super().__init__()
        self.out_features, self.in_features = sizes
        self.rounds_rows = packed.dtype in (torch.int8, torch.uint8)
        filled = packed.shape[0] * _block_width(packed) - self.out_features
        # The kernel adds the bias in float32; after rounded rows it is added as the eager linears do.
        in_kernel = None if bias_N is None or self.rounds_rows else pad(bias_N.float(), (0, filled))
        self.register_buffer("weight", packed, persistent=False)
        self.register_buffer(
            "scales", None if scales_N is None else pad(scales_N, (0, filled)), persistent=False
        )
        self.register_buffer("kernel_bias", in_kernel, persistent=False)
        self.register_buffer("bias", bias_N if self.rounds_rows else None, persistent=False)

    @classmethod
    def of(cls, linears: Sequence[nn.Module], *, tiles: bool | None = None) -> "FewRowsLinear":
        """Merge linear layers of one kind with the same input; their outputs are side by side."""
        bias_N = _joined_bias(linears)
        outputs = [int(linear.out_features) for linear in linears]  # type: ignore[arg-type]
        sizes = sum(outputs), int(linears[0].in_features)  # type: ignore[arg-type]
        if isinstance(linears[0], Int4Linear):
            parts = [linear.parts() for linear in linears]  # type: ignore[operator]
            return cls(pack_groups(*map(torch.cat, zip(*parts, strict=True))), sizes, bias_N)
        weight_NC = torch.cat([linear.weight.detach() for linear in linears])  # type: ignore[operator]
        scales_N = None
        if isinstance(linears[0], Int8Linear):
            scales_N = torch.cat([linear.get_buffer("scales_N") for linear in linears])
        return cls(pack(weight_NC, tiles=tiles), sizes, bias_N, scales_N)

    def forward(self, x: Tensor) -> Tensor:
        given = x.float() if self.rounds_rows else x
        out: Tensor = torch.ops.orthrus.few_rows_linear(
            given, self.weight, self.scales, self.kernel_bias, self.out_features
        ).to(x.dtype)
        return out if self.bias is None else out + self.bias  # type: ignore[operator]


def _block_width(packed: Tensor) -> int:
    if packed.dtype == torch.uint8:
        return int(torch.ops.orthrus.block_widths()[3])
    return packed.shape[2]


class FewRowsTwin(Twin):
    """A twin of two such linear layers, both computed in one call. x: (1, T, in)."""

    def __init__(self, ar: FewRowsLinear, diffusion: FewRowsLinear, split: RowSplit) -> None:
        super().__init__(ar, diffusion, split)
        assert ar.bias is None and diffusion.bias is None, "added after the product"

    def forward(self, x: Tensor) -> Tensor:
        num_ar, num_diffusion = self._num_rows(x)
        if num_ar == 0 or num_diffusion == 0:
            return super().forward(x)
        ar, diffusion = self.ar, self.diffusion
        out: Tensor = torch.ops.orthrus.few_rows_twin_linear(
            x.float() if ar.rounds_rows else x,
            num_ar,
            *(ar.weight, ar.scales, ar.kernel_bias),
            *(diffusion.weight, diffusion.scales, diffusion.kernel_bias),
            ar.out_features,
        )
        return out.to(x.dtype)


def fast_twin(ar: nn.Module | None, diffusion: nn.Module | None, split: RowSplit) -> Twin | None:
    """A twin of linear layers made by `fast_linear`, computed in one call if both have the same kind; None without
    them.
    """
    if not isinstance(ar, FewRowsLinear) or not isinstance(diffusion, FewRowsLinear):
        return None
    takes_alike = ar.weight.dtype == diffusion.weight.dtype or (ar.rounds_rows and diffusion.rounds_rows)
    if takes_alike and ar.bias is None and diffusion.bias is None:
        return FewRowsTwin(ar, diffusion, split)
    return Twin(ar, diffusion, split)


def fast_linear(linears: Sequence[nn.Module]) -> FewRowsLinear | None:
    """Merge linear layers with the same input into one, with their outputs side by side, laid out for few rows.

    None unless all are plain linear layers of one dtype that the kernels support, or quantised ones of one kind.
    """
    quantised = {type(linear) for linear in linears} in ({Int8Linear}, {Int4Linear})
    if not quantised and not all(_is_known(linear) for linear in linears):
        return None
    if not quantised and len({linear.weight.dtype for linear in linears}) > 1:
        return None
    return FewRowsLinear.of(linears)


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
