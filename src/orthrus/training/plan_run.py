"""Plans a whole run: a recipe on some GPUs, whether it fits, and what to change if it does not."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from orthrus.errors import UserInputError
from orthrus.training.flex_blocks import pick_attention
from orthrus.training.plan import (
    BYTES,
    Memory,
    Shape,
    Work,
    gathered_bytes,
    hours,
    kept_bytes,
    memory,
    pass_flops,
)
from orthrus.training.recipe import TrainConfig

_LEAST_ANCHORS = 8
_LOW_RANK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The devices of a run.

    bytes_each: memory of a device. peak: operations per second of a device in the recipe's dtype. utilisation: the
    share of the peak that a run reaches.
    """

    num_gpus: int
    bytes_each: float
    peak: float
    utilisation: float

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise UserInputError(f"--gpus must be at least 1, not {self.num_gpus}.")
        if not 0 < self.bytes_each < math.inf or not 0 < self.peak < math.inf:
            raise UserInputError("--gpu-memory and --peak-tflops must be positive numbers.")
        if not 0 < self.utilisation <= 1:
            raise UserInputError(f"--utilisation must lie above 0 and at most at 1, not {self.utilisation}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The needs of a run.

    gathered: bytes while a sharded run holds all weights, 0 for other runs. targets: of a step, at most. num_steps,
    total_flops, hours: None if the length of the corpus is unknown.
    """

    shape: Shape
    work: Work
    memory: Memory
    gathered: int
    tokens: int
    targets: int
    step_flops: float
    num_steps: int | None
    total_flops: float | None
    hours: float | None
    state_bytes: int

    @property
    def peak_bytes(self) -> int:
        return max(self.memory.total, self.gathered)


def plan_run(shape: Shape, recipe: TrainConfig, machine: Machine, num_sequences: int | None) -> Plan:
    """The plan of a recipe for its base and view. num_sequences: of its packed corpus, None if there is none yet.

    Raises UserInputError for a batch that leaves processes without a sequence.
    """
    processes = machine.num_gpus
    if recipe.batch_size < processes:
        raise UserInputError(
            f"batch_size {recipe.batch_size} is less than a sequence for each of {processes} processes; raise it."
        )
    work = work_of(recipe, shape)
    sharded, averaged = recipe.sharding == "fsdp2" and processes > 1, bool(recipe.ema_decay)
    sequence_flops = pass_flops(shape, replace(work, micro_batch_size=1))
    num_steps = recipe.steps or (
        None if num_sequences is None else max(1, round(recipe.epochs * num_sequences / recipe.batch_size))
    )
    # All processes wait for the one with the most sequences.
    waited = math.ceil(recipe.batch_size / processes) * processes * sequence_flops
    return Plan(
        shape=shape,
        work=work,
        memory=memory(shape, work, processes=processes, sharded=sharded, averaged=averaged),
        gathered=gathered_bytes(shape, work, processes=processes, averaged=averaged) if sharded else 0,
        tokens=recipe.batch_size * recipe.sequence_length,
        targets=round(recipe.batch_size * recipe.num_anchors * work.targets),
        step_flops=recipe.batch_size * sequence_flops,
        num_steps=num_steps,
        total_flops=None if num_steps is None else num_steps * recipe.batch_size * sequence_flops,
        hours=None
        if num_steps is None
        else hours(
            num_steps * waited, peak=machine.peak, utilisation=machine.utilisation, processes=processes
        ),
        state_bytes=4 * shape.view_parameters + kept_bytes(averaged=averaged) * shape.trained_parameters,
    )


def work_of(recipe: TrainConfig, shape: Shape) -> Work:
    """The work of a pass of the recipe on a GPU, if each sequence holds one dialogue, which is the largest work."""
    import torch

    attention = pick_attention(recipe.attention, torch.device("cuda"), shape.head_dim)
    # If only a share of the blocks leaves out targets, assume that all targets have weight.
    without = recipe.first_target if recipe.clean_share == 1 else 0
    length = recipe.sequence_length
    return Work(
        micro_batch_size=min(recipe.micro_batch_size, recipe.batch_size),
        sequence_length=length,
        num_anchors=recipe.num_anchors,
        block_size=recipe.block_size,
        targets=recipe.block_size - 1 - without,
        # Anchors are anywhere in a sequence. The dense code multiplies by the whole sequence in any case.
        read_rows=length if attention == "dense" else length / 2,
        rejected_share=recipe.rejected_share,
        dtype_bytes=BYTES[recipe.dtype],
        attention=attention,
        recomputed=recipe.activations == "layer",
    )


def what_to_change(recipe: TrainConfig, num_gpus: int, fits: Callable[[TrainConfig], bool]) -> dict[str, Any]:
    """The keys, with values, that make a recipe fit; empty if no change does.

    They are tried in this order: micro_batch_size and activations (which do not change the result), sharding,
    num_anchors, rank. The result has no more changes than needed.
    """
    changes: dict[str, Any] = {}
    for key, value in _candidates(recipe, num_gpus):
        changes[key] = value
        if fits(replace(recipe, **changes)):
            for spare in [*changes]:
                fewer = {key: value for key, value in changes.items() if key != spare}
                if fewer and fits(replace(recipe, **fewer)):
                    changes = fewer
            return changes
    return {}


def _candidates(recipe: TrainConfig, num_gpus: int) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    if recipe.micro_batch_size > 1:
        found.append(("micro_batch_size", 1))
    if recipe.activations == "none":
        found.append(("activations", "layer"))
    if recipe.sharding != "fsdp2" and num_gpus > 1:
        found.append(("sharding", "fsdp2"))
    anchors = recipe.num_anchors // 2
    while anchors >= _LEAST_ANCHORS:
        found.append(("num_anchors", anchors))
        anchors //= 2
    if recipe.init_view is None and recipe.rank is None:
        found.append(("rank", _LOW_RANK))
    return found
