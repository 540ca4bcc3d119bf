"""`audit --full`: sound text passes, and each part of the audit catches the planted defect that it is made for."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from scipy import stats
from tests.parity.test_audit import PROMPTS, Ask
from tests.tiny_orthrus import tiny_orthrus
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.audit import AuditOptions, AuditReport, FullOptions, chances, place, run_audit
from orthrus.audit import compare as audit_compare
from orthrus.audit.distance import Pair, p_value
from orthrus.audit.full_report import FullReport
from orthrus.audit.texts import text_counts
from orthrus.base.fingerprint import fingerprint
from orthrus.decoding import noise
from orthrus.decoding.tree import DraftTree, accepted_rows
from orthrus.engine import choices
from orthrus.errors import UserInputError
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import EagerRunner
from orthrus.model.twin import Twin, twins

MANY = [Ask(f"prompt number {i}: {'abc' * (i % 4)}") for i in range(10)]
DRAFTING = ("chain", "fused_tree")


def audit(orthrus: Orthrus, prompts: Sequence[Ask] = MANY, **options: object) -> AuditReport:
    given = {"max_new_tokens": 48, "strategies": DRAFTING, **options}
    return run_audit(orthrus, AuditOptions(prompts=prompts, **given))  # type: ignore[arg-type]


def full(orthrus: Orthrus, **options: object) -> FullReport:
    given = {"draws": 150, "num_prompts": 2, "num_tokens": 6, "strategies": ("chain",), **options}
    report = run_audit(
        orthrus,
        AuditOptions(
            prompts=PROMPTS,
            strategies=("ar",),
            max_new_tokens=12,
            full=FullOptions(**given),  # type: ignore[arg-type]
        ),
    )
    assert report.full is not None
    assert report.passed == (not report.full.failures)
    return report.full


def test_sound_text_passes_and_the_positive_control_does_not() -> None:
    report = full(tiny_orthrus(), bias=0.3)

    assert report.failures == []
    arm = report.arms[0]
    assert (arm.num_equal_by_seed, arm.num_texts) == (300, 300)
    assert arm.acceptance_rate is not None
    assert arm.acceptance_rate > 0.05
    names = [test.name for test in report.tests]
    assert names == [
        "chi-square, depth 1",
        "chi-square, depth 2",
        "chi-square, depth 3",
        "distance of texts (MMD)",
    ]
    for test in report.tests:
        # One seed gives one text, so our sample equals the negative control.
        assert test.statistics["chain"] == pytest.approx(test.negative_control_statistic)
        assert test.p_values["chain"] > test.level
    assert any(test.finds_positive_control for test in report.tests)
    assert {ratio.what for ratio in arm.ratios} >= {"tokens", "distinct_words", "distinct_trigrams"}
    assert json.loads(json.dumps(report.to_dict()))["tests"][0]["finds_positive_control"] in (True, False)
    assert "| chi-square, depth 1 | chain |" in report.to_markdown()


def test_a_bias_too_small_for_the_draws_is_no_pass() -> None:
    report = full(tiny_orthrus(), draws=20, bias=0.001)
    assert any("draw more texts" in failure for failure in report.failures)


@pytest.mark.parametrize("what", ["positions", "seeds"])
def test_noise_that_repeats_is_caught(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding, ours and the stock model draw with the same wrong noise: identity shows nothing."""
    real = noise.exponential_noise

    def repeated(seed: int, positions: Sequence[int], vocab_size: int, device: object) -> Tensor:
        if what == "seeds":
            return real(seed % 3, positions, vocab_size, "cpu")
        return real(seed, [0] * len(positions), vocab_size, "cpu")

    for module in (choices, place, audit_compare):
        monkeypatch.setattr(module, "exponential_noise", repeated)
    orthrus = tiny_orthrus()
    assert audit(orthrus, PROMPTS, temperature=1.0, max_new_tokens=16).passed
    report = full(orthrus)
    assert any(
        failure.startswith("chain does not have the base's distribution") for failure in report.failures
    )
    assert any(failure.startswith("plain decoding itself") for failure in report.failures)


def test_a_biased_draw_of_judged_drafts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where several drafts are judged, a sampled token is the most probable one. Plain decoding is right."""
    draw = choices.draw_with_noise

    def biased(probs_RV: Tensor, noise_RV: Tensor | Sequence[Tensor]) -> Tensor:
        return probs_RV.argmax(-1) if len(probs_RV) > 1 else draw(probs_RV, noise_RV)

    monkeypatch.setattr(choices, "draw_with_noise", biased)
    report = full(tiny_orthrus(), temperature=0.7, draws=100, num_tokens=8)
    assert any("chain does not" in failure for failure in report.failures)
    assert not any("plain decoding itself" in failure for failure in report.failures)
    assert report.arms[0].num_equal_by_seed < report.arms[0].num_texts


def test_a_verifier_that_accepts_one_percent_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = count(1)

    def lenient(tree: DraftTree, ar_ids: Sequence[int]) -> list[int]:
        rows = accepted_rows(tree, ar_ids)
        if tree.num_nodes and next(judged) % 100 == 0:
            last = rows[-1] if rows else 0
            wrong = [
                row
                for row, (token_id, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True), 1)
                if parent == last and token_id != ar_ids[last]
            ]
            rows += wrong[:1]
        return rows

    monkeypatch.setattr("orthrus.engine.work.accepted_rows", lenient)
    report = audit(tiny_orthrus(), strategies=("chain",))
    assert not report.passed
    assert report.strategies[0].num_broken > 0
    assert report.strategies[0].num_identical > 0


def test_a_cache_that_keeps_one_stale_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last slot of a gathered path keeps its old content, while the ledger says otherwise."""
    move = SlotPool.move

    def stale(self: SlotPool, sources: list[int], targets: list[int]) -> None:
        before = [store[:, :, targets[-1]].clone() for store in (*self.keys, *self.values)]
        move(self, sources, targets)
        for store, kept in zip((*self.keys, *self.values), before, strict=True):
            store[:, :, targets[-1]] = kept

    monkeypatch.setattr(SlotPool, "move", stale)
    report = audit(tiny_orthrus(), strategies=("fused_tree",))
    assert not report.passed
    assert report.strategies[0].num_broken > 0


def test_a_wrong_position_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last judged row of a draft has a position one too large."""
    hidden = EagerRunner.hidden

    def shifted(self: EagerRunner, p: Pass, pool: SlotPool) -> Tensor:
        wrong = p.position_ids_R.clone()
        for span in p.spans:
            rows = range(p.num_rows)[span.ar_rows]
            if len(rows) > 1 and span.length > 20:
                wrong[rows[-1]] += 1
        return hidden(self, replace(p, position_ids_R=wrong), pool)

    monkeypatch.setattr(EagerRunner, "hidden", shifted)
    report = audit(tiny_orthrus())
    assert not report.passed
    assert any(s.num_broken for s in report.strategies)


def test_twins_swapped_in_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Twin.forward

    def swapped(self: Twin, x: Tensor) -> Tensor:
        self.ar, self.diffusion = self.diffusion, self.ar
        try:
            return forward(self, x)
        finally:
            self.ar, self.diffusion = self.diffusion, self.ar

    monkeypatch.setattr(Twin, "forward", swapped)
    report = audit(tiny_orthrus(), strategies=("ar", "chain"))
    assert all(s.num_broken for s in report.strategies)


def test_twins_swapped_in_their_weights() -> None:
    """Then the stock model has the wrong weights too, and every text is equal."""
    orthrus = tiny_orthrus()
    dual = orthrus.dual
    dual.config = replace(dual.config, base_fingerprint=fingerprint(dual.stock()))
    assert audit(orthrus, PROMPTS).faults == ()
    for twin in twins(dual.base).values():
        twin.ar, twin.diffusion = twin.diffusion, twin.ar
    report = audit(orthrus, PROMPTS)
    assert all(s.num_identical == s.num_prompts for s in report.strategies)
    assert not report.passed
    assert "the twins are swapped" in report.summary


def test_another_base_is_no_fault() -> None:
    """A view over a fine-tuned base drafts worse and stays lossless."""
    orthrus = tiny_orthrus()
    orthrus.dual.config = replace(orthrus.dual.config, base_fingerprint="blake2b:of another")
    assert audit(orthrus, PROMPTS).passed


def test_a_view_of_nan() -> None:
    orthrus = tiny_orthrus()
    with torch.no_grad():
        next(iter(orthrus.dual.view_parameters().values())).view(-1)[0] = torch.nan
    report = audit(orthrus, PROMPTS)
    assert all(s.num_identical == s.num_prompts for s in report.strategies)
    assert not report.passed
    assert "NaN" in report.summary


def test_what_no_difference_bounds_is_printed() -> None:
    report = audit(tiny_orthrus(), PROMPTS)
    bound = report.strategies[0].bound
    assert bound == "chain: 0 of 3 outputs differ; the rate is at most 63.16% (95 % confidence)"
    assert bound in report.to_markdown()
    assert report.to_dict()["strategies"][0]["bound"] == bound


def test_chances_are_those_of_scipy() -> None:
    for x, degrees, shift in ((3.2, 4, 2.0), (80.0, 60, 44.0), (250.0, 200, 90.0)):
        assert chances.chi2_tail(x, degrees) == pytest.approx(stats.chi2.sf(x, degrees), rel=1e-6)
        expected = stats.ncx2.sf(x, degrees, shift)
        assert chances.noncentral_tail(x, degrees, shift) == pytest.approx(expected, rel=1e-5)
        assert chances.chi2_threshold(1e-3, degrees) == pytest.approx(stats.chi2.isf(1e-3, degrees), rel=1e-6)
    for found, runs in ((0, 40), (1, 40), (7, 300), (40, 40)):
        expected = stats.beta.ppf(0.95, found + 1, runs - found) if found < runs else 1.0
        assert chances.largest_rate(found, runs) == pytest.approx(expected, rel=1e-5)
    assert chances.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_the_distance_tells_samples_apart_by_prompt() -> None:
    generator = np.random.default_rng(0)

    def texts(letters: str, num: int = 40) -> list[str]:
        return ["".join(generator.choice(list(letters), 30)) for _ in range(num)]

    torch_generator = torch.Generator().manual_seed(0)
    same = Pair.of(texts("abcd"), texts("abcd"), "a" * 30)
    other = Pair.of(texts("abcd"), texts("abcdef"), "a" * 30)
    for pair, is_far in ((same, False), (other, True)):
        permuted_P = pair.permuted(2000, torch_generator)
        assert abs(float(permuted_P.mean())) < 3e-3
        assert (p_value(pair.distance(), permuted_P) < 0.001) == is_far
    drawn_1N = torch.rand(1, 40, generator=torch_generator)
    assert same.biased(drawn_1N < 1.0) > same.biased(drawn_1N < 0.3) > same.distance()


def test_counts_of_a_text() -> None:
    counts = text_counts("To be, or not to be", 6)
    assert counts == {
        "tokens": 6, "characters": 19, "words": 6, "distinct_words": 4, "distinct_bigrams": 4, "distinct_trigrams": 4,
    }  # fmt: skip
    assert chances.ratio_interval([2.0, 4.0], [1.0, 2.0])[:3] == pytest.approx((2.0, 2.0, 2.0))


@pytest.mark.parametrize("wrong", [{"draws": 3}, {"bias": 0.0}, {"temperature": 0.0}, {"num_tokens": 1}])
def test_wrong_options_are_told(wrong: dict[str, object]) -> None:
    with pytest.raises(UserInputError):
        FullOptions(**wrong)  # type: ignore[arg-type]
