"""A linear layer with 4-bit weights, by PyTorch's own kernels: the reference for the compiled one."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from orthrus.model.int8_linear import rounded

GROUP = 32
"""Number of inputs that share a step and a smallest value, as in GGUF's Q4_0 and Q4_1."""
_MOST, _EXACT = 15, 1e-3


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights, and rows that are rounded to int8 with a scale for each group of 32 inputs.

    A weight is its group's least value plus 0 to 15 steps; both are float16. Weights that lie on such a grid already,
    such as those of a GGUF file of type Q4_0 or Q4_1, stay as they are. Others are rounded to fifteen steps between the
    smallest and the largest of their group. A row's result does not depend on other rows. Returns the dtype of its
    input. Every call unpacks the weights, which is slow.

    Letters: N outputs, C inputs, G groups of inputs, 32 inputs of a group, L groups without a grid so far.
    """

    packed: Tensor
    steps_NG: Tensor
    least_NG: Tensor

    def __init__(
        self, four_bits_NC: Tensor, steps_NG: Tensor, least_NG: Tensor, bias_N: Tensor | None
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = four_bits_NC.shape
        packed = four_bits_NC[:, ::2] | four_bits_NC[:, 1::2] << 4
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("steps_NG", steps_NG, persistent=False)
        self.register_buffer("least_NG", least_NG, persistent=False)
        self.register_buffer("bias", bias_N, persistent=False)

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int4Linear":
        """A linear layer's weights, rounded if needed. Raises ValueError if its inputs are not whole groups."""
        if not fits_groups(linear):
            raise ValueError(f"{linear.in_features} inputs are no groups of {GROUP}")
        groups_NG32 = linear.weight.detach().float().unflatten(1, (-1, GROUP))
        steps_NG, least_NG = _grids(groups_NG32)
        # If all weights of a group are equal, any step is right.
        per_step_NG = torch.where(steps_NG == 0, 0.0, 1.0 / steps_NG.float())
        above_NG32 = (groups_NG32 - least_NG.float()[..., None]) * per_step_NG[..., None]
        four_bits_NC = above_NG32.round().clamp(0, _MOST).to(torch.uint8).flatten(1)
        return cls(four_bits_NC, steps_NG, least_NG, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        whole_RG32, scales_RG1 = rounded(x.flatten(0, -2).float().unflatten(1, (-1, GROUP)))
        rounded_RC = (whole_RG32 * scales_RG1).flatten(1)
        out: Tensor = linear(rounded_RC, self.unpacked()).to(x.dtype).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias  # type: ignore[operator]

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights 0 to 15 (N, C) uint8; steps and least values (N, G) float16."""
        four_bits_NC = torch.stack((self.packed & _MOST, self.packed >> 4), dim=2).flatten(1)
        return four_bits_NC, self.steps_NG, self.least_NG

    def unpacked(self) -> Tensor:
        """The weights (N, C) in float32."""
        four_bits_NC, steps_NG, least_NG = self.parts()
        groups_NG32 = four_bits_NC.unflatten(1, (-1, GROUP)).float()
        weights_NG32: Tensor = groups_NG32 * steps_NG.float()[..., None] + least_NG.float()[..., None]
        return weights_NG32.flatten(1)


def fits_groups(linear: nn.Linear) -> bool:
    """Whether a linear layer's inputs are whole groups."""
    return linear.in_features % GROUP == 0


def _grids(groups_NG32: Tensor) -> tuple[Tensor, Tensor]:
    """Steps and least values (N, G), float16, of the grids on which groups lie, or else of fifteen steps."""
    low_NG, high_NG = groups_NG32.aminmax(dim=-1)
    counts_NG = torch.full_like(low_NG, _MOST)
    # A few rows show whether the weights lie on grids at all.
    if (_counts(groups_NG32[:64]) > 0).float().mean() > 0.5:
        counts_NG = _counts(groups_NG32)
        counts_NG[counts_NG == 0] = _MOST
    steps_NG = ((high_NG - low_NG) / counts_NG).half()
    # The grid may begin below the smallest weight. One of its possible beginnings is usually a float16 number.
    best_NG = low_NG.half()
    error_NG = (best_NG.float() - low_NG).abs()
    for below in range(1, _MOST):
        start_NG = low_NG - below * steps_NG.float()
        error = (start_NG.half().float() - start_NG).abs()
        better = (error < error_NG) & (counts_NG + below <= _MOST)
        best_NG, error_NG = (
            torch.where(better, start_NG.half(), best_NG),
            torch.where(better, error, error_NG),
        )
    return steps_NG, best_NG


def _counts(groups_NG32: Tensor) -> Tensor:
    """For each group on a grid, the number of steps (at most 15) from its smallest to its largest weight; else 0."""
    low_NG1, high_NG1 = (each[..., None] for each in groups_NG32.aminmax(dim=-1))
    counts_NG = torch.zeros_like(low_NG1[..., 0])
    left_NG = torch.ones_like(counts_NG, dtype=torch.bool)
    for count in range(_MOST, 0, -1):
        above_L32 = groups_NG32[left_NG] - low_NG1[left_NG]
        width_L1 = (high_NG1 - low_NG1)[left_NG]
        places_L32 = above_L32 * (count / width_L1.clamp_min(torch.finfo(torch.float32).tiny))
        found_L = ((places_L32 - places_L32.round()).abs() < _EXACT).all(-1)
        counts_NG[left_NG] = torch.where(found_L, float(count), 0.0)
        left_NG[left_NG.clone()] = ~found_L
        if not left_NG.any():
            break
    return counts_NG
