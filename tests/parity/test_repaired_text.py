"""A repair head never changes the text, whatever it says: it only changes which drafts are checked."""

from dataclasses import replace

import pytest
import torch
from tests.engines import decode
from tests.tiny import tiny_dual, tiny_prompt
from tests.ways import WAYS

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.decoding.reference import reference_decode
from orthrus.model.dual_view import DualView
from orthrus.types import GenerationResult

NUM_NEW = 20
PROMPT = tiny_prompt(12, seed=4)
SETTINGS = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=1.0, seed=3),
    "filters": SamplingParams(temperature=1.4, top_k=20, top_p=0.95, min_p=0.02, seed=4),
    "penalty": SamplingParams(temperature=0.5, seed=5, repetition_penalty=1.4, logit_bias={7: -100.0}),
}


def texts(dual: DualView, params: SamplingParams) -> list[GenerationResult]:
    config = DecodeConfig(max_new_tokens=NUM_NEW, sampling=params, node_budget=12)
    return [decode(dual, PROMPT, replace(config, strategy=strategy, floor=floor)) for strategy, floor in WAYS]


@pytest.mark.parametrize("amount", [0.2, 3.0], ids=["some say", "no sense"])
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "qwen3-sliding"])
def test_every_strategy_writes_the_reference_text(name: str, params: SamplingParams, amount: float) -> None:
    plain, headed = tiny_dual(name, disturb=0.1), tiny_dual(name, disturb=0.1)
    headed.add_repair(6)
    model = headed.stock()
    with torch.inference_mode():
        assert headed.repair is not None
        headed.repair.out.weight.normal_(0.0, amount, generator=torch.Generator().manual_seed(1))
        expected = reference_decode(lambda ids_T: model(ids_T[None]).logits[0], PROMPT, NUM_NEW, params)
    without, results = texts(plain, params), texts(headed, params)
    assert [list(r.token_ids) for r in results] == [expected] * len(WAYS)
    pairs = list(zip(without, results, strict=True))
    assert any(a.stats.num_accepted != b.stats.num_accepted for a, b in pairs), "the head drafts nothing new"
    if amount < 1:
        assert sum(r.stats.num_accepted for r in results) > 0
