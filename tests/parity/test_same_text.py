"""One seed, one text: every strategy writes what plain drawing with the stock model writes, token for token.

The sampled side is the slow oracle over the stock model's own forward; the greedy side, with a repetition
penalty and a logit bias, is transformers' own `generate`.
"""

from functools import cache

import pytest
import torch
from tests.engines import decode
from tests.tiny import FAMILY_CONFIGS, tiny_dual, tiny_prompt
from tests.ways import WAYS

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.decoding.reference import reference_decode
from orthrus.model.dual_view import DualView
from orthrus.types import GenerationResult

NUM_NEW = 20
PROMPT = tiny_prompt(15, seed=5)
PENALTY, BIAS = 1.4, {7: -100.0, 11: 1.5}
SETTINGS = {
    "temperature 1": SamplingParams(temperature=1.0, seed=3),
    "filters": SamplingParams(temperature=1.4, top_k=20, top_p=0.95, min_p=0.02, seed=4),
    "rules": SamplingParams(temperature=0.5, seed=5, repetition_penalty=PENALTY, logit_bias=BIAS, top_k=30),
}
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILY_CONFIGS)


@cache
def dual_of(name: str) -> DualView:
    return tiny_dual(name, disturb=0.1)


def texts(name: str, params: SamplingParams) -> list[GenerationResult]:
    return [
        decode(
            dual_of(name),
            PROMPT,
            DecodeConfig(
                max_new_tokens=NUM_NEW, strategy=strategy, floor=floor, sampling=params, node_budget=12
            ),
        )
        for strategy, floor in WAYS
    ]


def agree_and_draft(results: list[GenerationResult], expected: list[int]) -> None:
    assert [list(r.token_ids) for r in results] == [expected] * len(WAYS)
    for (strategy, _), result in zip(WAYS, results, strict=True):
        assert (result.stats.num_accepted > 0) == (strategy != "ar")


@EVERY_FAMILY
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
def test_sampled_text_is_a_function_of_the_seed(name: str, params: SamplingParams) -> None:
    model = dual_of(name).stock()
    with torch.inference_mode():
        expected = reference_decode(lambda ids_T: model(ids_T[None]).logits[0], PROMPT, NUM_NEW, params)
    assert len(set(expected)) >= 3
    agree_and_draft(texts(name, params), expected)


@EVERY_FAMILY
def test_greedy_text_under_penalty_and_bias_is_transformers_own(name: str) -> None:
    ids_1T = torch.tensor([PROMPT])
    options = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = dual_of(name).stock()
    model.generation_config.eos_token_id = None
    free_1T, expected_1T = (
        model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **options, **rules)
        for rules in (
            {},
            {"repetition_penalty": PENALTY, "sequence_bias": [[[i], v] for i, v in BIAS.items()]},
        )
    )
    expected = expected_1T[0, len(PROMPT) :].tolist()
    assert expected != free_1T[0, len(PROMPT) :].tolist()
    params = SamplingParams(repetition_penalty=PENALTY, logit_bias=BIAS)
    agree_and_draft(texts(name, params), expected)


def test_a_bias_bans_a_token_wherever_it_would_have_stood() -> None:
    free = texts("llama", SamplingParams())[0].token_ids
    for token_id in set(free):
        for params in (SamplingParams(), SamplingParams(temperature=1.0, seed=1)):
            banned = SamplingParams(
                temperature=params.temperature, seed=params.seed, logit_bias={token_id: -100.0}
            )
            results = texts("llama", banned)
            assert len({r.token_ids for r in results}) == 1
            assert token_id not in results[0].token_ids
