"""The training loop: accelerate carries precision and processes, the loop stays in sight."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from orthrus.errors import DivergedError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.forward import Objective, StepOutput, TrainingPass
from orthrus.training.packing import PackedRow
from orthrus.training.recipe import TrainConfig
from orthrus.training.run_state import RunState, load_state, save_state


@dataclass(frozen=True, slots=True)
class TrainLog:
    """What one step reports. accuracy_J: share of draft rows that name the AR view's own token, by position;
    expected_tokens: tokens per cycle if positions were accepted independently at those rates."""

    step: int
    num_steps: int
    loss: float
    accuracy_J: tuple[float, ...]
    expected_tokens: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float


@dataclass(slots=True, kw_only=True)
class Hooks:
    """What the caller wants to be told or asked, on the main process only but for the last.

    on_start: (steps done, steps in all). evaluate: (view, step) -> score of a real decode, higher is better.
    should_stop: asked on every process after each step; any of them may end the run, which saves it.
    """

    on_start: Callable[[int, int], None] = lambda *_: None
    on_log: Callable[[TrainLog], None] = lambda _: None
    evaluate: Callable[[DualView, int], float] | None = None
    should_stop: Callable[[], bool] = lambda: False


def train(
    dual: DualView, rows: list[PackedRow], config: TrainConfig, corpus_digest: str, hooks: Hooks
) -> RunState:
    """Train the diffusion view of `dual` in place, saving into `config.output`; continues a run found there.

    Base weights stay frozen, the view is kept in float32 and used in `config.dtype`. Every random choice is a
    function of (seed, epoch, row), so a resumed run repeats what an unbroken one would have done, bit for
    bit. Raises UserInputError when the folder holds another run, DivergedError when the loss is not a number.
    """
    accelerator = _accelerator(config)
    if config.batch_rows < accelerator.num_processes:
        raise UserInputError(
            f"batch_rows {config.batch_rows} is less than a row for each of {accelerator.num_processes} "
            "processes; raise it."
        )
    for parameter in dual.view_parameters().values():
        parameter.data = parameter.data.float()
    folder = Path(config.output)
    state = load_state(folder, dual, config, corpus_digest) or RunState()
    parameters = list(dual.view_parameters().values())
    training = accelerator.prepare_model(
        TrainingPass(
            dual,
            Objective(
                loss=config.loss, weights=config.weights, gamma=config.gamma, smoothing=config.smoothing
            ),
        )
    )
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    if state.optimizer is not None:
        optimizer.load_state_dict(state.optimizer)
    num_steps = config.steps or max(1, round(config.epochs * len(rows) / config.batch_rows))
    if accelerator.is_main_process:
        hooks.on_start(state.step, num_steps)
    meter = _Meter(num_steps, state.step)
    while state.step < num_steps:
        rate = learning_rate(config, state.step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        output = _accumulate(accelerator, training, rows, config, state.step)
        grad_norm = _apply(accelerator, parameters, optimizer, output, config.clip_norm)
        state.step += 1
        meter.add(output)
        last = state.step == num_steps or _any_process(accelerator, hooks.should_stop())
        if accelerator.is_main_process:
            if state.step % config.log_every == 0 or last:
                hooks.on_log(meter.log(state.step, rate, grad_norm))
            if hooks.evaluate is not None and (
                state.step % config.evaluate_every == 0 or state.step == num_steps
            ):
                state.scores.append((state.step, _evaluate(dual, hooks.evaluate, state.step)))
                meter.restart(state.step)
            if state.step % config.save_every == 0 or last:
                save_state(folder, dual, optimizer, state, config, corpus_digest)
        if last:
            break
    return state


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to `floor` x peak."""
    warmup_steps = max(1, round(config.warmup * num_steps))
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return config.learning_rate * (
        config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def rows_of_step(num_rows: int, batch_rows: int, step: int, seed: int) -> list[tuple[int, int]]:
    """(row index, anchor seed) of each row of a step: every epoch is a fresh permutation of the corpus."""
    picked = []
    for position in range(step * batch_rows, (step + 1) * batch_rows):
        epoch, at = divmod(position, num_rows)
        epoch_seed = (seed * 1_000_003 + epoch) % 2**63
        row = int(_epoch_order(num_rows, epoch_seed)[at])
        picked.append((row, (epoch_seed * 1_000_003 + row) % 2**63))
    return picked


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int) -> Tensor:
    """The rows of one epoch; kept, since every row of every step asks for it. Two: a step may span both."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


def _accelerator(config: TrainConfig) -> Accelerator:
    # The AR side of the twins never gets gradients, and mask embeddings may be absent.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    return Accelerator(
        mixed_precision="bf16" if config.dtype == "bfloat16" else "no", kwargs_handlers=handlers
    )


def _accumulate(
    accelerator: Accelerator, training: Any, rows: list[PackedRow], config: TrainConfig, step: int
) -> StepOutput:
    """Gradients of the summed loss over this process's share of the step's rows; returns the sums."""
    layout = BlockLayout(
        block_size=config.block_size,
        num_clean=config.num_clean,
        first_target=config.first_target,
        clean_share=config.clean_share,
        reveal=config.reveal,
    )
    mine = rows_of_step(len(rows), config.batch_rows, step, config.seed)[
        accelerator.process_index :: accelerator.num_processes
    ]
    total: StepOutput | None = None
    for start in range(0, len(mine), config.micro_rows):
        part = mine[start : start + config.micro_rows]
        batch = draw_blocks([rows[i] for i, _ in part], [s for _, s in part], config.num_anchors, layout)
        last = start + config.micro_rows >= len(mine)
        with accelerator.autocast(), nullcontext() if last else accelerator.no_sync(training):
            output: StepOutput = training(batch.to(accelerator.device))
            accelerator.backward(output.loss)
        total = _plus(total, StepOutput(*(t.detach() for t in output)))
    assert total is not None, "a step has at least one row for each process"
    return StepOutput(*(accelerator.reduce(t, "sum") for t in total))


def _plus(total: StepOutput | None, output: StepOutput) -> StepOutput:
    return output if total is None else StepOutput(*(a + b for a, b in zip(total, output, strict=True)))


def _apply(
    accelerator: Accelerator,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    output: StepOutput,
    clip_norm: float,
) -> float:
    """Turn summed gradients into the weighted mean's, clip, and step. Processes average, so undo that too."""
    scale = accelerator.num_processes / output.weight.clamp_min(1e-12)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    if not math.isfinite(float(norm)) or not math.isfinite(float(output.loss)):
        raise DivergedError(
            "the loss is not a number any more; the last saved state is kept: begin again with a lower "
            "learning_rate and another output folder."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set anywhere: processes that left at different steps would wait for each other."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum"))


def _evaluate(dual: DualView, evaluate: Callable[[DualView, int], float], step: int) -> float:
    with torch.no_grad():
        return evaluate(dual, step)


class _Meter:
    """Sums since the last log, and the clock."""

    def __init__(self, num_steps: int, step: int) -> None:
        self.num_steps = num_steps
        self._sums: StepOutput | None = None
        self.restart(step)

    def restart(self, step: int) -> None:
        self._started, self._first_step, self._tokens = perf_counter(), step, 0.0

    def add(self, output: StepOutput) -> None:
        self._tokens += float(output.counts_J.sum())
        self._sums = _plus(self._sums, output)

    def log(self, step: int, rate: float, grad_norm: float) -> TrainLog:
        sums, self._sums = self._sums, None
        assert sums is not None, "add comes before log"
        accuracy_J = sums.hits_J / sums.counts_J.clamp_min(1)
        seconds = perf_counter() - self._started
        per_step = seconds / max(1, step - self._first_step)
        return TrainLog(
            step=step,
            num_steps=self.num_steps,
            loss=float(sums.loss / sums.weight.clamp_min(1e-12)),
            accuracy_J=tuple(accuracy_J.tolist()),
            expected_tokens=1.0 + float(accuracy_J.cumprod(0).sum()),
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_second=self._tokens / seconds if seconds else 0.0,
            seconds_left=per_step * (self.num_steps - step),
        )
