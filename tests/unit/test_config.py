"""Settings are checked where they are made, in one sentence."""

from typing import Any

import pytest

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.errors import UserInputError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": 1e-39}, "at least 1e-05"),
        ({"temperature": "1"}, "temperature must be a number"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_k": -1}, "top_k must be a positive number"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"min_p": 1.5}, "min_p must lie in"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be a whole number from 0"),
    ],
)
def test_wrong_sampling_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"strategy": "magic"}, "strategy must be one of ar, chain"),
        ({"block_size": 1}, "block_size must be at least 2"),
        ({"block_size": True}, "block_size must be a whole number"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"stop": ("",)}, "must not be empty"),
        ({"stop": (5,)}, "must be text"),
    ],
)
def test_wrong_decode_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        DecodeConfig(**settings)


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=1e-5).greedy
