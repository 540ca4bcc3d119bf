"""Greedy decoding with drafts that the base verifies, and the CPU time of its passes; eager PyTorch throughout.

One loop for every kind of draft. A cycle drafts, then runs the base over the anchor and the drafts, keeps the longest
correct prefix and adds the base's own token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import process_time
from typing import Any, Protocol

import torch
from drafter_parts import features_of
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from orthrus.audit.explain import first_difference


class Drafts(Protocol):
    """What drafts for one request. layers: of the base whose outputs it wants to see; none if it reads the cache.

    Called with the base's cache (all committed positions but the last), all committed tokens (the last is the anchor)
    and features (1, N, F) of the positions that entered the cache since the last call. Returns tokens that its own
    pass decided, whose predecessors it left in the cache, and drafts of the tokens after those.
    """

    layers: tuple[int, ...]

    def __call__(
        self, cache: DynamicCache, known_ids: list[int], features_1NF: Tensor
    ) -> tuple[list[int], list[int]]: ...


@dataclass
class Clock:
    """CPU seconds of single passes; one_row: of the base over one row, beside every sixth cycle."""

    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    one_row: list[float] = field(default_factory=list)

    def medians_ms(self) -> dict[str, float]:
        return {name: 1e3 * median(getattr(self, name)) for name in ("draft", "verify", "one_row")}


@dataclass
class Run:
    """One answer. tokens: new ones. drafted: verified drafts. accepted_by_cycle: accepted drafts of each cycle."""

    tokens: list[int]
    cycles: int = 0
    drafted: int = 0
    accepted_by_cycle: list[int] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_by_cycle)


def timed(into: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    began = process_time()
    found = call(*arguments)
    into.append(process_time() - began)
    return found


def forget(cache: DynamicCache, number: int) -> None:
    """Take the newest positions out of a cache."""
    if number:
        cache.crop(-number)


@torch.inference_mode()
def decode(
    base: PreTrainedModel,
    drafts: Drafts,
    prompt_ids: list[int],
    num_new: int,
    eos_ids: frozenset[int],
    clock: Clock | None = None,
) -> Run:
    """Continue a prompt greedily, by at most `num_new` tokens."""
    clock = clock or Clock()
    cache, known = DynamicCache(config=base.config), list(prompt_ids)

    def rows(ids: list[int], keep: int) -> tuple[Tensor, Tensor]:
        out = base(
            input_ids=torch.tensor([ids]),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(drafts.layers),
            logits_to_keep=keep,
        )
        seen = features_of(out.hidden_states, drafts.layers) if drafts.layers else torch.empty(1, len(ids), 0)
        return out.logits[0].argmax(-1), seen

    choice_1, features_1NF = rows(prompt_ids, 1)
    known.append(int(choice_1[0]))
    run = Run([])

    def ended() -> bool:
        new = known[len(prompt_ids) :]
        return len(new) >= num_new or not eos_ids.isdisjoint(new)

    while not ended():
        run.cycles += 1
        decided, guesses = timed(clock.draft, drafts, cache, known, features_1NF)
        known += decided
        if ended():
            break
        choice_R, seen_1RF = timed(clock.verify, rows, [known[-1], *guesses], 0)
        accepted = 0
        for guess, choice in zip(guesses, choice_R.tolist(), strict=False):
            if guess != choice:
                break
            accepted += 1
        run.drafted += len(guesses)
        run.accepted_by_cycle.append(accepted)
        known += [*guesses[:accepted], int(choice_R[accepted])]
        forget(cache, len(guesses) - accepted)
        features_1NF = seen_1RF[:, : 1 + accepted]
        if run.cycles % 6 == 1:
            timed(clock.one_row, rows, known[-1:], 0)
            forget(cache, 1)
    run.tokens = known[len(prompt_ids) :][:num_new]
    ends = [i for i, token in enumerate(run.tokens) if token in eos_ids]
    run.tokens = run.tokens[: ends[0] + 1] if ends else run.tokens
    return run


@torch.inference_mode()
def first_gap(base: PreTrainedModel, ids: list[int], tokens: list[int], expected: list[int]) -> float:
    """Between the two best logits of the base where two answers part."""
    same = first_difference(expected, tokens)
    if same == min(len(tokens), len(expected)):
        return float("inf")
    logits_V = base(torch.tensor([[*ids, *expected[:same]]]), logits_to_keep=1).logits[0, -1]
    best_2 = logits_V.topk(2).values
    return float(best_2[0] - best_2[1])
