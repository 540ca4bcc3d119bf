"""Decodes an answer once more with plain decoding, alone, pass by pass."""

from dataclasses import dataclass, replace

from orthrus.api import Orthrus
from orthrus.audit.explain import Judgement, explain, first_difference
from orthrus.config import DecodeConfig
from orthrus.engine.beside import EngineBeside
from orthrus.engine.request import Request
from orthrus.model.pool import PAGE


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer as a client received it. config: its settings, with the seed that was used."""

    prompt_ids: list[int]
    config: DecodeConfig
    token_ids: tuple[int, ...]
    finish: str | None

    @classmethod
    def of(cls, request: Request) -> "Answered":
        """The answer of a request that has ended."""
        sampling = replace(request.config.sampling, seed=request.seed)
        config = replace(request.config, sampling=sampling)
        return cls(list(request.prompt_ids), config, tuple(request.token_ids), request.finish)


class PlainReplay:
    """Decodes an answer's prompt again with strategy `ar`, the same settings and seed, and slots of its own.

    Call `step`, which runs one pass, until `done`: from the thread that steps the engine, or with the engine held. A
    deadline or a full pool may have cut the answer. Then the replay stops at the same length.
    """

    def __init__(self, orthrus: Orthrus, answered: Answered) -> None:
        self._answered = answered
        config, num_tokens = answered.config, len(answered.token_ids)
        most = config.max_new_tokens if answered.finish == "stop" else max(num_tokens, 1)
        plain = replace(
            config,
            strategy="ar",
            max_new_tokens=most,
            min_tokens=min(config.min_tokens, most),
            logprobs=None,
            priority=0,
        )
        room = min(len(answered.prompt_ids) + most, orthrus.engine.context_length)
        self._engine = EngineBeside(orthrus.engine, reuse=False, max_slots=room + PAGE, max_running=1)
        self._request = orthrus.submit(answered.prompt_ids, plain, engine=self._engine)

    @property
    def done(self) -> bool:
        return self._request.closed

    def step(self) -> None:
        """Run one pass. Raises the error that ended the replay, if one did."""
        self._engine.step()
        if self._request.failure is not None:
            raise self._request.failure

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self._request.token_ids)

    @property
    def text(self) -> str:
        return "".join(cycle.text for cycle in self._request.cycles)

    @property
    def difference(self) -> int | None:
        """Index of the first token that differs; None if all are equal."""
        if self.token_ids == self._answered.token_ids:
            return None
        return first_difference(self.token_ids, self._answered.token_ids)

    def explain(self, orthrus: Orthrus) -> Judgement:
        """Judge whether rounding explains the difference. Decodes the answer again as it was, on `orthrus`."""
        answered, position = self._answered, self.difference
        assert self.done and position is not None, "there is a difference to explain"
        ours = answered.token_ids
        return explain(orthrus, "plain", answered.prompt_ids, answered.config, self.token_ids, ours, position)
