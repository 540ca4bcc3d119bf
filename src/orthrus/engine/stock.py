"""The baseline of benchmarks and audits: the stock model's own decoding, timed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from orthrus.base.devices import synchronize


@dataclass(frozen=True, slots=True)
class StockRun:
    """`token_ids`: new tokens, the end-of-sequence token included. Times in ms, as in DecodeStats."""

    token_ids: tuple[int, ...]
    ttft_ms: float
    decode_ms: float


def stock_generate(
    model: PreTrainedModel,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    eos_token_ids: frozenset[int],
    temperature: float = 0.0,
    seed: int = 0,
    processor: LogitsProcessor | None = None,
    cache: Cache | None = None,
    **settings: Any,
) -> StockRun:
    """Decode with the model's own `generate`, its default cache, and no sampling setting except the temperature.

    processor: changes each token's scores before `generate` chooses. cache: an empty one to use in place of the
    default. settings: further fields of its GenerationConfig, such as prompt_lookup_num_tokens. Pass the model of
    `Orthrus.stock()`; a model with twins would not be the stock model.
    """
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    clock = _FirstToken(ids_1T.device)
    config = _config(max_new_tokens, eos_token_ids, temperature, settings)
    with _own_generation_config(model, config), _seeded(seed, ids_1T.device):
        synchronize(ids_1T.device)
        start = perf_counter()
        # Any, because the type that `generate` returns depends on its settings.
        generate: Any = model.generate
        new_ids = generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            stopping_criteria=StoppingCriteriaList([clock]),
            logits_processor=LogitsProcessorList([] if processor is None else [processor]),
            **({} if cache is None else {"past_key_values": cache}),
        )[0, len(prompt_ids) :].tolist()
        end = perf_counter()
    return StockRun(tuple(new_ids), (clock.at - start) * 1e3, (end - clock.at) * 1e3)


class _FirstToken(StoppingCriteria):
    """Records the time of the first token, and never stops. (A streamer would copy every token.)"""

    def __init__(self, device: torch.device) -> None:
        self._go_on_1 = torch.zeros(1, dtype=torch.bool, device=device)
        self.at = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        if not self.at:
            synchronize(self._go_on_1.device)
            self.at = perf_counter()
        return self._go_on_1


def _config(
    max_new_tokens: int, eos_token_ids: frozenset[int], temperature: float, settings: dict[str, Any]
) -> GenerationConfig:
    eos = sorted(eos_token_ids)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0.0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    sampling |= settings
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=eos or None, pad_token_id=eos[0] if eos else 0, **sampling
    )


@contextmanager
def _own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Replace the checkpoint's settings (penalties, filters), with which `generate` would fill gaps of the config."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
