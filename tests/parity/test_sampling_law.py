"""Sampled text has exactly the base model's law, whatever strategy and filter; a biased rule is caught.

Three tokens in a row are drawn under many seeds and compared with the law enumerated by the slow oracle, by a
chi-square test at significance 1e-3. `smallest_effect` says which deviation that many draws would show with
power 0.99: Cohen's w, the root of the sum over outcomes of (p' - p)^2 / p.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from tests.tiny import disturb_view
from tests.ways import EVERY_DRAFTING_WAY, EVERY_WAY
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from orthrus.base.families import find_family
from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.reference import reference_law
from orthrus.decoding.sampling import filtered_probs
from orthrus.decoding.tree import DraftTree
from orthrus.engine import passes, state
from orthrus.engine.cycles import decode_cycle, fixed_plan
from orthrus.engine.state import DecodeState
from orthrus.engine.stream import TokenStream
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass, prefill
from orthrus.model.view_config import ViewConfig

VOCAB, DEPTH, BLOCK_SIZE = 7, 3, 5
PROMPT = [1, 4, 2, 6, 3]
SIGNIFICANCE, POWER = 1e-3, 0.99
NUM_DRAWS, EFFECT = 1200, 0.28
# Of the other strategies, whose every text must also be that of plain decoding.
FEW_DRAWS, FEW_EFFECT = 400, 0.45
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


class History:
    """Stands in for the slot cache: which tokens are committed, and which the last pass put where."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.scratch: dict[int, int] = {}

    @property
    def lengths(self) -> list[int]:
        return [len(self.token_ids)]

    def commit(self, num_tokens: int) -> None:
        self.compact([len(self.token_ids) + i for i in range(num_tokens)])

    def compact(self, slots: list[int]) -> None:
        self.token_ids += [self.scratch[slot] for slot in slots]


class Remembering:
    """Stands in for the dual view: a pass with the same rows over the same history is computed once, on a
    fresh cache. That its outcome depends on the history alone is what tests/unit/test_slot_cache.py shows."""

    def __init__(self) -> None:
        self.device, self.mask_token_id = torch.device("cpu"), dual().mask_token_id
        self.config, self.head, self.repair, self.draft_head = dual().config, dual().head, None, None
        self._known: dict[tuple[object, ...], Tensor] = {}

    def hidden(self, p: Pass, history: History) -> Tensor:
        ids, past = p.token_ids_BT[0].tolist(), tuple(history.token_ids)
        key = (past, *ids, p.num_ar_rows, p.visible_BTS.numpy().tobytes())
        if key not in self._known:
            fresh = dual().new_cache(64)
            if past:
                dual().run(prefill(torch.tensor([past]), [0]), fresh)
                fresh.commit(len(past))
            self._known[key] = dual().hidden(p, fresh)
        ar_slots = p.slots_BT[0, : p.num_ar_rows].tolist()
        history.scratch = dict(zip(ar_slots, ids[: p.num_ar_rows], strict=True))
        return self._known[key]

    def run(self, p: Pass, history: History) -> Tensor:
        return self.head(self.hidden(p, history)[:, p.logit_rows_R])


VIEW = Remembering()


def sample(
    params: SamplingParams, strategy: Strategy, floor: bool, num_draws: int = FEW_DRAWS
) -> tuple[list[tuple[int, ...]], float]:
    """Continuations of PROMPT by the engine's own cycles, one per seed; the share of drafts that stood."""
    config = DecodeConfig(strategy=strategy, floor=floor, node_budget=6, block_budget=2)
    plan, rules = fixed_plan(config, BLOCK_SIZE), LogitRules(params, VOCAB, "cpu")
    seen: list[tuple[int, ...]] = []
    num_drafted = num_accepted = 0
    for seed in range(num_draws):
        running = DecodeState(
            dual=VIEW,  # type: ignore[arg-type]
            cache=History(PROMPT[:-1]),  # type: ignore[arg-type]
            sampling=params,
            seed=seed,
            rules=rules,
            block_size=BLOCK_SIZE,
            floor=floor,
            context_length=64,
            anchor_id=PROMPT[-1],
        )
        ids: list[int] = []
        while len(ids) < DEPTH:
            step = decode_cycle(running, plan, room=32)
            ids += step.token_ids
            num_drafted += step.num_drafted
            num_accepted += sum(step.is_draft)
        seen.append(tuple(ids[:DEPTH]))
    return seen, num_accepted / max(1, num_drafted)


def chi_square(draws: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """p-value and degrees of freedom; outcomes that are expected less than five times count as one."""
    seen = Counter(draws)
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


@cache
def plain_draws(params: SamplingParams) -> list[tuple[int, ...]]:
    return sample(params, "ar", True, NUM_DRAWS)[0]


@EVERY_SETTING
def test_plain_decoding_samples_the_law_of_the_base(params: SamplingParams) -> None:
    p_value, degrees = chi_square(plain_draws(params), law(params))
    assert p_value > SIGNIFICANCE
    assert smallest_effect(NUM_DRAWS, degrees) < EFFECT
    assert degrees >= 10


@pytest.mark.parametrize("name", ["temperature", "all filters"])
@EVERY_DRAFTING_WAY
def test_every_strategy_samples_the_law_of_the_base(strategy: Strategy, floor: bool, name: str) -> None:
    """And not only the same law: seed by seed the same text as plain decoding."""
    params = SETTINGS[name]
    draws, acceptance = sample(params, strategy, floor)
    p_value, degrees = chi_square(draws, law(params))
    assert p_value > SIGNIFICANCE
    assert smallest_effect(FEW_DRAWS, degrees) < FEW_EFFECT
    assert 0.1 < acceptance < 0.9
    assert draws == plain_draws(params)[:FEW_DRAWS]


def accept_every_draft(tree: DraftTree, ar_ids: Sequence[int]) -> list[int]:
    return tree.paths()[-1]


def prefer_drafts(
    choose: Callable[..., list[int]], running: DecodeState, logits_RV: Tensor, places: Any, paths: Any
) -> list[int]:
    """Draws until a draft is matched, eight times at most: each draw has the right law, the text has not."""
    drafts = {(*path,) for path in paths}
    chosen = choose(running, logits_RV, places, paths)
    for again in range(1, 8):
        other = choose(
            replace(running, seed=running.seed + 10**6 * again, _noise={}), logits_RV, places, paths
        )
        found = [(*path, token_id) in drafts for path, token_id in zip(paths, chosen, strict=True)]
        chosen = [one if ok else two for ok, one, two in zip(found, chosen, other, strict=True)]
    return chosen


def one_noise_for_all_rows(
    choose: Callable[..., list[int]], running: DecodeState, logits_RV: Tensor, places: Any, paths: Any
) -> list[int]:
    """Each row by itself has the right law; the tokens of one pass are not independent."""
    return choose(running, logits_RV, [places[0]] * len(places), paths)


def propose_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that know nothing of the coming draw: coupled ones nearly have the right law themselves."""
    propose = DecodeState.propose

    def likeliest(self: DecodeState, logits_DV: Tensor, first_position: int, *rest: Any) -> Any:
        return propose(replace(self, sampling=SamplingParams()), logits_DV, first_position)

    monkeypatch.setattr(DecodeState, "propose", likeliest)


@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
@pytest.mark.parametrize("biased", [accept_every_draft, prefer_drafts, one_noise_for_all_rows])
def test_a_biased_rule_fails_the_same_test(
    biased: Callable[..., Any], strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SETTINGS["temperature"]
    if biased is accept_every_draft:
        monkeypatch.setattr(passes, "accepted_rows", biased)
    else:
        choose = DecodeState.choose
        monkeypatch.setattr(DecodeState, "choose", lambda *args: biased(choose, *args))
    num_draws = FEW_DRAWS
    if biased is prefer_drafts:
        # The likeliest drafts of this disturbed view are seldom drawn, so it takes more texts to tell.
        propose_the_likeliest(monkeypatch)
        num_draws = NUM_DRAWS
    draws, _ = sample(params, strategy, True, num_draws)
    assert chi_square(draws, law(params))[0] < SIGNIFICANCE


def test_drawing_from_the_unfiltered_law_fails_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some outcomes lie outside the filtered law here."""
    real = filtered_probs
    unfiltered = SamplingParams(temperature=SETTINGS["top-k"].temperature)
    monkeypatch.setattr(state, "filtered_probs", lambda logits_RV, _: real(logits_RV, unfiltered))
    draws, _ = sample(SETTINGS["top-k"], "chain", False)
    assert chi_square(draws, law(SETTINGS["top-k"]))[0] < SIGNIFICANCE


@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
def test_drafts_without_the_noise_of_the_choice_change_no_text_and_are_accepted_less(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coupling of arXiv 2408.07978 is about speed alone."""
    params = SETTINGS["temperature"]
    _, coupled = sample(params, strategy, True)
    propose_the_likeliest(monkeypatch)
    draws, uncoupled = sample(params, strategy, True)
    assert draws == plain_draws(params)[:FEW_DRAWS]
    assert 0 < uncoupled < coupled


@EVERY_WAY
def test_the_same_seed_gives_the_same_text_and_no_seed_another(strategy: Strategy, floor: bool) -> None:
    def text(seed: int | None) -> tuple[int, ...]:
        sampling = SamplingParams(temperature=1.0, seed=seed)
        config = DecodeConfig(max_new_tokens=24, strategy=strategy, floor=floor, sampling=sampling)
        return (
            TokenStream(dual(), PROMPT, config, eos_token_ids=frozenset(), context_length=64)
            .drain()
            .token_ids
        )

    assert text(5) == text(5)
    assert len({text(seed) for seed in (5, 6, None, None)}) == 4
