"""Settings are checked where they are made, in one sentence."""

import json
import pickle
from dataclasses import asdict, replace
from typing import Any

import pytest

from orthrus.config import LONGEST_GRAMMAR, DecodeConfig, Grammar, SamplingParams
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
        ({"repetition_penalty": 0}, "repetition_penalty must be a number from 0.001 to 1000"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be a number"),
        ({"repetition_penalty": "1.2"}, "where 1 is off, not '1.2'"),
        ({"repetition_penalty": None}, "repetition_penalty must be a number"),
        (
            {"frequency_penalty": 2.1},
            "frequency_penalty must be a number from -2 to 2, where 0 is off, not 2.1",
        ),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a number"),
        ({"presence_penalty": -3}, "presence_penalty must be a number from -2 to 2"),
        ({"presence_penalty": True}, "presence_penalty must be a number"),
        ({"presence_penalty": None}, "presence_penalty must be a number"),
        ({"logit_bias": [(5, 1.0)]}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"5": 1.0}}, "a token id of logit_bias must be a whole number from 0, not '5'"),
        ({"logit_bias": {-1: 1.0}}, "must be a whole number from 0, not -1"),
        ({"logit_bias": {True: 1.0}}, "must be a whole number from 0, not True"),
        ({"logit_bias": {5: float("-inf")}}, "logit_bias of token 5 must be a number from"),
        ({"logit_bias": {5: float("nan")}}, "-100 all but bans a token"),
        ({"logit_bias": {5: None}}, "logit_bias of token 5 must be a number"),
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
        ({"max_new_tokens": None}, "max_new_tokens must be at least 1"),
        ({"node_budget": 0}, "node_budget must be at least 1, not 0"),
        ({"node_budget": 1.5}, "node_budget must be a whole number"),
        ({"block_budget": 0}, "block_budget must be at least 1, not 0"),
        ({"node_budget": 257}, "node_budget must be at most 256, not 257"),
        ({"block_budget": 9}, "block_budget must be at most 8, not 9"),
        ({"block_budget": "3"}, "block_budget must be a whole number"),
        ({"stop": ("",)}, "must not be empty"),
        ({"stop": (5,)}, "must be text"),
        ({"min_tokens": -1}, r"min_tokens must be a whole number from 0 to max_new_tokens \(256\), not -1"),
        ({"min_tokens": 1.0}, "min_tokens must be a whole number"),
        ({"min_tokens": 9, "max_new_tokens": 8}, r"max_new_tokens \(8\), not 9"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, not 5"),
        ({"stop_token_ids": None}, "stop_token_ids must be a list"),
        ({"stop_token_ids": ("5",)}, "a stop token id must be a whole number from 0, not '5'"),
        ({"stop_token_ids": (-1,)}, "a stop token id must be a whole number from 0, not -1"),
        ({"stop_token_ids": (True,)}, "a stop token id must be a whole number from 0, not True"),
        ({"logprobs": 21}, "logprobs must be a whole number from 0 to 20, or None"),
        ({"logprobs": -1}, "logprobs must be a whole number"),
        ({"logprobs": True}, "logprobs must be a whole number"),
        ({"copies": 1}, "copies must be True or False, not 1"),
        ({"priority": 0.5}, "priority must be a whole number, not 0.5"),
        ({"priority": None}, "priority must be a whole number"),
        ({"grammar": "[0-9]+"}, "grammar must be a Grammar or None"),
        ({"grammar": Grammar("regex", "a"), "ignore_eos": True}, "ignore_eos and grammar exclude each other"),
    ],
)
def test_wrong_decode_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        DecodeConfig(**settings)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("yaml", "a: 1", "the kind of a grammar must be one of json_schema, regex, lark, json_object"),
        (["regex"], "a", "the kind of a grammar must be one of"),
        ("regex", b"a", "a grammar must be given as text"),
        ("regex", "", "the regex grammar is empty"),
        ("lark", " \n", "the lark grammar is empty"),
        ("json_object", "{}", "json_object takes no text"),
        ("json_schema", "{'type': 1}", "the JSON schema is not JSON"),
        ("json_schema", "[]", "a JSON schema must be an object"),
        ("json_schema", '{"a":' * 10_000, "the JSON schema is nested too deeply"),
        ("regex", "a" * (LONGEST_GRAMMAR + 1), f"has {LONGEST_GRAMMAR + 1} characters, but may have"),
    ],
)
def test_wrong_grammars(kind: Any, text: Any, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        Grammar(kind, text)


def test_settings_with_everything_are_values() -> None:
    config = DecodeConfig(stop_token_ids=[7, 8], grammar=Grammar("regex", "a+"), logprobs=0)  # type: ignore[arg-type]
    assert config.stop_token_ids == (7, 8)
    assert hash(config) == hash(replace(config))
    assert pickle.loads(pickle.dumps(config)) == config
    assert json.loads(json.dumps(asdict(config)))["grammar"] == {
        "kind": "regex",
        "text": "a+",
        "compact": False,
    }


def test_a_logit_bias_is_copied_and_leaves_settings_comparable() -> None:
    given = {7: 2, 5: -100.0}
    params = SamplingParams(logit_bias=given)
    given[9] = 1.0
    assert params.logit_bias == {5: -100.0, 7: 2.0}
    same = SamplingParams(logit_bias={5: -100, 7: 2.0})
    assert params == same
    assert hash(params) == hash(same)
    assert params != SamplingParams(logit_bias={5: -100})
    assert json.loads(json.dumps(asdict(params)))["logit_bias"] == {"5": -100.0, "7": 2.0}
    assert replace(params, seed=3).logit_bias == params.logit_bias
    assert pickle.loads(pickle.dumps(params)) == params
    assert SamplingParams(logit_bias={}) == SamplingParams()


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=1e-5).greedy
