"""Ways to continue a prompt greedily with one base: stock decoding in three forms, llama.cpp, and Orthrus."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers import StaticCache

from orthrus.api import Orthrus, decode_config
from orthrus.engine.stock import stock_generate


@dataclass(frozen=True, slots=True)
class Answer:
    """New tokens, all of them asked for; time to the first of them and whole time in ms; passes of the model.
    None where a time is not known, or passes are not counted."""

    token_ids: tuple[int, ...]
    ttft_ms: float | None
    total_ms: float
    num_passes: int | None = None


Arm = Callable[[list[int], int], Answer]
"""Continues token ids by so many new ones, whatever ends a text."""


def stock(orthrus: Orthrus, **settings: Any) -> Arm:
    """The stock model's `generate`. settings: of its GenerationConfig, such as prompt_lookup_num_tokens."""
    model: Any = orthrus.stock()
    passes = _count_passes(model)

    def run(prompt_ids: list[int], num_new: int) -> Answer:
        return _answer(model, passes, prompt_ids, num_new, **settings)

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
        return _answer(model, passes, prompt_ids, num_new, cache=cache)

    return run


def _count_passes(model: Any) -> list[int]:
    """A list whose only number is how often the model has run."""
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    model.register_forward_pre_hook(count)
    return passes


def _answer(model: Any, passes: list[int], prompt_ids: list[int], num_new: int, **options: Any) -> Answer:
    passes[0] = 0
    run = stock_generate(model, prompt_ids, max_new_tokens=num_new, eos_token_ids=frozenset(), **options)
    return Answer(run.token_ids, run.ttft_ms, run.ttft_ms + run.decode_ms, passes[0])


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
