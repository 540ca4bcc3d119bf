"""Evaluates a view during training by decoding held-out prompts, and writes the run's view folders."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from orthrus.base.bench_prompts import load_prompts
from orthrus.base.loading import Base
from orthrus.config import DecodeConfig
from orthrus.engine.engine import Engine
from orthrus.engine.stream import TokenStream
from orthrus.errors import OrthrusError
from orthrus.model.checkpoint import CONFIG_FILE, read_json, save_view
from orthrus.model.dual_view import DualView
from orthrus.model.runner import EagerRunner
from orthrus.training.run_folder import BEST, RunFolder
from orthrus.types import Cycle

NUM_TOKENS = 64

OnDecoded = Callable[[int, int], None]
"""Called with (decoded tokens, limit on tokens) of this process. Several processes may share the prompts."""


class Decoded(NamedTuple):
    """Counts of decoding by `chain`: tokens after the first, cycles, accepted guesses, and guesses that were judged."""

    num_tokens: int
    num_cycles: int
    num_accepted: int
    num_judged: int


@dataclass
class Scorer:
    """Computes a view's evaluation score: pooled tokens per cycle of greedy `chain` decoding, first token left out.

    The trainer calls `scorer(dual, step)`. The view with the highest evaluation score is kept in the run's folder as
    `best`. Every evaluation also stores `goes_on` in the view's config: the probability that a guess is accepted if
    those before it were. origin: the part of the view's provenance that is known before the run. best: (score, step),
    None before the first evaluation. on_decoded: called after each cycle. With several processes, each decodes some of
    the prompts, all get the same score, and the main one keeps the view.
    """

    base: Base
    prompts: list[list[int]]
    run: RunFolder
    origin: dict[str, Any]
    process: PartialState
    best: tuple[float, int] | None = None
    on_decoded: OnDecoded | None = None

    def __call__(self, dual: DualView, step: int) -> float:
        mine = self.prompts[self.process.process_index :: self.process.num_processes]
        counts = torch.tensor(decoded(dual, self.base, mine, self.on_decoded), device=self.process.device)
        total = Decoded(*reduce(counts, "sum").tolist())
        score = total.num_tokens / total.num_cycles if total.num_cycles else 1.0
        goes_on = total.num_accepted / total.num_judged if total.num_judged else None
        dual.config = replace(dual.config, goes_on=goes_on)
        if self.best is None or score > self.best[0]:
            self.best = (score, step)
            if self.process.is_main_process:
                keep_view(dual, self.run, BEST, self.origin | {"step": step, "tokens_per_cycle": score})
        return score

    def remember(self) -> None:
        """Read the best evaluation score of an earlier part of the same run, however that ended.

        Scores of another number of prompts are not comparable, so they are left out.
        """
        self.best = None
        try:
            made = read_json(self.run.path / BEST / CONFIG_FILE)["provenance"]
            score, step = float(made["tokens_per_cycle"]), int(made["step"])
            if made["recipe"]["evaluate_prompts"] != self.origin["recipe"]["evaluate_prompts"]:
                return
        except (OrthrusError, OSError, KeyError, TypeError, ValueError, OverflowError):
            return
        # With NaN as the best score, no later score would be better.
        if math.isfinite(score):
            self.best = (score, step)


def held_out_prompts(base: Base, number: int, block_size: int) -> list[list[int]]:
    """Token ids of the first built-in prompts that fit into the context, one of each domain in turn."""
    seen: dict[str, int] = {}
    ranked = []
    for prompt in load_prompts():
        seen[prompt.domain] = seen.get(prompt.domain, 0) + 1
        ranked.append((seen[prompt.domain], prompt.prompt))
    ranked.sort(key=lambda pair: pair[0])
    encoded = (base.encode_prompt(prompt) for _, prompt in ranked)
    room = base.context_length - NUM_TOKENS - block_size
    return [ids for ids in encoded if len(ids) <= room][:number]


def decoded(
    dual: DualView, base: Base, prompts: Sequence[Sequence[int]], on_decoded: OnDecoded | None = None
) -> Decoded:
    """The sums of `Decoded` over all prompts, with the view in the base's precision, as in use."""
    each = decoded_each(dual, base, prompts, on_decoded=on_decoded)
    return Decoded(*map(sum, zip(*each, strict=True))) if each else Decoded(0, 0, 0, 0)


def decoded_each(
    dual: DualView,
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = NUM_TOKENS,
    on_decoded: OnDecoded | None = None,
) -> list[Decoded]:
    """The counts of greedy `chain` decoding of each prompt."""
    config = DecodeConfig(max_new_tokens=max_new_tokens, strategy="chain")
    counts = []
    num_decoded = 0

    def follow(cycle: Cycle) -> None:
        nonlocal num_decoded
        num_decoded += len(cycle.token_ids)
        if on_decoded is not None:
            on_decoded(num_decoded, max_new_tokens * len(prompts))

    with served(dual):
        engine = Engine(EagerRunner(dual))
        requests = [
            engine.submit(list(ids), config, eos_token_ids=base.eos_token_ids, on_cycle=follow)
            for ids in prompts
        ]
        for request in requests:
            result = TokenStream(engine, request).drain()
            # The last cycle may have been cut short.
            drafting = [c for c in result.cycles if c.num_drafted and c.finish_reason is None]
            counts.append(
                Decoded(
                    max(result.stats.num_tokens - 1, 0),
                    result.stats.num_cycles,
                    sum(c.num_accepted for c in drafting),
                    sum(min(c.num_accepted + 1, c.num_drafted) for c in drafting),
                )
            )
    return counts


@contextmanager
def served(dual: DualView) -> Iterator[None]:
    """A context in which the view's weights have the base's precision."""
    exact = {name: parameter.data for name, parameter in dual.view_parameters().items()}
    try:
        for parameter in dual.view_parameters().values():
            parameter.data = parameter.data.to(dual.dtype)
        yield
    finally:
        for name, parameter in dual.view_parameters().items():
            parameter.data = exact[name]


def keep_view(dual: DualView, run: RunFolder, name: str, origin: dict[str, Any]) -> None:
    """Write the trained view with its provenance into the run's folder, in place of its earlier one."""
    dual.config = replace(dual.config, trained=True, provenance=origin)
    save_view(dual, run.path / name, owner=run.owner)
