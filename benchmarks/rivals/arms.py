"""Ways to continue a prompt greedily with one base: stock decoding in three forms, llama.cpp, and Orthrus."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import GenerationConfig, StaticCache, StoppingCriteria, StoppingCriteriaList

from orthrus.api import Orthrus, decode_config


@dataclass(frozen=True, slots=True)
class Answer:
    """New tokens, all of them asked for; time to the first of them and whole time in ms; passes of the model,
    None where they are not counted."""

    token_ids: tuple[int, ...]
    ttft_ms: float
    total_ms: float
    num_passes: int | None = None


Arm = Callable[[list[int], int], Answer]
"""Continues token ids by so many new ones, whatever ends a text."""


class _FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first tokens were there."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def stock(orthrus: Orthrus, **settings: Any) -> Arm:
    """The stock model's `generate`. settings: of its GenerationConfig, such as prompt_lookup_num_tokens."""
    model: Any = orthrus.stock()
    passes = _count_passes(model)

    def run(prompt_ids: list[int], num_new: int) -> Answer:
        return _generate(model, passes, prompt_ids, num_new, settings, {})

    return run


def compiled_stock(orthrus: Orthrus, longest: int) -> Arm:
    """The same with one static cache for all prompts, and torch.compile for steps of one token. Prompts, whose
    lengths differ, are read by uncompiled code: each length would be compiled anew."""
    model: Any = orthrus.stock()
    cache = StaticCache(config=model.config, max_cache_len=longest)
    eager = model.forward
    fast = torch.compile(eager, dynamic=False)

    def forward(_: Any, input_ids: Any = None, **others: Any) -> Any:
        return (fast if input_ids.shape[1] == 1 else eager)(input_ids=input_ids, **others)

    model.forward = MethodType(forward, model)
    passes = _count_passes(model)

    def run(prompt_ids: list[int], num_new: int) -> Answer:
        cache.reset()
        return _generate(model, passes, prompt_ids, num_new, {}, {"past_key_values": cache})

    return run


def _count_passes(model: Any) -> list[int]:
    """A list whose only number is how often the model has run."""
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    model.register_forward_pre_hook(count)
    return passes


def _generate(
    model: Any,
    passes: list[int],
    prompt_ids: list[int],
    num_new: int,
    settings: dict[str, Any],
    more: dict[str, Any],
) -> Answer:
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    clock = _FirstToken()
    config = GenerationConfig(
        max_new_tokens=num_new, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True, **settings
    )
    before, model.generation_config, passes[0] = model.generation_config, config, 0
    try:
        start = time.perf_counter()
        found = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            stopping_criteria=StoppingCriteriaList([clock]),
            **more,
        )
        end = time.perf_counter()
    finally:
        model.generation_config = before
    new_ids = tuple(found[0, len(prompt_ids) :].tolist())
    return Answer(new_ids, (clock.at - start) * 1e3, (end - start) * 1e3, passes[0])


def ours(orthrus: Orthrus, strategy: str) -> Arm:
    """Our engine, one request at a time."""

    def run(prompt_ids: list[int], num_new: int) -> Answer:
        config = decode_config(strategy=strategy, max_new_tokens=num_new, ignore_eos=True)  # type: ignore[arg-type]
        start = time.perf_counter()
        result = orthrus.stream_ids(prompt_ids, config).drain()
        total_ms = (time.perf_counter() - start) * 1e3
        return Answer(result.token_ids, result.stats.ttft_ms, total_ms, result.stats.num_passes)

    return run


def llama_cpp(threads: int, longest: int, gguf: Path | None = None) -> Arm | None:
    """llama.cpp on the default model's own GGUF file (Q4_1); None where llama-cpp-python is not installed."""
    try:
        import llama_cpp as _  # noqa: F401
    except ImportError:
        return None
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from llama_side import LlamaSide, default_gguf

    side = LlamaSide(gguf or default_gguf(), longest)
    side.set_threads(threads)

    def run(prompt_ids: Sequence[int], num_new: int) -> Answer:
        done = side.decode(list(prompt_ids), num_new)
        return Answer(done.token_ids, done.ttft_ms, done.ttft_ms + done.decode_ms)

    return run
