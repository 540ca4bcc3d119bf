"""How fast a step could be: the arithmetic that it does, and what the machine does at best."""

from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SIZES = (1024, 2048)
_SECONDS = 0.06


def matmul_peak(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Best measured rate of a square matrix product, in operations (2 n^3) a second."""
    best = 0.0
    for size in _SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        _wait(a @ b)
        spent, began = 0.0, perf_counter()
        while spent < _SECONDS:
            started = perf_counter()
            _wait(a @ b)
            best = max(best, 2 * size**3 / (perf_counter() - started))
            spent = perf_counter() - began
    return best


def _wait(result: torch.Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize()


class FlopCounter(TorchDispatchMode):
    """While it is entered, adds up the operations of matrix products and attentions, backward included.

    torch's own FlopCounterMode follows modules through autograd hooks, which a loss with gradients of its own
    does not take; the formulas are torch's.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out
