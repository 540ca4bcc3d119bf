"""Who answers many requests at once, for throughput.py: our engine, the stock model's `generate`, and llama.cpp."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

import torch
from llama_side import LlamaSide
from transformers import GenerationConfig

from orthrus.api import Orthrus, decode_config
from orthrus.engine.beside import EngineBeside


class Asked(NamedTuple):
    """One request. num_new: tokens of its answer."""

    ids: list[int]
    num_new: int


class Answered(NamedTuple):
    """New tokens of each request, and what our own engine counts: passes, and tokens and seconds of those passes that
    carry no rows of prompts."""

    answers: list[tuple[int, ...]]
    num_passes: int | None = None
    decoded: int = 0
    decode_s: float = 0.0


Arm = Callable[[list[Asked], int], Answered]
"""Answers requests, so many at a time."""


def our_arm(orthrus: Orthrus, strategy: str) -> Arm:
    config = decode_config(strategy=strategy, ignore_eos=True)  # type: ignore[arg-type]

    def run(asked: list[Asked], concurrency: int) -> Answered:
        # An engine of its own: nothing is left of an earlier run.
        engine = EngineBeside(orthrus.engine, reuse=False, max_running=concurrency)
        requests = [
            engine.submit(each.ids, replace(config, max_new_tokens=each.num_new), eos_token_ids=frozenset())
            for each in asked
        ]
        num_passes, num_begun, num_tokens, decoded, decode_s = 0, 0, 0, 0, 0.0
        while not all(request.closed for request in requests):
            started = perf_counter()
            engine.step()
            seconds = perf_counter() - started
            num_passes += 1
            before = num_begun, num_tokens
            num_begun = sum(bool(request.token_ids) for request in requests)
            num_tokens = sum(len(request.token_ids) for request in requests)
            # A pass carries a prompt where a request has no token after it, or its first.
            in_prompt = any(not request.token_ids for request in engine.scheduler.running)
            if not in_prompt and num_begun == before[0]:
                decoded += num_tokens - before[1]
                decode_s += seconds
        return Answered([tuple(request.token_ids) for request in requests], num_passes, decoded, decode_s)

    return run


def stock_arm(orthrus: Orthrus) -> Arm:
    model = orthrus.stock()

    def together(batch: list[Asked]) -> list[list[int]]:
        longest = max(len(each.ids) for each in batch)
        num_new = max(each.num_new for each in batch)
        gaps = [longest - len(each.ids) for each in batch]
        ids_BT = torch.tensor(
            [[0] * gap + each.ids for gap, each in zip(gaps, batch, strict=True)], device=model.device
        )
        mask_BT = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps], device=model.device)
        config = GenerationConfig(max_new_tokens=num_new, do_sample=False, pad_token_id=0, eos_token_id=None)
        generate: Any = model.generate
        new_BT = generate(ids_BT, attention_mask=mask_BT, generation_config=config)[:, longest:]
        return list(new_BT.tolist())

    return in_batches(together)


def llama_arm(side: LlamaSide) -> Arm:
    def together(batch: list[Asked]) -> list[tuple[int, ...]]:
        return side.decode_together([each.ids for each in batch], max(each.num_new for each in batch))

    return in_batches(together)


def in_batches(together: Callable[[list[Asked]], Sequence[Sequence[int]]]) -> Arm:
    """Each batch up to its longest answer; every answer is cut to its own length."""

    def run(asked: list[Asked], concurrency: int) -> Answered:
        batches = [asked[start : start + concurrency] for start in range(0, len(asked), concurrency)]
        return Answered(
            [
                tuple(ids[: each.num_new])
                for batch in batches
                for each, ids in zip(batch, together(batch), strict=True)
            ]
        )

    return run
