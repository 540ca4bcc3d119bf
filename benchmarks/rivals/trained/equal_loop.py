"""One training loop for every drafter: our packed sequences, drawn blocks and schedule, an equal number of targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any, Protocol

import torch
from torch import nn

from orthrus.training.blocks import BlockBatch, BlockLayout, draw_blocks
from orthrus.training.forward import StepOutput
from orthrus.training.packing import PackedSequence
from orthrus.training.recipe import TrainConfig
from orthrus.training.trainer import learning_rate, sequences_of_step


class Learner(Protocol):
    """The summed loss of one packed sequence's blocks, with gradients for what it trains; `index` is its number."""

    def __call__(self, index: int, batch: BlockBatch) -> StepOutput: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """steps: as many whole ones as it takes to see `targets` or a few more; the same for all arms of a seed."""

    steps: int
    targets: int


def drawn(
    sequences: Sequence[PackedSequence], config: TrainConfig, step: int
) -> list[tuple[int, BlockBatch]]:
    """The sequences of a step by their numbers, with the blocks that the trainer itself would draw."""
    layout = BlockLayout(block_size=config.block_size, first_target=config.first_target)
    picked = sequences_of_step(len(sequences), config.batch_size, step, config.seed)
    return [
        (index, draw_blocks([sequences[index]], [seed], config.num_anchors, layout)) for index, seed in picked
    ]


def budget(sequences: Sequence[PackedSequence], config: TrainConfig, targets: int) -> Budget:
    seen = step = 0
    while seen < targets:
        seen += sum(int(batch.valid_BNJ.sum()) for _, batch in drawn(sequences, config, step))
        step += 1
    return Budget(step, seen)


def learn(
    learner: Learner,
    parameters: Sequence[nn.Parameter],
    sequences: Sequence[PackedSequence],
    config: TrainConfig,
    steps: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train in place; AdamW and the schedule of `config`. Returns the loss of the last tenth and CPU seconds."""
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    began, losses = process_time(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        outputs = []
        for index, batch in drawn(sequences, config, step):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
                output = learner(index, batch)
            output.loss.backward()  # type: ignore[no-untyped-call]
            outputs.append(StepOutput(*(t.detach() for t in output)))
        weight = sum(float(output.weight) for output in outputs)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(max(weight, 1e-12))
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(sum(float(output.loss) for output in outputs) / max(weight, 1e-12))
        if step % 10 == 9 or step == steps - 1:
            say(f"  step {step + 1} of {steps}, loss {losses[-1]:.4f}, {process_time() - began:.0f} s of CPU")
    last = losses[-max(1, steps // 10) :]
    return {"loss": sum(last) / len(last), "cpu_seconds": process_time() - began}


@torch.no_grad()
def foreseen(learner: Learner, sequences: Sequence[PackedSequence], config: TrainConfig, first: int) -> float:
    """Tokens per cycle if positions were accepted independently at the rates on held-out sequences, whose numbers begin
    with `first`; the drafts read the text's own tokens."""
    layout = BlockLayout(block_size=config.block_size)
    hits_J = counts_J = torch.zeros(layout.num_targets)
    for index, sequence in enumerate(sequences):
        batch = draw_blocks([sequence], [index], config.num_anchors, layout)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
            output = learner(first + index, batch)
        hits_J, counts_J = hits_J + output.hits_J, counts_J + output.counts_J
    return 1.0 + float((hits_J / counts_J.clamp_min(1)).cumprod(0).sum())
