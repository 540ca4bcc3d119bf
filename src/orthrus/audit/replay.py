"""Computes the logits of one position again, with the passes that decoded it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from orthrus.api import Orthrus
from orthrus.config import DecodeConfig
from orthrus.engine.beside import EngineBeside
from orthrus.model.passes import Part, Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import Runner, RunnerAround


class Chunk(NamedTuple):
    """A pass with AR rows.

    start: tokens committed before it. num_rows: its rows of both views. logit_rows: the rows that were projected.
    """

    start: int
    num_rows: int
    logit_rows: list[int]


@dataclass(slots=True)
class OurReplay:
    """`logits_V`: the AR view's float32 logits that decided the position, None if no pass computed them.

    `token` is what was committed this time. `chunks` are the passes with AR rows.
    """

    logits_V: Tensor | None = None
    token: int | None = None
    chunks: list[Chunk] = field(default_factory=list)


def replay_ours(
    orthrus: Orthrus, prompt_ids: list[int], config: DecodeConfig, our_ids: Sequence[int], position: int
) -> OurReplay:
    """Decode `our_ids` again, alone, up to index `position`, and keep the logits that decided that token."""
    watched = _Watched(orthrus.engine.runner, [*prompt_ids, *our_ids[:position]])
    engine = EngineBeside(orthrus.engine, watched, reuse=False)
    request = orthrus.submit(prompt_ids, config, engine=engine)
    while len(request.token_ids) <= position and not request.closed:
        engine.step()
    engine.drop(request)
    replay = watched.replay
    replay.token = request.token_ids[position] if len(request.token_ids) > position else None
    return replay


class _Watched(RunnerAround):
    """A runner for one request, which keeps the logits of the token after `text`."""

    def __init__(self, runner: Runner, text: list[int]) -> None:
        super().__init__(runner)
        self.replay = OurReplay()
        self._text = text
        self._part: Part | None = None

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        (span,) = p.spans
        self._part = span.part if span.part.num_ar else None
        if self._part is not None:
            self.replay.chunks.append(Chunk(span.length, p.num_rows, []))
        return super().hidden(p, pool)

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        logits_RV = super().head(hidden_RC, drafts=drafts)
        if not drafts and (part := self._part) is not None:
            self._part = None
            # Judged rows come first; rows of blocks may be projected with them.
            start, num_rows, rows = self.replay.chunks[-1]
            beside = len(hidden_RC) - len(part.judged)
            rows += [*part.judged, *range(num_rows - beside, num_rows)]
            row = _row_that_read(self._text[start:], part)
            if row is not None and row in part.judged:
                self.replay.logits_V = logits_RV[part.judged.index(row)].float().clone()
        return logits_RV


def _row_that_read(tail: list[int], part: Part) -> int | None:
    """The AR row whose path in this part is `tail`, the end of the text. Other branches of a tree read other tokens."""
    for row in range(part.num_ar):
        read = range(row + 1) if part.tail_II is None else part.tail_II[row].nonzero()[0].tolist()
        if [part.token_ids[i] for i in read] == tail:
            return row
    return None
