"""An answer once more by plain decoding, alone, pass by pass: what it should have been."""

from dataclasses import dataclass, replace

from orthrus.api import Orthrus
from orthrus.audit.explain import Judgement, explain, first_difference
from orthrus.config import DecodeConfig
from orthrus.engine.beside import EngineBeside
from orthrus.engine.request import Request
from orthrus.model.pool import PAGE


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer as it was given. config: its settings, with the seed that was used."""

    prompt_ids: list[int]
    config: DecodeConfig
    token_ids: tuple[int, ...]
    finish: str | None

    @classmethod
    def of(cls, request: Request) -> "Answered":
        """Of a request that has ended."""
        sampling = replace(request.config.sampling, seed=request.seed)
        config = replace(request.config, sampling=sampling)
        return cls(list(request.prompt_ids), config, tuple(request.token_ids), request.finish)


class PlainReplay:
    """Decodes an answer's prompt again: strategy `ar`, the same settings and seed, slots of its own.

    `step` runs one pass, until `done`; from the thread that steps the engine, or with the engine held. A text
    that did not end by itself is decoded as far as it came: a deadline or a full pool may have cut it.
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
        """One pass. Raises what ends the replay."""
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
        """The first token, from 0, where the answer is another; None where all are the same."""
        if self.token_ids == self._answered.token_ids:
            return None
        return first_difference(self.token_ids, self._answered.token_ids)

    def explain(self, orthrus: Orthrus) -> Judgement:
        """Whether rounding may be the reason for the difference; decodes the answer as it was, on `orthrus`."""
        answered, position = self._answered, self.difference
        assert self.done and position is not None, "there is a difference to explain"
        ours = answered.token_ids
        return explain(orthrus, "plain", answered.prompt_ids, answered.config, self.token_ids, ours, position)
