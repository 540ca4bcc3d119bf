"""Logit bias and repetition penalty against transformers' own processors, row by row."""

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from orthrus.config import SamplingParams
from orthrus.decoding.processors import LogitRules
from orthrus.errors import UserInputError

VOCAB = 40
COMMITTED = [3, 7, 7, 0, 39, 3]
# As in a draft tree: the anchor's row, two siblings, a child that repeats its parent, one the prompt.
PATHS = [[], [5], [8], [5, 5], [8, 3, 21]]
SETTINGS = {
    "penalty": SamplingParams(repetition_penalty=1.3),
    "reward": SamplingParams(repetition_penalty=0.4),
    "bias": SamplingParams(logit_bias={0: -100.0, 5: 2.5, 39: -1.0}),
    "both": SamplingParams(repetition_penalty=1.7, logit_bias={3: 6.0, 8: -6.0, 30: 1.0}),
    "neither": SamplingParams(),
}


def processors(params: SamplingParams) -> LogitsProcessorList:
    """In the order in which transformers' `generate` applies them."""
    chosen = LogitsProcessorList()
    if params.logit_bias:
        chosen.append(SequenceBiasLogitsProcessor([[[i], v] for i, v in params.logit_bias.items()]))
    if params.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    return chosen


def expected(params: SamplingParams, logits_RV: Tensor, paths: list[list[int]]) -> Tensor:
    rows = []
    for logits_V, path in zip(logits_RV, paths, strict=True):
        seen_1T = torch.tensor([[*COMMITTED, *path]])
        rows.append(processors(params)(seen_1T, logits_V[None].to(torch.float32, copy=True)))
    return torch.cat(rows)


def rules_for(params: SamplingParams) -> LogitRules:
    rules = LogitRules(params, VOCAB, "cpu")
    rules.see_prompt(COMMITTED[:4])
    rules.see(COMMITTED[4:])
    return rules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
def test_the_rules_are_transformers_own(params: SamplingParams, dtype: torch.dtype) -> None:
    rules = rules_for(params)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits_RV = (torch.randn(len(PATHS), VOCAB, generator=generator) * 5).to(dtype)
        logits_RV[:, 7] = -torch.inf
        logits_RV[0, 3] = 0.0
        assert torch.equal(rules(logits_RV, PATHS).float(), expected(params, logits_RV, PATHS))


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)
def test_random_paths(params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(0)
    rules = rules_for(params)
    for length in range(8):
        paths = torch.randint(VOCAB, (12, length), generator=generator).tolist()
        logits_RV = torch.randn(12, VOCAB, generator=generator)
        assert torch.equal(rules(logits_RV, paths), expected(params, logits_RV, paths))


def test_a_path_counts_for_its_own_row_only_and_is_not_remembered() -> None:
    rules = rules_for(SamplingParams(repetition_penalty=2.0))
    logits_RV = torch.ones(2, VOCAB)
    once = rules(logits_RV, [[20], [21]])
    assert once[0, 20] == once[1, 21] == 0.5
    assert once[0, 21] == once[1, 20] == 1.0
    assert rules(logits_RV, [[], []])[:, 20:22].eq(1.0).all()
    # Committed and on the path: still once.
    assert rules(logits_RV, [[3, 3], [7]])[:, 3].eq(0.5).all()


def test_the_logits_given_stay_as_they_are() -> None:
    rules = rules_for(SETTINGS["both"])
    logits_RV = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    before = logits_RV.clone()
    assert not torch.equal(rules(logits_RV, PATHS), before)
    assert torch.equal(logits_RV, before)


def test_without_rules_nothing_is_copied() -> None:
    rules = rules_for(SamplingParams(temperature=0.7))
    logits_RV = torch.randn(5, VOCAB).bfloat16()
    assert not rules.active
    assert rules(logits_RV, PATHS) is logits_RV
    assert all(rules_for(SETTINGS[name]).active for name in ("penalty", "bias", "both"))


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    params = SamplingParams(logit_bias={VOCAB - 1: 1.0, VOCAB: -1.0})
    with pytest.raises(UserInputError, match=r"token 40, but the model's ids end at 39; use ids"):
        LogitRules(params, VOCAB, "cpu")
    LogitRules(params, VOCAB + 1, "cpu")
