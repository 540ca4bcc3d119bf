"""The moving mean of the weights that a run trains: what it scores and leaves behind, where the recipe wants one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# The first steps count for more, so that a mean forgets its start: after n steps the decay is at most n / (n + 9).
_SLOW_START = 9


class MovingMean:
    """An exponential moving average of parameters, by name; each process keeps that of the parts it holds.

    After step n the mean moves by 1 - min(decay, n / (n + 9)) of its way to the weights. With a decay of 0 there is
    none: `tensors` is empty and nothing changes places. It begins as the weights are when it is made.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = dict(parameters) if decay else {}, decay
        self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after that step, counted from 1."""
        share = 1 - min(self._decay, step / (step + _SLOW_START))
        for name, parameter in self._parameters.items():
            _part(self.tensors[name]).lerp_(_part(parameter), share)

    @torch.no_grad()
    def trade_places(self) -> None:
        """Put the mean into the parameters and their weights into `tensors`; the next call undoes it."""
        for name, parameter in self._parameters.items():
            mean, weights = _part(self.tensors[name]), _part(parameter)
            kept = weights.clone()
            weights.copy_(mean)
            mean.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the parameters hold the mean."""
        self.trade_places()
        try:
            yield
        finally:
            self.trade_places()


def _part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in its own memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
