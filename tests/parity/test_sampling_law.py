"""Sampled text has exactly the base model's distribution under every strategy and filter, and a biased rule is caught.

Three tokens in a row are drawn under many seeds, and compared with the distribution from the slow oracle, by a
chi-square test at significance 1e-3. `smallest_effect` says which deviation that many draws would show with
power 0.99: Cohen's w, the root of the sum over outcomes of (p' - p)^2 / p.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from tests.engines import decode, engine_for
from tests.rows import Rows
from tests.tiny import disturb_view
from tests.ways import EVERY_DRAFTING_WAY, EVERY_WAY
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from orthrus.base.families import find_family
from orthrus.config import DecodeConfig, SamplingParams, Strategy
from orthrus.decoding.reference import reference_distribution
from orthrus.decoding.sampling import filtered_probs
from orthrus.decoding.tree import DraftTree
from orthrus.engine import choices, work
from orthrus.engine import round as engine_round
from orthrus.engine.choices import Judged
from orthrus.engine.request import Request
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import EagerRunner
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
def distribution(params: SamplingParams) -> dict[tuple[int, ...], float]:
    model = dual().stock()
    with torch.inference_mode():
        return reference_distribution(lambda ids_T: model(ids_T[None]).logits[0], PROMPT, DEPTH, params)


class Remembering:
    """A runner that computes the rows of a request once for each text before them, in a pool of their own.

    tests/unit/test_pool.py shows that their result depends only on the text.
    """

    name = "remembering"
    repair_tables = None

    def __init__(self) -> None:
        self.dual, self._eager = dual(), EagerRunner(dual())
        self._texts: dict[int, int] = {}
        self._known: dict[tuple[object, ...], Tensor] = {}

    def new_pool(self, num_pages: int) -> SlotPool:
        self._texts = {}
        # Accepted paths move here too, so that a slot is known by what was written into it.
        return SlotPool(dual().base.config, num_pages, move=self._move)

    def _move(self, _: list[Tensor], sources: list[int], targets: list[int]) -> None:
        moved = [self._texts[source] for source in sources]
        self._texts.update(zip(targets, moved, strict=True))

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        hidden_RC = torch.empty(p.num_rows, dual().base.config.hidden_size)
        for span in p.spans:
            part, places = span.part, span.places.tolist()
            past = tuple(self._texts[place] for place in places[: span.length])
            self._texts.update(zip(places[span.length :], part.token_ids, strict=True))
            tail = b"" if part.tail_II is None else part.tail_II.tobytes()
            key = (past, *part.token_ids, part.num_ar, tail)
            if key not in self._known:
                rows = Rows(self._eager, 64)
                if past:
                    rows.feed(past)
                self._known[key] = rows.hidden(part)
            own_IC = self._known[key]
            hidden_RC[span.ar_rows] = own_IC[: part.num_ar]
            hidden_RC[span.draft_rows] = own_IC[part.num_ar :]
        return hidden_RC

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        return dual().head(hidden_RC, drafts=drafts)


RUNNER = Remembering()
TOGETHER = 20


def sample(
    params: SamplingParams, strategy: Strategy, floor: bool, num_draws: int = FEW_DRAWS
) -> tuple[list[tuple[int, ...]], float]:
    """Continuations of PROMPT by the engine, one per seed, some at a time; the acceptance rate."""
    engine = engine_for(RUNNER, max_slots=TOGETHER * 64, reuse=False)
    waiting = iter(range(num_draws))
    running: list[Request] = []
    seen: dict[int, tuple[int, ...]] = {}
    num_drafted = num_accepted = 0
    while len(seen) < num_draws:
        for seed in islice(waiting, TOGETHER - len(running)):
            config = DecodeConfig(
                max_new_tokens=32,
                strategy=strategy,
                floor=floor,
                node_budget=6,
                block_budget=2,
                sampling=replace(params, seed=seed),
            )
            request = engine.submit(PROMPT[:-1], config, eos_token_ids=frozenset())
            # As if the last token had been decided before: cycles begin at once, and passes decide several.
            request.token_ids.append(PROMPT[-1])
            running.append(request)
        engine.step()
        for request in [r for r in running if len(r.token_ids) > DEPTH]:
            running.remove(request)
            seen[request.seed] = tuple(request.token_ids[1 : DEPTH + 1])
            num_drafted += sum(cycle.num_drafted for cycle in request.cycles)
            num_accepted += sum(cycle.num_accepted for cycle in request.cycles)
            engine.drop(request)
    return [seen[seed] for seed in range(num_draws)], num_accepted / max(1, num_drafted)


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
    """Cohen's w that this many draws show with power 0.99, from the noncentral chi-square distribution."""
    threshold = stats.chi2.isf(SIGNIFICANCE, degrees)
    shift = brentq(lambda nc: stats.ncx2.sf(threshold, degrees, nc) - POWER, 1e-3, 1e4)
    return float((shift / num_draws) ** 0.5)


@cache
def plain_draws(params: SamplingParams) -> list[tuple[int, ...]]:
    return sample(params, "ar", True, NUM_DRAWS)[0]


@EVERY_SETTING
def test_plain_decoding_samples_the_distribution_of_the_base(params: SamplingParams) -> None:
    p_value, degrees = chi_square(plain_draws(params), distribution(params))
    assert p_value > SIGNIFICANCE
    assert smallest_effect(NUM_DRAWS, degrees) < EFFECT
    assert degrees >= 10


@pytest.mark.parametrize("name", ["temperature", "all filters"])
@EVERY_DRAFTING_WAY
def test_every_strategy_samples_the_distribution_of_the_base(
    strategy: Strategy, floor: bool, name: str
) -> None:
    """Beyond the same distribution, each seed gives the same text as plain decoding."""
    params = SETTINGS[name]
    draws, acceptance = sample(params, strategy, floor)
    p_value, degrees = chi_square(draws, distribution(params))
    assert p_value > SIGNIFICANCE
    assert smallest_effect(FEW_DRAWS, degrees) < FEW_EFFECT
    assert 0.1 < acceptance < 0.9
    assert draws == plain_draws(params)[:FEW_DRAWS]


def accept_every_draft(tree: DraftTree, ar_ids: Sequence[int]) -> list[int]:
    return tree.paths()[-1]


Choose = Callable[[Tensor, Sequence[Judged]], list[list[int]]]


def prefer_drafts(choose: Choose, logits_RV: Tensor, judged: Sequence[Judged]) -> list[list[int]]:
    """Draws until a draft is matched, eight times at most. Each draw has the right distribution, the text has not."""
    chosen = choose(logits_RV, judged)
    for again in range(1, 8):
        others = [
            j._replace(request=replace(j.request, seed=j.request.seed + 10**6 * again, noise={}))
            for j in judged
        ]
        for i, (j, other_ids) in enumerate(zip(judged, choose(logits_RV, others), strict=True)):
            drafts = {(*path,) for path in j.paths}
            found = [(*path, token_id) in drafts for path, token_id in zip(j.paths, chosen[i], strict=True)]
            chosen[i] = [one if ok else two for ok, one, two in zip(found, chosen[i], other_ids, strict=True)]
    return chosen


def one_noise_for_all_rows(choose: Choose, logits_RV: Tensor, judged: Sequence[Judged]) -> list[list[int]]:
    """Each row by itself has the right distribution, but the tokens of one pass are not independent."""
    return choose(logits_RV, [j._replace(positions=[j.positions[0]] * len(j.positions)) for j in judged])


def propose_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts without knowledge of the coming draw, because coupled drafts have nearly the right distribution."""

    def scores(guessed: object, logits_DV: Tensor) -> Tensor:
        return logits_DV.float()

    monkeypatch.setattr(choices, "_scores", scores)


@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
@pytest.mark.parametrize("biased", [accept_every_draft, prefer_drafts, one_noise_for_all_rows])
def test_a_biased_rule_fails_the_same_test(
    biased: Callable[..., Any], strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SETTINGS["temperature"]
    if biased is accept_every_draft:
        monkeypatch.setattr(work, "accepted_rows", biased)
    else:
        choose = choices.choose
        monkeypatch.setattr(engine_round, "choose", lambda *args: biased(choose, *args))
    num_draws = FEW_DRAWS
    if biased is prefer_drafts:
        # The likeliest drafts of this disturbed view are seldom drawn, so it takes more texts to tell.
        propose_the_likeliest(monkeypatch)
        num_draws = NUM_DRAWS
    draws, _ = sample(params, strategy, True, num_draws)
    assert chi_square(draws, distribution(params))[0] < SIGNIFICANCE


def test_drawing_from_the_unfiltered_distribution_fails_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some outcomes have probability 0 in the filtered distribution."""
    real = filtered_probs
    unfiltered = SamplingParams(temperature=SETTINGS["top-k"].temperature)
    monkeypatch.setattr(choices, "filtered_probs", lambda logits_RV, _: real(logits_RV, unfiltered))
    draws, _ = sample(SETTINGS["top-k"], "chain", False)
    assert chi_square(draws, distribution(SETTINGS["top-k"]))[0] < SIGNIFICANCE


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
        return decode(dual(), PROMPT, config).token_ids

    assert text(5) == text(5)
    assert len({text(seed) for seed in (5, 6, None, None)}) == 4
