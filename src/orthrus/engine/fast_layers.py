"""A decoder layer optimised for few rows: linear layers are packed, and those with the same input are merged."""

import copy
from typing import Any

from torch import Tensor, nn

from orthrus.kernels.linear import fast_linear, fast_twin
from orthrus.model.twin import Twin

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that usually have the same input, by their names in transformers. If the stock code calls one of them
on another tensor, the joined layer is computed again, which costs only time.
"""


class _Joined:
    """A linear layer of several parts, with its last input and outputs while a layer's code is being compiled."""

    def __init__(self, linear: nn.Module, sizes: list[int]) -> None:
        self.linear, self.sizes = linear, sizes
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def part(self, index: int, x: Tensor) -> Tensor:
        if self._input is not x:
            self._input, self._outputs = x, self.linear(x).split(self.sizes, dim=-1)
        return self._outputs[index]


class _Part(nn.Module):
    """One part of a joined linear layer. The first part registers its tensors."""

    def __init__(self, joined: _Joined, index: int) -> None:
        super().__init__()
        # The sizes distinguish kinds of layers that are joined differently.
        self._joined, self.index, self.sizes = joined, index, str(joined.sizes)
        if index == 0:
            self.linear = joined.linear

    def forward(self, x: Tensor) -> Tensor:
        return self._joined.part(self.index, x)


def fast_layer(layer: nn.Module) -> nn.Module:
    """A copy of a layer that computes the same, up to rounding.

    Linear layers are packed, and norms and biases are copied. Only a matrix that cannot be packed is shared.
    """
    shared: dict[int, Any] = {
        id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers()) if tensor.ndim > 1
    }
    twin: nn.Module = copy.deepcopy(layer, shared)
    for parent in list(twin.modules()):
        for names in _JOINED:
            members = [getattr(parent, name, None) for name in names]
            joined = _joined_linear(members)
            if joined is not None:
                for index, name in enumerate(names):
                    setattr(parent, name, _Part(joined, index))
    _pack(twin)
    return twin


def _pack(parent: nn.Module) -> None:
    """Pack the remaining linear layers, both sides of a twin together if possible."""
    for name, child in list(parent.named_children()):
        fast: nn.Module | None = None
        if type(child) is Twin:
            fast = fast_twin(fast_linear([child.ar]), fast_linear([child.diffusion]), child.split)
        else:
            fast = fast_linear([child])
        if fast is None:
            _pack(child)
        else:
            setattr(parent, name, fast)


def _joined_linear(members: list[Any]) -> _Joined | None:
    """The joined linear layer, or None unless all members exist, are of one kind, and can be joined."""
    if all(type(member) is Twin and member.row_dim == -2 for member in members):
        ar = fast_linear([member.ar for member in members])
        diffusion = fast_linear([member.diffusion for member in members])
        twin = fast_twin(ar, diffusion, members[0].split)
        return None if twin is None else _Joined(twin, [member.ar.out_features for member in members])
    if not all(isinstance(member, nn.Module) for member in members):
        return None
    linear = fast_linear(members)
    return None if linear is None else _Joined(linear, [member.out_features for member in members])
