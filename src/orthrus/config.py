"""Typed settings: one frozen dataclass per component; every value is checked where it is made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from orthrus.errors import UserInputError

Strategy = Literal["ar", "chain", "tree", "fused", "fused_tree", "auto"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
FIXED_STRATEGIES: tuple[Strategy, ...] = tuple(s for s in STRATEGIES if s != "auto")
"""Those that decode every cycle alike."""
Baseline = Literal["stock", "plain"]
"""What an audit compares with: the stock model's own `generate`, or strategy `ar` by the same runner."""
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
LEAST_TEMPERATURE = 1e-5
# Beyond these a logit divided by the least temperature overflows fp32.
LARGEST_PENALTY = 1e3
LARGEST_BIAS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is drawn from a row of logits; temperature 0 is greedy and ignores the filters.

    Applied in this order, as in transformers: logit bias and repetition penalty (for greedy decoding too),
    temperature, top-k, top-p, min-p. `logit_bias` maps token ids to what is added to their logits: -100 all
    but bans a token. `repetition_penalty` above 1 makes tokens of the prompt and the text so far less likely.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
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
        # A copy of our own, so that nobody changes it behind our back.
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """One request: how much to generate, with which strategy, and when to stop.

    `block_size`: rows of a drafted block, for auto the most; None means as many as the view was trained with,
    of which the last one guesses nothing (see docs/metrics.md). `floor` lets a draft pass carry the
    anchor as an AR row too, so that every pass commits at least one token; False gives the cycle of the
    paper (arXiv 2605.12825, section 3) in the fixed strategies, auto always has the floor. `node_budget`:
    the most drafts that a pass of `tree` or `fused_tree` verifies. `block_budget`: the most blocks that a
    pass of `fused` or `fused_tree` drafts beside them. No setting but `sampling` can change the text.
    """

    max_new_tokens: int = 256
    strategy: Strategy = "auto"
    block_size: int | None = None
    floor: bool = True
    node_budget: int = 24
    block_budget: int = 3
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    prefill_chunk: int = 512
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "block_size", "node_budget", "block_budget", "prefill_chunk"):
            _whole(name, getattr(self, name))
        if any(not isinstance(text, str) for text in self.stop):
            raise UserInputError("stop strings must be text.")
        for name in ("max_new_tokens", "node_budget", "block_budget", "prefill_chunk"):
            if getattr(self, name) is None or getattr(self, name) < 1:
                raise UserInputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.strategy not in STRATEGIES:
            raise UserInputError(f"strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy!r}.")
        if self.block_size is not None and self.block_size < 2:
            raise UserInputError(
                f"block_size must be at least 2 (an anchor and one mask), not {self.block_size}; "
                "for plain decoding choose strategy='ar'."
            )
        if any(not text for text in self.stop):
            raise UserInputError("a stop string must not be empty.")


def _whole(name: str, value: int | None) -> None:
    if value is not None and type(value) is not int:
        raise UserInputError(f"{name} must be a whole number, not {value!r}.")


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
