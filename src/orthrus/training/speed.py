"""Measures the operations of a step, and the best rate of the machine."""

from time import perf_counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SIZES = (1024, 2048)
_SECONDS = 0.06
_CLEARLY = 1.25
"""How many times as fast float32 must be before the user gets advice to change the recipe."""


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


def dtype_advice(dtype: torch.dtype, device: torch.device, peak: float) -> str | None:
    """Advice for the user of a CPU that multiplies float32 faster than bfloat16, or None.

    dtype: of the frozen base. peak: its `matmul_peak` on that device. For bfloat16 this function times float32 too.
    """
    if dtype != torch.bfloat16 or device.type != "cpu":
        return None
    ratio = matmul_peak(torch.float32, device) / peak
    if ratio < _CLEARLY:
        return None
    return (
        f"this processor multiplies float32 {ratio:.1f} times as fast as bfloat16: with dtype=float32 a run takes "
        "less time and more memory"
    )


def _wait(result: torch.Tensor) -> None:
    if result.is_cuda:
        torch.cuda.synchronize()


class FlopCounter(TorchDispatchMode):
    """A context that adds up the operations of matrix products and attentions, backward included.

    The formulas are torch's. Its own FlopCounterMode follows modules through autograd hooks, which do not work with a
    loss that computes its own gradients.
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
