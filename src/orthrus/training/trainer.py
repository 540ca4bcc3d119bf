"""The training loop. The communication of several processes is in `processes`."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from time import perf_counter

import torch
from torch import Tensor

from orthrus.errors import DivergedError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.names import REPAIR_PREFIX
from orthrus.model.pool import head_dim
from orthrus.training.blocks import BlockLayout, draw_blocks
from orthrus.training.flex_blocks import pick_attention
from orthrus.training.forward import Objective, StepOutput, TrainingPass
from orthrus.training.moving_mean import MovingMean
from orthrus.training.packing import PackedSequence
from orthrus.training.processes import Processes, plain
from orthrus.training.recipe import TrainConfig
from orthrus.training.run_folder import RunFolder, run_folder
from orthrus.training.run_state import RunState, check_room, find_state, load_state, trained_parameters
from orthrus.training.speed import FlopCounter
from orthrus.training.state_saver import StateSaver


@dataclass(frozen=True, slots=True)
class TrainLog:
    """The report of a step.

    accuracy_J: share of draft rows that guess the AR view's own token, by position. expected_tokens: tokens per cycle
    if positions were accepted independently at these rates. flops_per_second: operations of matrix products, counted in
    the first step; None if they are not counted.
    """

    step: int
    num_steps: int
    loss: float
    accuracy_J: tuple[float, ...]
    expected_tokens: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    seconds_left: float
    flops_per_second: float | None


@dataclass(slots=True, kw_only=True)
class Hooks:
    """Callbacks. on_start and on_log are called in the main process, the others in every process.

    on_start: called with (steps done, steps in all). evaluate: (view, step) -> evaluation score, higher is better.
    Every process holds the whole view during the call, and all must return the same score. should_stop: called after
    each step. If any process returns True, the run is saved and ends.
    """

    on_start: Callable[[int, int], None] = lambda *_: None
    on_log: Callable[[TrainLog], None] = lambda _: None
    evaluate: Callable[[DualView, int], float] | None = None
    should_stop: Callable[[], bool] = lambda: False


def train(
    dual: DualView,
    sequences: Sequence[PackedSequence],
    config: TrainConfig,
    corpus_digest: str,
    hooks: Hooks,
    held: RunFolder | None = None,
) -> RunState:
    """Train the diffusion view of `dual` in place, with saves in `config.output`. Continues a run that is found there.

    held: the output folder, if the caller has locked it; otherwise the main process locks it until the end. Base
    weights stay frozen; with `train: repair` everything but the repair head does. The view is kept in float32 and used
    in `config.dtype`. With `config.ema_decay`, evaluations use the moving mean of the weights, and `dual` holds it at
    the end. Every random choice is a function of (seed, epoch, sequence), so a resumed run gives the same bits as an
    uninterrupted one. Raises UserInputError if the folder holds another run or foreign files, or if another process
    trains there. Raises StorageError if it cannot be written or has too little room, and DivergedError if the loss is
    not a number.
    """
    processes = Processes(config)
    if config.batch_size < processes.count:
        raise UserInputError(
            f"batch_size {config.batch_size} is less than a sequence for each of {processes.count} processes; "
            "raise it."
        )
    for name, parameter in dual.view_parameters().items():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(config.train == "view" or name.startswith(REPAIR_PREFIX))
    holding = run_folder(config.output_folder, is_main=processes.is_main) if held is None else nullcontext()
    with closing(processes), holding:
        return _train(processes, dual, sequences, config, corpus_digest, hooks)


def _train(
    processes: Processes,
    dual: DualView,
    sequences: Sequence[PackedSequence],
    config: TrainConfig,
    corpus_digest: str,
    hooks: Hooks,
) -> RunState:
    folder = config.output_folder
    saved = find_state(folder, dual, config, corpus_digest)
    objective = Objective(
        loss=config.loss, weights=config.weights, gamma=config.gamma, smoothing=config.smoothing
    )
    processes.share(TrainingPass(dual, objective, config.attention, config.activations))
    trained = trained_parameters(dual)
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        # One pass over the weights instead of ten.
        fused=True,
    )
    mean = MovingMean(trained, config.ema_decay)
    state = RunState() if saved is None else load_state(saved, dual, optimizer, mean, processes)
    if state.scores:
        dual.config = replace(dual.config, goes_on=state.goes_on)
    if processes.is_main:
        check_room(folder, dual, config)
    num_steps = steps_of(config, len(sequences))
    if processes.is_main:
        hooks.on_start(state.step, num_steps)
    # Compiled kernels and gathered shards cannot be counted.
    dense = pick_attention(config.attention, dual.device, head_dim(dual.base.config)) == "dense"
    meter = _Meter(num_steps, state.step, countable=dense and not processes.sharded)

    def due() -> bool:
        """Whether to evaluate the view of this step, which may also be left from a run that was killed."""
        is_step = state.step % config.evaluate_every == 0 or state.step == num_steps
        is_new = state.step > 0 and state.step not in dict(state.scores)
        return hooks.evaluate is not None and is_step and is_new

    with StateSaver(folder, dual, optimizer, mean, config, corpus_digest, processes) as saver:

        def score_if_due() -> None:
            if hooks.evaluate is None or not due():
                return
            with mean.in_place(), processes.whole(), torch.no_grad():
                state.scores.append((state.step, hooks.evaluate(dual, state.step)))
            state.goes_on = dual.config.goes_on
            saver.note_scores(state)
            meter.restart(state.step)

        score_if_due()
        while state.step < num_steps:
            rate = learning_rate(config, state.step, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with meter.counting():
                output = _accumulate(processes, sequences, config, state.step)
            grad_norm = _apply(processes, parameters, optimizer, output, config.clip_norm)
            state.step += 1
            mean.update(state.step)
            meter.add(output)
            last = state.step == num_steps or processes.any(hooks.should_stop() or saver.failed)
            if processes.is_main and (state.step % config.log_every == 0 or last):
                hooks.on_log(meter.log(state.step, rate, grad_norm))
            # Save before an evaluation, which takes minutes, so that a kill meanwhile loses no steps.
            if state.step % config.save_every == 0 or last or due():
                saver.save(state)
            score_if_due()
            if last:
                break
    mean.swap()
    processes.gather()
    return state


def steps_of(config: TrainConfig, num_sequences: int) -> int:
    """Steps of a whole run, the same in every process."""
    return config.steps or max(1, round(config.epochs * num_sequences / config.batch_size))


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine to `min_lr_ratio` x peak."""
    warmup_steps = max(1, round(config.warmup * num_steps))
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return config.learning_rate * (
        config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def sequences_of_step(num_sequences: int, batch_size: int, step: int, seed: int) -> list[tuple[int, int]]:
    """(index, anchor seed) of each sequence of a step. Every epoch is a new permutation of the corpus."""
    picked = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, at = divmod(position, num_sequences)
        epoch_seed = (seed * 1_000_003 + epoch) % 2**63
        index = int(_epoch_order(num_sequences, epoch_seed)[at])
        picked.append((index, (epoch_seed * 1_000_003 + index) % 2**63))
    return picked


@lru_cache(maxsize=2)
def _epoch_order(num_sequences: int, seed: int) -> Tensor:
    """The order of one epoch. It is cached, because every sequence needs it. A step may span two epochs."""
    return torch.randperm(num_sequences, generator=torch.Generator().manual_seed(seed))


def _accumulate(
    processes: Processes, sequences: Sequence[PackedSequence], config: TrainConfig, step: int
) -> StepOutput:
    """Add the gradients of the summed loss over this process's share of a step. Returns the sums of all processes."""
    layout = BlockLayout(
        block_size=config.block_size,
        num_clean=config.num_clean,
        first_target=config.first_target,
        clean_share=config.clean_share,
        reveal=config.reveal,
        rejected_share=config.rejected_share,
    )
    picked = sequences_of_step(len(sequences), config.batch_size, step, config.seed)
    mine = picked[processes.index :: processes.count]
    # All processes make as many passes as the first one, which has the most sequences: sharded passes need everybody.
    starts = range(0, len(picked[:: processes.count]), config.micro_batch_size)
    total: StepOutput | None = None
    for start in starts:
        part = mine[start : start + config.micro_batch_size]
        used = part or mine[:1]
        batch = draw_blocks([sequences[i] for i, _ in used], [s for _, s in used], config.num_anchors, layout)
        total = _plus(total, processes.gradients(batch, counts=bool(part), last=start == starts[-1]))
    assert total is not None, "a step has at least one sequence for each process"
    return processes.total(total)


def _plus(total: StepOutput | None, output: StepOutput) -> StepOutput:
    return output if total is None else StepOutput(*(a + b for a, b in zip(total, output, strict=True)))


def _apply(
    processes: Processes,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    output: StepOutput,
    clip_norm: float,
) -> float:
    """Scale summed gradients to those of the weighted mean, undo the averaging over processes, clip, and step."""
    scale = float(processes.count / output.weight.clamp_min(1e-12))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    norm = float(plain(torch.nn.utils.clip_grad_norm_(parameters, clip_norm)))
    if not math.isfinite(norm) or not math.isfinite(float(output.loss)):
        raise DivergedError(
            "the loss is not a number any more; the last saved state is kept: begin again with a lower "
            "learning_rate and another output folder."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class _Meter:
    """Sums since the last log, and times."""

    def __init__(self, num_steps: int, step: int, *, countable: bool) -> None:
        self.num_steps = num_steps
        self._countable = countable
        self._sums: StepOutput | None = None
        self._step_flops: int | None = None
        self.restart(step)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context that counts this process's operations of the first step. Later steps are equal."""
        if not self._countable or self._step_flops is not None:
            yield
            return
        with FlopCounter() as counter:
            yield
        self._step_flops = counter.total

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
            # A position without targets, such as one that the AR row decides, counts as accepted.
            expected_tokens=1.0 + float(accuracy_J.where(sums.counts_J > 0, 1.0).cumprod(0).sum()),
            learning_rate=rate,
            grad_norm=grad_norm,
            tokens_per_second=self._tokens / seconds if seconds else 0.0,
            seconds_left=per_step * (self.num_steps - step),
            flops_per_second=self._step_flops / per_step if self._step_flops and per_step else None,
        )
