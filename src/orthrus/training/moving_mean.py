"""The moving mean of the trained weights, which a run evaluates and keeps if the recipe asks for it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

# The first steps have more weight, so that the mean forgets its start: in step n the decay is at most n / (n + 9).
_SLOW_START = 9


class MovingMean:
    """An exponential moving average of parameters, by name. Each process keeps the part that it holds.

    It starts as the current weights. After step n it moves towards the weights by the share
    1 - min(decay, n / (n + 9)). With a decay of 0 there is no mean: `tensors` is empty, and no method has an effect.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = dict(parameters) if decay else {}, decay
        self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the mean with the weights after that step, counted from 1."""
        share = 1 - min(self._decay, step / (step + _SLOW_START))
        for name, parameter in self._parameters.items():
            _part(self.tensors[name]).lerp_(_part(parameter), share)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the parameters' weights with the mean in `tensors`. The next call swaps them back."""
        for name, parameter in self._parameters.items():
            mean, weights = _part(self.tensors[name]), _part(parameter)
            kept = weights.clone()
            weights.copy_(mean)
            mean.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the parameters hold the mean."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def _part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
