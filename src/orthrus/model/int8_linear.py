"""A linear in int8, by PyTorch's own kernels: what quantised models run eagerly."""

import torch
from torch import Tensor, nn

from orthrus.errors import UserInputError

_LARGEST_INT8 = 127
_LEAST_SCALE = 1e-12


class Int8Linear(nn.Module):
    """A linear with int8 weights, scaled per output, and rows rounded to int8 by a scale of their own.

    One scale per row: a row's result does not depend on the rows beside it, which losslessness needs. The
    products are summed in whole numbers, so it does not depend on their number either. Returns the dtype of
    its input. Raises UserInputError for weights that are on no CPU, or where PyTorch lacks oneDNN.

    A single row is computed twice: for one alone oneDNN takes ten times as long.
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
        int8_RC = (rows_RC * scales_R1.reciprocal()).round().to(torch.int8)
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
        if int8_RC.shape[0] < 2:
            if not int8_RC.shape[0]:
                return torch.empty(0, self.out_features)
            return self._products(int8_RC.expand(2, -1))[:1]
        return torch.ops.onednn.qlinear_pointwise.tensor(  # type: ignore[no-any-return]
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


def check_int8(device: torch.device) -> None:
    """UserInputError unless int8 linears can run on this device here."""
    if device.type != "cpu":
        raise UserInputError(
            f"int8 runs on CPUs only, not on {device.type}: choose device 'cpu', or leave int8 out."
        )
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        raise UserInputError("int8 needs a PyTorch with oneDNN: leave it out here.")
