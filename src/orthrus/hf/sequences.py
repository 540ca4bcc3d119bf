"""A batch as transformers sees it: all sequences one token longer at a time, the finished ones padded.

Sequences of a batch commit their tokens at different speeds. Stopping criteria may keep a state for each of
them, so they are asked once for every length, in order, with the whole batch (B, T).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from orthrus.decoding.stats import summarise
from orthrus.types import Cycle, DecodeStats, GenerationResult

Criteria = Callable[[Tensor, None], Any]
"""Takes sequences so far (B, T) and None for scores; says for each sequence (B,) whether it is done."""


class Stream(Protocol):
    """A request that is being decoded."""

    def __iter__(self) -> Iterator[Cycle]: ...

    def __next__(self) -> Cycle: ...

    def cancel(self) -> None: ...

    @property
    def result(self) -> GenerationResult: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """New tokens of one sequence, without padding, and the counters of what made them."""

    token_ids: list[int]
    stats: DecodeStats


def run_all(streams: list[Stream], input_ids_BT: Tensor, streamer: Any) -> list[Outcome]:
    """Decode every stream to its end. A streamer gets the tokens of the one stream as they come."""
    _start(streamer, input_ids_BT)
    for stream in streams:
        for cycle in stream:
            if streamer is not None and cycle.token_ids:
                streamer.put(torch.tensor(cycle.token_ids))
    _end(streamer)
    return [Outcome(list(s.result.token_ids), s.result.stats) for s in streams]


def run_in_step(
    streams: list[Stream],
    input_ids_BT: Tensor,
    criteria: Criteria,
    *,
    pad_token_id: int,
    pads: bool,
    streamer: Any = None,
) -> list[Outcome]:
    """As `run_all`, but `criteria` are asked at every length; what was decoded beyond a verdict is dropped.

    pads: a finished sequence is continued with padding. Without an end-of-sequence id transformers lets it
    run on with tokens of its own until all sequences are finished, and so it is here.
    """
    sequences = [_Sequence(stream) for stream in streams]
    so_far_BT = input_ids_BT
    finished_B = torch.zeros(len(streams), dtype=torch.bool, device=input_ids_BT.device)
    _start(streamer, input_ids_BT)
    length = 0
    while not bool(finished_B.all()):
        for sequence, finished in zip(sequences, finished_B.tolist(), strict=True):
            if not (finished and pads):
                sequence.advance(length + 1)
        column_B = [s.token(length, pad_token_id) for s in sequences]
        so_far_BT = torch.cat([so_far_BT, input_ids_BT.new_tensor(column_B)[:, None]], dim=1)
        length += 1
        if streamer is not None:
            streamer.put(torch.tensor(column_B))
        verdict_B = torch.as_tensor(criteria(so_far_BT, None), device=finished_B.device)
        over_B = torch.tensor([s.ends_at(length) for s in sequences], device=finished_B.device)
        finished_B = finished_B | verdict_B | over_B
        if pads:
            for sequence, finished in zip(sequences, finished_B.tolist(), strict=True):
                if finished:
                    sequence.cut(length)
    _end(streamer)
    for sequence in sequences:
        sequence.cut(length)
    return [sequence.outcome() for sequence in sequences]


class _Sequence:
    """One stream, read as far as was asked for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._token_ids: list[int] = []
        self._over = False
        self._cut = False

    def advance(self, length: int) -> None:
        """Read until there are `length` tokens, or the stream is over."""
        while len(self._token_ids) < length and not self._over:
            cycle = next(self._stream, None)
            if cycle is not None:
                self._token_ids += cycle.token_ids
            self._over = cycle is None or cycle.finish_reason is not None

    def token(self, index: int, pad_token_id: int) -> int:
        return self._token_ids[index] if index < len(self._token_ids) else pad_token_id

    def ends_at(self, length: int) -> bool:
        """Whether nothing comes after `length` tokens."""
        return self._over and len(self._token_ids) <= length

    def cut(self, length: int) -> None:
        """Keep at most `length` tokens, and decode no more."""
        if self._cut:
            return
        self._cut = True
        del self._token_ids[length:]
        if not self._over:
            self._stream.cancel()
            for _ in self._stream:
                pass

    def outcome(self) -> Outcome:
        result = self._stream.result
        cycles, left = [], len(self._token_ids)
        for cycle in result.cycles:
            if left <= 0:
                break
            kept = min(left, len(cycle.token_ids))
            left -= kept
            is_draft = cycle.is_draft[:kept]
            cycles.append(
                replace(
                    cycle, token_ids=cycle.token_ids[:kept], is_draft=is_draft, num_accepted=sum(is_draft)
                )
            )
        return Outcome(self._token_ids, summarise(result.stats.num_prompt_tokens, cycles))


def _start(streamer: Any, input_ids_BT: Tensor) -> None:
    if streamer is not None:
        streamer.put(input_ids_BT.cpu())


def _end(streamer: Any) -> None:
    if streamer is not None:
        streamer.end()
