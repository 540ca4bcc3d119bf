"""Penalties that count, and ends that wait, against plain arithmetic: one row at a time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthrus.config import SamplingParams
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.reference import reference_decode

VOCAB = 12
many = settings(max_examples=200, deadline=None, derandomize=True)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=8)


def slowly(
    params: SamplingParams,
    logits_V: Tensor,
    prompt: list[int],
    text: list[int],
    min_tokens: int,
    ends: list[int],
) -> Tensor:
    """One number at a time, as OpenAI's and vLLM's documents say it."""
    scores = logits_V.to(torch.float32, copy=True)
    for token in range(VOCAB):
        x = scores[token] + torch.tensor((params.logit_bias or {}).get(token, 0.0))
        if token in {*prompt, *text} and params.repetition_penalty != 1.0:
            x = x * params.repetition_penalty if x < 0 else x / params.repetition_penalty
        if token in text:
            count = torch.tensor(float(text.count(token)))
            x = x - params.frequency_penalty * count - params.presence_penalty
        scores[token] = -torch.inf if len(text) < min_tokens and token in ends else x
    return scores


PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -1.3, 2.0]),
    presence_penalty=st.sampled_from([0.0, 0.3, -2.0]),
    logit_bias=st.sampled_from([None, {1: 2.5, 11: -100.0}]),
)


@many
@given(params=PARAMS, prompt=IDS, text=IDS, paths=st.lists(IDS, min_size=1, max_size=4), data=st.data())
def test_each_row_is_what_its_own_text_makes_of_it(
    params: SamplingParams, prompt: list[int], text: list[int], paths: list[list[int]], data: Any
) -> None:
    """However the text is cut into prompt, commits and path; equal to the last bit."""
    min_tokens, ends = data.draw(st.integers(0, 12)), data.draw(st.sampled_from([[], [3], [3, 11]]))
    logits_RV = torch.randn(len(paths), VOCAB, generator=torch.Generator().manual_seed(len(prompt))) * 3
    rules = LogitRules(params, VOCAB, "cpu", min_tokens=min_tokens, end_ids=ends)
    cut = data.draw(st.integers(0, len(prompt)))
    rules.see_prompt(prompt[:cut])
    rules.see_prompt(prompt[cut:])
    cut = data.draw(st.integers(0, len(text)))
    rules.see(text[:cut])
    rules(logits_RV, paths)
    rules.see(text[cut:])
    expected = [
        slowly(params, row, prompt, [*text, *path], min_tokens, ends)
        for row, path in zip(logits_RV, paths, strict=True)
    ]
    assert torch.equal(rules(logits_RV, paths), torch.stack(expected))
    if not rules.active:
        assert rules(logits_RV, paths) is logits_RV


def test_rules_fall_silent_once_the_text_is_long_enough() -> None:
    rules = LogitRules(SamplingParams(), VOCAB, "cpu", min_tokens=2, end_ids=[3, 99])
    logits_RV = torch.zeros(3, VOCAB)
    assert rules.active
    assert rules(logits_RV, [[], [1], [1, 1]])[:, 3].isinf().tolist() == [True, True, False]
    rules.see([5, 5])
    assert not rules.active
    # Without tokens that could end the text there is nothing to hold back.
    assert not LogitRules(SamplingParams(), VOCAB, "cpu", min_tokens=2).active


def test_a_mask_comes_last_and_an_end_that_it_forces_may_come_early() -> None:
    rules = LogitRules(SamplingParams(logit_bias={4: 100.0}), VOCAB, "cpu", min_tokens=5, end_ids=[3])
    masks_RV = torch.zeros(3, VOCAB, dtype=torch.bool)
    masks_RV[0, [3, 7]] = masks_RV[1, 3] = masks_RV[2, [3, 7]] = True
    logits_RV = torch.arange(VOCAB).float().repeat(3, 1)
    before = logits_RV.clone()
    allowed = [
        row.isfinite().nonzero()[:, 0].tolist() for row in rules(logits_RV, [[], [], [7] * 5], masks_RV)
    ]
    assert allowed == [[7], [3], [3, 7]]
    assert torch.equal(logits_RV, before)
    # Masks alone make rules act that are not active.
    still = LogitRules(SamplingParams(), VOCAB, "cpu")
    assert not still.active
    assert still(logits_RV, [[], [], []], masks_RV).isfinite().tolist() == masks_RV.tolist()


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, seed=4)])
def test_the_oracle_obeys_all_of_them(params: SamplingParams) -> None:
    """Logits that always want token 3, the end: only the rules keep the text going."""

    def logits_of(token_ids_T: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.5, 1.0, 50.0, 0.2]).repeat(len(token_ids_T), 1)

    def even_after_odd(new_ids: list[int]) -> Tensor:
        return torch.tensor([i % 2 == len(new_ids) % 2 or i == 3 for i in range(5)])

    text = reference_decode(
        logits_of, [1, 1], 9, params, frozenset({3}), min_tokens=6, mask_after=even_after_odd
    )
    assert len(text) == 7
    assert text[-1] == 3
    assert [token % 2 for token in text[:6]] == [0, 1] * 3
