"""Real decodes of held-out prompts during training, and the view folders that a run leaves behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce

from orthrus.base.bench_prompts import load_prompts
from orthrus.base.loading import Base
from orthrus.base.outputs import restore_folder
from orthrus.config import DecodeConfig
from orthrus.engine.stream import TokenStream
from orthrus.errors import OrthrusError
from orthrus.model.checkpoint import CONFIG_FILE, read_json, save_view
from orthrus.model.dual_view import DualView

NUM_TOKENS = 64
BEST, LAST = "best", "view"


@dataclass
class Scorer:
    """Called by the trainer as `scorer(dual, step)`: tokens per cycle, chain, greedy, first token left out.

    The view with the highest score is kept in `output/best`. `origin` is the part of its provenance that is
    known before the run. `best` is (score, step), None before the first score. Of several processes each
    decodes some of the prompts, all come to the same score, and the main one keeps the view.
    """

    base: Base
    prompts: list[list[int]]
    output: Path
    origin: dict[str, Any]
    process: PartialState
    best: tuple[float, int] | None = None

    def __call__(self, dual: DualView, step: int) -> float:
        mine = self.prompts[self.process.process_index :: self.process.num_processes]
        counts = torch.tensor(decoded(dual, self.base, mine), device=self.process.device)
        num_tokens, num_cycles = reduce(counts, "sum").tolist()
        score = num_tokens / num_cycles if num_cycles else 1.0
        if self.best is None or score > self.best[0]:
            self.best = (score, step)
            if self.process.is_main_process:
                keep_view(dual, self.output / BEST, self.origin | {"step": step, "tokens_per_cycle": score})
        return score

    def remember(self) -> None:
        """Take up the best score of an earlier part of the same run, however it ended."""
        if self.process.is_main_process:
            restore_folder(self.output / BEST)
        try:
            made = read_json(self.output / BEST / CONFIG_FILE)["provenance"]
            self.best = (float(made["tokens_per_cycle"]), int(made["step"]))
        except (OrthrusError, KeyError, TypeError, ValueError):
            self.best = None


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


def decoded(dual: DualView, base: Base, prompts: list[list[int]]) -> tuple[int, int]:
    """(Tokens after the first, cycles) over all prompts; the view in the base's precision, as served."""
    config = DecodeConfig(max_new_tokens=NUM_TOKENS, strategy="chain")
    num_tokens = num_cycles = 0
    with served(dual):
        for prompt_ids in prompts:
            stream = TokenStream(
                dual,
                prompt_ids,
                config,
                eos_token_ids=base.eos_token_ids,
                context_length=base.context_length,
            )
            stats = stream.drain().stats
            num_tokens += max(stats.num_tokens - 1, 0)
            num_cycles += stats.num_cycles
    return num_tokens, num_cycles


@contextmanager
def served(dual: DualView) -> Iterator[None]:
    """The view's weights in the base's precision while the context lasts."""
    exact = {name: parameter.data for name, parameter in dual.view_parameters().items()}
    try:
        for parameter in dual.view_parameters().values():
            parameter.data = parameter.data.to(dual.dtype)
        yield
    finally:
        for name, parameter in dual.view_parameters().items():
            parameter.data = exact[name]


def keep_view(dual: DualView, folder: Path, origin: dict[str, Any]) -> None:
    """Write the trained view with its provenance, in place of an earlier one."""
    dual.config = replace(dual.config, trained=True, provenance=origin)
    save_view(dual, folder, overwrite=True)
