"""Training steps of tiny models, measured: what autograd saves, what lives at the peak, what is multiplied."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from tests.packed import pack
from tests.tiny import tiny_dual, tiny_prompt
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from orthrus.model.dual_view import DualView
from orthrus.training.blocks import BlockBatch, BlockLayout, draw_blocks
from orthrus.training.corpus import Sample
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.plan import Shape, Work
from orthrus.training.plan_shape import shape_of
from orthrus.training.recipe import ActivationKind
from orthrus.training.speed import FlopCounter

LENGTH, ANCHORS, SIZE, SEQUENCES = 64, 16, 8, 2


@dataclass(frozen=True)
class Measured:
    """One step. saved: bytes that autograd keeps, weights and the copies of weights left out."""

    shape: Shape
    work: Work
    saved: int
    flops: int


class LiveBytes(TorchDispatchMode):
    """While it is entered, the most bytes at a time of tensors that were made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._live = {key: value for key, value in self._live.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def training(
    name: str,
    dtype: torch.dtype,
    *,
    trains_twins: bool = True,
    activations: ActivationKind = "none",
    **variant: Any,
) -> tuple[TrainingPass, BlockBatch]:
    """A pass over two sequences, each one dialogue, and the batch."""
    dual = tiny_dual(name, block_size=SIZE, disturb=0.1, **variant)
    dual.base.to(dtype)  # type: ignore[arg-type]
    for path, parameter in dual.view_parameters().items():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(trains_twins or path.startswith("repair."))
    samples = [Sample(tuple(tiny_prompt(4, i)), tuple(tiny_prompt(60, 9 + i)), "t") for i in range(SEQUENCES)]
    sequences = pack(samples, LENGTH)
    return TrainingPass(dual, Objective(), "dense", activations), draw_blocks(
        sequences, list(range(SEQUENCES)), ANCHORS, BlockLayout(block_size=SIZE)
    )


def step(passed: TrainingPass, batch: BlockBatch, dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = passed(batch).loss
    loss.backward()


def measure(
    name: str,
    dtype: torch.dtype,
    *,
    trains_twins: bool = True,
    activations: ActivationKind = "none",
    **variant: Any,
) -> Measured:
    passed, batch = training(name, dtype, trains_twins=trains_twins, activations=activations, **variant)
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []
    weights = _weights(passed.dual)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        copy = any(tensor.shape in (shape, shape[::-1]) for shape in weights.values())
        if storage.data_ptr() not in weights and not copy:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(passed, batch, dtype)
    with FlopCounter() as counter:
        step(passed, batch, dtype)
    return Measured(
        shape_of(passed.dual, trains_twins),
        replace(work_of(batch, dtype), recomputed=activations == "layer"),
        sum(sizes.values()),
        counter.total,
    )


def work_of(batch: BlockBatch, dtype: torch.dtype) -> Work:
    from orthrus.training.block_attention import block_groups

    groups = block_groups(batch)
    read = sum((g.high - g.low) * (g.end - g.first) for g in groups) / (SEQUENCES * ANCHORS)
    targets = int(batch.valid_BNJ.sum()) / (SEQUENCES * ANCHORS)
    return Work(
        micro_batch_size=SEQUENCES,
        sequence_length=LENGTH,
        num_anchors=ANCHORS,
        block_size=SIZE,
        targets=targets,
        read_rows=read,
        dtype_bytes=dtype.itemsize,
        attention="dense",
    )


def _weights(dual: DualView) -> dict[int, torch.Size]:
    every = [*dual.base.parameters(), *dual.view_parameters().values()]
    return {p.untyped_storage().data_ptr(): p.shape for p in every if p.ndim > 1}
