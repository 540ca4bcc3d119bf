"""Single cycles of a request in an engine, to be timed, and engines for measurements."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.config import DecodeConfig, Strategy
from orthrus.engine.beside import EngineBeside
from orthrus.engine.engine import Engine
from orthrus.engine.request import Request
from orthrus.engine.work import fixed_plan
from orthrus.errors import UserInputError
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import Runner, RunnerAround


def without_reuse(orthrus: Orthrus, runner: Runner | None = None) -> Orthrus:
    """The same model, runner and prices; but a prompt that comes again is fed again, as other programs do it.

    runner: another one for its passes.
    """
    fresh = Orthrus(orthrus.base, orthrus.dual, orthrus.engine.runner)
    fresh.engine = EngineBeside(orthrus.engine, runner, reuse=False)
    return fresh


def whole_passes(strategy: Strategy) -> int:
    """Passes of a whole cycle of a fixed strategy: one that makes its next draft beside a verification takes one."""
    return 1 if strategy == "ar" or _is_fused(strategy) else 2


def ready_request(engine: Engine, prompt_ids: list[int], strategy: Strategy) -> Request:
    """A request right before a whole cycle; a fused cycle finds its draft at hand.

    Raises UserInputError where the context has no room for such a cycle.
    """
    room = engine.context_length - len(prompt_ids)
    config = DecodeConfig(strategy=strategy, max_new_tokens=room, ignore_eos=True)
    request = engine.submit(prompt_ids, config, eos_token_ids=frozenset())
    while not request.token_ids or (_is_fused(strategy) and request.drafts is None):
        step_cycle(engine, request)
        if request.closed:
            raise UserInputError(
                f"{len(prompt_ids)} tokens of history leave no room for a cycle of {strategy}; take fewer."
            )
    return request


def _is_fused(strategy: Strategy) -> bool:
    return fixed_plan(DecodeConfig(strategy=strategy), block_size=8).num_blocks > 0


def step_cycle(engine: Engine, request: Request) -> None:
    """Step until the request has one more record, or has ended."""
    num_cycles = len(request.cycles)
    while len(request.cycles) == num_cycles and not request.closed:
        engine.step()


@dataclass(slots=True)
class Call:
    """A pass, and the projections that followed: how many of its rows, and whether as drafts."""

    pass_: Pass
    projected: list[tuple[int, bool]]


class RecordingRunner(RunnerAround):
    """A runner that notes what is run through it. It calls the very same code as the one it wraps."""

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        self.calls: list[Call] = []

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        self.calls.append(Call(p, []))
        return super().hidden(p, pool)

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        self.calls[-1].projected.append((len(hidden_RC), drafts))
        return super().head(hidden_RC, drafts=drafts)

    @torch.inference_mode()
    def replay(self, pool: SlotPool) -> None:
        """Run all that was noted once more, in the slots that it was run in: what lies there may change."""
        for call in self.calls:
            hidden_RC = self._runner.hidden(call.pass_, pool)
            for num_rows, drafts in call.projected:
                self._runner.head(hidden_RC[:num_rows], drafts=drafts)
