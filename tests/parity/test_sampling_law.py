"""Sampled text has exactly the base model's law, whatever the filter; a biased verifier is caught.

Three tokens in a row are drawn many times and compared with the law enumerated by the slow oracle, by a
chi-square test at significance 1e-3. `smallest_effect` says which deviation that many draws would show with
power 0.99: Cohen's w, the root of the sum over outcomes of (p' - p)^2 / p.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from orthrus.decoding.verify import Verdict, verify_rejection
from scipy import stats
from scipy.optimize import brentq
from tests.tiny import disturb_view
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from orthrus.base.families import find_family
from orthrus.config import DecodeConfig, SamplingParams
from orthrus.decoding.reference import reference_law
from orthrus.decoding.sampling import draw, filtered_probs
from orthrus.engine import cycles
from orthrus.engine.state import DecodeState
from orthrus.engine.stream import TokenStream
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, prefill
from orthrus.model.slot_cache import SlotCache
from orthrus.model.view_config import ViewConfig

VOCAB, DEPTH, BLOCK_SIZE = 7, 3, 5
PROMPT = [1, 4, 2, 6, 3]
SIGNIFICANCE, POWER = 1e-3, 0.99
NUM_DRAWS, EFFECT = 2000, 0.22
SETTINGS = {
    "temperature": SamplingParams(temperature=0.9),
    "top-k": SamplingParams(temperature=1.2, top_k=3),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8),
    "min-p": SamplingParams(temperature=1.0, min_p=0.15),
    "all filters": SamplingParams(temperature=1.3, top_k=5, top_p=0.9, min_p=0.05),
}
EVERY_SETTING = pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS)


@cache
def dual() -> DualView:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.4)
    built = DualView(model, find_family(model), ViewConfig(block_size=BLOCK_SIZE, mask_token_id=0))
    disturb_view(built, 0.7)
    return built


@cache
def law(params: SamplingParams) -> dict[tuple[int, ...], float]:
    with dual().stock() as model, torch.inference_mode():
        return reference_law(lambda ids_T: model(ids_T[None]).logits[0], PROMPT, DEPTH, params)


class Remembering:
    """Stands in for the dual view: a pass with the same rows over the same history is computed once.

    The cache it is given only counts; each new case runs on a fresh one. That logits depend on the history
    alone is what tests/unit/test_slot_cache.py shows.
    """

    def __init__(self) -> None:
        self.device, self.mask_token_id = torch.device("cpu"), dual().mask_token_id
        self._tokens: dict[int, int] = {}
        self._known: dict[tuple[object, ...], Tensor] = {}

    def history(self, token_ids: list[int]) -> None:
        self._tokens = dict(enumerate(token_ids))

    def run(self, p: Pass, counter: SlotCache) -> Tensor:
        length, ids = counter.lengths[0], p.token_ids_BT[0].tolist()
        past = tuple(self._tokens[slot] for slot in range(length))
        key = (past, *ids, p.num_ar_rows, len(p.logit_rows_R))
        if key not in self._known:
            fresh = dual().new_cache(64)
            if past:
                dual().run(prefill(torch.tensor([past]), [0]), fresh)
                fresh.commit(length)
            self._known[key] = dual().run(p, fresh)
        ar_slots = p.slots_BT[0, : p.num_ar_rows].tolist()
        self._tokens |= zip(ar_slots, ids[: p.num_ar_rows], strict=True)
        return self._known[key]


def sample(
    params: SamplingParams, strategy: str, floor: bool, num_draws: int
) -> tuple[Counter[tuple[int, ...]], float]:
    """Continuations of PROMPT by the engine's own cycles, and the share of drafts that stood."""
    view = Remembering()
    state = DecodeState(
        dual=view,  # type: ignore[arg-type]
        cache=dual().new_cache(64),
        sampling=params,
        generator=torch.Generator().manual_seed(0),
        block_size=BLOCK_SIZE,
        floor=floor,
        context_length=64,
        anchor_11=torch.tensor([[PROMPT[-1]]]),
    )
    seen: Counter[tuple[int, ...]] = Counter()
    num_drafted = num_accepted = 0
    for _ in range(num_draws):
        view.history(PROMPT[:-1])
        state.cache.lengths = [len(PROMPT) - 1]
        state.anchor_11 = torch.tensor([[PROMPT[-1]]])
        ids: list[int] = []
        while len(ids) < DEPTH:
            step = cycles.ar_cycle(state) if strategy == "ar" else cycles.chain_cycle(state, room=32)
            ids += step.token_ids
            num_drafted += step.num_drafted
            num_accepted += sum(step.is_draft)
        seen[tuple(ids[:DEPTH])] += 1
    return seen, num_accepted / max(1, num_drafted)


def chi_square(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """p-value and degrees of freedom; outcomes that are expected less than five times count as one."""
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-5)
    if not seen.keys() <= expected.keys():
        return 0.0, len(expected)
    total = sum(seen.values())
    common = [ids for ids, mass in expected.items() if mass * total >= 5]
    observed = [seen[ids] for ids in common]
    wanted = [expected[ids] * total for ids in common]
    if (rest := total - sum(wanted)) > 1e-3 * total:
        observed.append(total - sum(observed))
        wanted.append(rest)
    scale = sum(observed) / sum(wanted)
    result = stats.chisquare(observed, [w * scale for w in wanted])
    return float(result.pvalue), len(observed) - 1


def smallest_effect(num_draws: int, degrees: int) -> float:
    """Cohen's w that this many draws show with power 0.99, from the noncentral chi-square law."""
    threshold = stats.chi2.isf(SIGNIFICANCE, degrees)
    shift = brentq(lambda nc: stats.ncx2.sf(threshold, degrees, nc) - POWER, 1e-3, 1e4)
    return float((shift / num_draws) ** 0.5)


@pytest.mark.parametrize("floor", [True, False], ids=["floor", "no floor"])
@EVERY_SETTING
def test_chain_samples_the_law_of_the_base(params: SamplingParams, floor: bool) -> None:
    seen, acceptance = sample(params, "chain", floor, NUM_DRAWS)
    p_value, degrees = chi_square(seen, law(params))
    assert p_value > SIGNIFICANCE
    assert smallest_effect(NUM_DRAWS, degrees) < EFFECT
    assert 0.1 < acceptance < 0.9
    assert degrees >= 10


@pytest.mark.parametrize("name", ["temperature", "all filters"])
def test_ar_samples_the_law_of_the_base(name: str) -> None:
    seen, acceptance = sample(SETTINGS[name], "ar", floor=True, num_draws=NUM_DRAWS)
    p_value, degrees = chi_square(seen, law(SETTINGS[name]))
    assert p_value > SIGNIFICANCE
    assert smallest_effect(NUM_DRAWS, degrees) < EFFECT
    assert acceptance == 0.0


def test_the_public_stream_samples_the_law_of_the_base() -> None:
    params, num_draws = SETTINGS["top-k"], 700
    seen: Counter[tuple[int, ...]] = Counter()
    num_drafted = num_accepted = 0
    for seed in range(num_draws):
        sampling = SamplingParams(temperature=params.temperature, top_k=params.top_k, seed=seed)
        # One token more, so that the last of the three may be a draft too.
        config = DecodeConfig(max_new_tokens=DEPTH + 1, floor=False, sampling=sampling)
        result = TokenStream(dual(), PROMPT, config, eos_token_ids=frozenset(), context_length=64).drain()
        seen[result.token_ids[:DEPTH]] += 1
        num_drafted += result.stats.num_drafted
        num_accepted += result.stats.num_accepted
    p_value, degrees = chi_square(seen, law(params))
    assert p_value > SIGNIFICANCE
    assert smallest_effect(num_draws, degrees) < 0.3
    assert 0 < num_accepted < num_drafted


def accept_every_draft(
    draft_ids_K: Tensor, draft_probs_KV: Tensor, ar_probs_RV: Tensor, generator: torch.Generator | None
) -> Verdict:
    num_drafts = torch.tensor(len(draft_ids_K))
    return Verdict(num_drafts, draw(ar_probs_RV[-1], generator))


def without_residual(
    draft_ids_K: Tensor, draft_probs_KV: Tensor, ar_probs_RV: Tensor, generator: torch.Generator | None
) -> Verdict:
    """Accepts rightly, but draws the correction from p: drafts that q likes come too often."""
    right = verify_rejection(draft_ids_K, draft_probs_KV, ar_probs_RV, generator)
    return Verdict(right.num_accepted, draw(ar_probs_RV[int(right.num_accepted)], generator))


@pytest.mark.parametrize("floor", [True, False], ids=["floor", "no floor"])
@pytest.mark.parametrize("biased", [accept_every_draft, without_residual])
def test_a_biased_verifier_fails_the_same_test(
    biased: Callable[..., Verdict], floor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cycles, "verify_rejection", biased)
    seen, _ = sample(SETTINGS["temperature"], "chain", floor, NUM_DRAWS)
    assert chi_square(seen, law(SETTINGS["temperature"]))[0] < SIGNIFICANCE


def test_verifying_against_the_unfiltered_law_fails_it_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both views must go through the same filter; some outcomes lie outside the filtered law here."""
    real = filtered_probs
    plain = SamplingParams(temperature=SETTINGS["top-k"].temperature)
    monkeypatch.setattr(cycles, "filtered_probs", lambda logits_RV, _: real(logits_RV, plain))
    seen, _ = sample(SETTINGS["top-k"], "chain", False, NUM_DRAWS)
    assert chi_square(seen, law(SETTINGS["top-k"]))[0] < SIGNIFICANCE


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


@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_draw_has_the_law_it_is_given(scale: float) -> None:
    probs_V = torch.tensor([0.5, 0.25, 0.0, 0.125, 0.1, 0.025])
    ids = draw((probs_V * scale).expand(20000, -1), torch.Generator().manual_seed(0))
    counts = ids.bincount(minlength=6)
    assert counts[2] == 0
    keep = probs_V > 0
    assert stats.chisquare(counts[keep], 20000 * probs_V[keep].double()).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("strategy", ["ar", "chain"])
def test_the_same_seed_gives_the_same_text(strategy: str) -> None:
    def text(seed: int | None) -> tuple[int, ...]:
        sampling = SamplingParams(temperature=1.0, seed=seed)
        config = DecodeConfig(max_new_tokens=24, strategy=strategy, sampling=sampling)  # type: ignore[arg-type]
        return (
            TokenStream(dual(), PROMPT, config, eos_token_ids=frozenset(), context_length=64)
            .drain()
            .token_ids
        )

    assert text(5) == text(5)
    assert len({text(seed) for seed in (5, 6, None, None)}) == 4
