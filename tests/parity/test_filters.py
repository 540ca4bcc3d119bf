"""Temperature, top-k, top-p and min-p against transformers' own warpers."""

from collections.abc import Iterator

import pytest
import torch
from tests.parity.test_sampling_law import EVERY_SETTING
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orthrus.config import SamplingParams
from orthrus.decoding.sampling import filtered_probs


def warpers(params: SamplingParams) -> Iterator[object]:
    """In the order in which transformers' own `generate` applies them."""
    yield TemperatureLogitsWarper(params.temperature)
    if params.top_k:
        yield TopKLogitsWarper(params.top_k)
    if params.top_p is not None and params.top_p < 1.0:
        yield TopPLogitsWarper(params.top_p)
    if params.min_p:
        yield MinPLogitsWarper(params.min_p)


@EVERY_SETTING
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_the_filter_is_transformers_own(params: SamplingParams, spread: float) -> None:
    logits_RV = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * spread
    warp = LogitsProcessorList(warpers(params))
    expected_RV = warp(torch.zeros(64, 1, dtype=torch.long), logits_RV.clone()).softmax(-1)
    probs_RV = filtered_probs(logits_RV, params)
    assert torch.equal(probs_RV > 0, expected_RV > 0)
    torch.testing.assert_close(probs_RV, expected_RV)


@pytest.mark.parametrize("filters", [{"top_k": 0}, {"top_k": 99}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_filters_that_are_off_change_nothing(filters: dict[str, float]) -> None:
    logits_RV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    probs_RV = filtered_probs(logits_RV, SamplingParams(temperature=0.7, **filters))  # type: ignore[arg-type]
    assert probs_RV.dtype == torch.float32
    torch.testing.assert_close(probs_RV, (logits_RV.float() / 0.7).softmax(-1))
