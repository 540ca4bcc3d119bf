"""Typed settings: one frozen dataclass per component; every value is checked where it is made."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from orthrus.errors import UserInputError

Strategy = Literal["ar", "chain", "tree", "fused", "fused_tree", "auto"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
DRAFTING = ("strategy", "block_size", "floor", "node_budget", "block_budget", "copies")
"""Settings of a request that control drafting. They do not change the text."""
FIXED_STRATEGIES: tuple[Strategy, ...] = tuple(s for s in STRATEGIES if s != "auto")
"""The strategies that decode every cycle in the same way."""
Baseline = Literal["stock", "plain"]
"""The baseline of an audit: the stock model's own `generate`, or strategy `ar` by the same runner."""
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
LEAST_TEMPERATURE = 1e-5
# Beyond these a logit divided by the least temperature overflows fp32.
LARGEST_PENALTY = 1e3
LARGEST_BIAS = 1e9
MOST_NODES, MOST_BLOCKS = 256, 8
"""The largest budgets of a pass. Its time and memory grow with the square of its rows."""
# What OpenAI's interface and vLLM allow.
LARGEST_COUNT_PENALTY = 2.0
MOST_LOGPROBS = 20
GrammarKind = Literal["json_schema", "regex", "lark", "json_object"]
GRAMMAR_KINDS: tuple[GrammarKind, ...] = get_args(GrammarKind)
LONGEST_GRAMMAR = 2**16
"""Characters of a grammar's text: far more than schemas that people write, little enough to compile soon."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is drawn from a row of logits; temperature 0 is greedy and ignores the filters.

    Applied in this order, as in transformers and vLLM: logit bias, repetition penalty, frequency and presence
    penalty (these for greedy decoding too), temperature, top-k, top-p, min-p. `logit_bias` maps token ids to what
    is added to their logits: -100 all but bans a token. `repetition_penalty` above 1 makes tokens of the prompt
    and the text so far less likely. `frequency_penalty` is subtracted from a token's logit once for each
    occurrence of the token in the text so far, without the prompt. `presence_penalty` is subtracted once if the
    token occurs there at all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    # A dict has no hash; equal settings still have equal hashes without it.
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        _whole("top_k", self.top_k)
        _whole("seed", self.seed)
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not _is_number(value):
                raise UserInputError(f"{name} must be a number, not {value!r}.")
        if 0.0 < self.temperature < LEAST_TEMPERATURE:
            # Logits divided by less overflow fp32.
            raise UserInputError(
                f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}, not {self.temperature}."
            )
        if not 0.0 <= self.temperature < float("inf"):
            raise UserInputError(
                f"temperature must be 0 (greedy) or a positive number, not {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 0:
            raise UserInputError(f"top_k must be a positive number, or 0 to switch it off, not {self.top_k}.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UserInputError(f"top_p must lie in (0, 1], not {self.top_p}.")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise UserInputError(f"min_p must lie in [0, 1], not {self.min_p}.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserInputError(f"seed must be a whole number from 0 to 2**63 - 1, not {self.seed}.")
        penalty = self.repetition_penalty
        if not _is_number(penalty) or not 1.0 / LARGEST_PENALTY <= penalty <= LARGEST_PENALTY:
            raise UserInputError(
                f"repetition_penalty must be a number from {1.0 / LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}, "
                f"where 1 is off, not {penalty!r}."
            )
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not abs(value) <= LARGEST_COUNT_PENALTY:
                raise UserInputError(
                    f"{name} must be a number from {-LARGEST_COUNT_PENALTY:g} to {LARGEST_COUNT_PENALTY:g}, "
                    f"where 0 is off, not {value!r}."
                )
        # A copy of our own, so that nobody changes it behind our back.
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Grammar:
    """The format that a text must have, described by `text` in the language that `kind` names.

    "json_schema": a JSON Schema; "regex": a regular expression that the whole text matches; "lark": a context-free
    grammar in llguidance's dialect of Lark, with the rule `start`; "json_object": any JSON object, with no text.
    `text` is checked when it is compiled for a model. compact: JSON has no whitespace between its parts; otherwise
    a space, or a line break and an indent, is allowed there.
    """

    kind: GrammarKind
    text: str = ""
    compact: bool = False

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS:
            raise UserInputError(
                f"the kind of a grammar must be one of {', '.join(GRAMMAR_KINDS)}, not {self.kind!r}."
            )
        if not isinstance(self.text, str):
            raise UserInputError(f"a grammar must be given as text, not {self.text!r}.")
        if type(self.compact) is not bool or (self.compact and self.kind in ("regex", "lark")):
            raise UserInputError(
                f"compact is True or False, for json_schema and json_object, not {self.compact!r} for {self.kind}."
            )
        if self.kind == "json_object":
            if self.text:
                raise UserInputError("json_object takes no text; give a schema as json_schema.")
            return
        if not self.text.strip():
            raise UserInputError(f"the {self.kind} grammar is empty; leave it out, or say what is allowed.")
        if len(self.text) > LONGEST_GRAMMAR:
            raise UserInputError(
                f"the {self.kind} grammar has {len(self.text)} characters, but may have {LONGEST_GRAMMAR}; "
                "shorten it."
            )
        if self.kind == "json_schema" and not isinstance(_parsed_json(self.text), dict):
            raise UserInputError('a JSON schema must be an object, as in {"type": "object"}.')


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One request: how much to generate, with which strategy, and when to stop.

    `block_size`: rows of a draft block, for auto the maximum. None means as many as in the view's training; then the
    last row guesses nothing (see docs/metrics.md). With `floor`, a draft pass also carries the anchor as an AR row, so
    that every pass commits at least one token. False gives the cycle of the paper (arXiv 2605.12825, section 3) in the
    fixed strategies; auto always has the floor. `node_budget`: the most drafts that a pass of `tree` or `fused_tree`
    verifies, up to MOST_NODES. `block_budget`: the most blocks that such a pass of `fused` or `fused_tree` also drafts,
    up to MOST_BLOCKS. `copies` lets `auto` draft copies of what followed an earlier occurrence of the last tokens.
    `priority`: requests with a lower value go first. None of these changes the text.

    `min_tokens`: neither a token nor a stop string ends the text before it has so many new tokens.
    `stop_token_ids`: tokens that end the text, in addition to the model's own end-of-text tokens; the token that
    ended it is kept in `token_ids`. `grammar`: the text conforms to it; if it allows nothing but the end,
    `min_tokens` has no effect. `logprobs`: report the log probability of each token and those of so many most
    probable tokens, from the model's own distribution, before `sampling`.
    """

    max_new_tokens: int = 256
    strategy: Strategy = "auto"
    block_size: int | None = None
    floor: bool = True
    node_budget: int = 24
    block_budget: int = 3
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    grammar: Grammar | None = None
    logprobs: int | None = None
    copies: bool = True
    priority: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "block_size", "node_budget", "block_budget"):
            _whole(name, getattr(self, name))
        if any(not isinstance(text, str) for text in self.stop):
            raise UserInputError("stop strings must be text.")
        for name in ("max_new_tokens", "node_budget", "block_budget"):
            if getattr(self, name) is None or getattr(self, name) < 1:
                raise UserInputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name, most in (("node_budget", MOST_NODES), ("block_budget", MOST_BLOCKS)):
            if getattr(self, name) > most:
                raise UserInputError(f"{name} must be at most {most}, not {getattr(self, name)}.")
        if self.strategy not in STRATEGIES:
            raise UserInputError(f"strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}.")
        if self.block_size is not None and self.block_size < 2:
            raise UserInputError(
                f"block_size must be at least 2 (an anchor and one mask), not {self.block_size}; "
                "for plain decoding choose strategy='ar'."
            )
        if any(not text for text in self.stop):
            raise UserInputError("a stop string must not be empty.")
        self._check_tokens()
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise UserInputError(f"grammar must be a Grammar or None, not {self.grammar!r}.")
        if self.grammar is not None and self.ignore_eos:
            raise UserInputError(
                "ignore_eos and grammar exclude each other, since a text that is complete can only end; "
                "drop one of them."
            )
        if type(self.copies) is not bool:
            raise UserInputError(f"copies must be True or False, not {self.copies!r}.")
        if type(self.priority) is not int:
            raise UserInputError(f"priority must be a whole number, not {self.priority!r}.")

    def _check_tokens(self) -> None:
        """Settings that speak of tokens: when they may end the text, and what is reported of each."""
        ids = self.stop_token_ids
        if not isinstance(ids, list | tuple):
            raise UserInputError(f"stop_token_ids must be a list of token ids, not {ids!r}.")
        for token_id in ids:
            if type(token_id) is not int or token_id < 0:
                raise UserInputError(f"a stop token id must be a whole number from 0, not {token_id!r}.")
        # A tuple of our own, so that nobody changes it behind our back.
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        if type(self.min_tokens) is not int or not 0 <= self.min_tokens <= self.max_new_tokens:
            raise UserInputError(
                f"min_tokens must be a whole number from 0 to max_new_tokens ({self.max_new_tokens}), "
                f"not {self.min_tokens!r}."
            )
        if self.logprobs is not None and (
            type(self.logprobs) is not int or not 0 <= self.logprobs <= MOST_LOGPROBS
        ):
            raise UserInputError(
                f"logprobs must be a whole number from 0 to {MOST_LOGPROBS}, or None to switch them off, "
                f"not {self.logprobs!r}."
            )


def _whole(name: str, value: int | None) -> None:
    if value is not None and type(value) is not int:
        raise UserInputError(f"{name} must be a whole number, not {value!r}.")


def _parsed_json(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserInputError(f"the JSON schema is not JSON: {error}; correct it there.") from None
    except RecursionError:
        raise UserInputError("the JSON schema is nested too deeply; flatten it.") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked_bias(bias: Mapping[int, float] | None) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise UserInputError(f"logit_bias must map token ids to numbers, as in {{42: -100}}, not {bias!r}.")
    for token_id, value in bias.items():
        if type(token_id) is not int or token_id < 0:
            raise UserInputError(f"a token id of logit_bias must be a whole number from 0, not {token_id!r}.")
        if not _is_number(value) or math.isnan(value) or abs(value) > LARGEST_BIAS:
            raise UserInputError(
                f"logit_bias of token {token_id} must be a number from {-LARGEST_BIAS:g} to {LARGEST_BIAS:g} "
                f"(-100 all but bans a token), not {value!r}."
            )
    return {token_id: float(value) for token_id, value in sorted(bias.items())} or None
