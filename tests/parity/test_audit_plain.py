"""The audit against plain decoding by the same runner: what it passes, what it still fails, and when it is
what an audit does."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.faults import plant_tie, plant_wrong_writer
from tests.tiny_orthrus import tiny_orthrus
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.audit import AuditOptions, AuditReport, run_audit
from orthrus.audit.replay import replay_ours
from orthrus.audit.shapes import AS_DECODED, ONE_ROW, baseline_logits
from orthrus.config import FIXED_STRATEGIES, Strategy
from orthrus.decoding.tree import DraftTree
from orthrus.engine.engine import EngineConfig
from orthrus.model.dual_view import DualView
from orthrus.model.pool import Slots

PROMPTS = [
    SimpleNamespace(prompt=text) for text in ("a tiny prompt", "x", "something longer, to be read first")
]


def audit(orthrus: Orthrus, **options: object) -> AuditReport:
    given = {"max_new_tokens": 40, "against": "plain", **options}
    return run_audit(orthrus, AuditOptions(prompts=PROMPTS, **given))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bfloat16_passes(temperature: float) -> None:
    orthrus = tiny_orthrus(dtype=torch.bfloat16)
    report = audit(orthrus, temperature=temperature, seed=2)

    assert report.passed
    assert [s.strategy for s in report.strategies] == list(FIXED_STRATEGIES)
    ar, *others = report.strategies
    assert ar.num_identical == 3
    assert all(s.acceptance_rate for s in others)
    assert "outputs identical to plain decoding by the eager runner" in report.summary
    assert report.options["against"] == "plain"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stock_model_is_asked(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Explaining a difference, too, takes nothing but passes of AR rows."""

    def last_path(tree: DraftTree, ar_ids: Sequence[int]) -> list[int]:
        return tree.paths()[-1]

    monkeypatch.setattr("orthrus.engine.work.accepted_rows", last_path)
    monkeypatch.setattr(Orthrus, "stock", None)
    report = audit(tiny_orthrus(), temperature=temperature)

    assert not report.passed
    ar, *others = report.strategies
    assert ar.num_identical == 3
    assert [s.num_broken for s in others] == [3] * len(others)
    assert all("was not committed" in m.reason for m in report.mismatches)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
def test_a_corrupt_cache_does_not_excuse_itself(
    strategy: Strategy, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted drafts leave wrong values behind: later tokens are our own scores' best, and still wrong."""
    compact = Slots.compact

    def corrupted(self: Slots, rows: Sequence[int]) -> None:
        start = self.length
        compact(self, rows)
        places = self.places(np.arange(start + 1, start + len(rows)))
        self.pool.values[0][0, :, places] = 0.0

    monkeypatch.setattr(Slots, "compact", corrupted)
    report = audit(tiny_orthrus(dtype=torch.bfloat16), strategies=("ar", strategy), temperature=temperature)

    assert not report.passed
    ar, drafting = report.strategies
    assert ar.num_identical == 3
    assert drafting.num_broken > 0
    assert any("above" in m.reason for m in report.mismatches)
    assert report.damages == ()


def test_a_path_that_is_not_moved_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The history of a tree's accepted branch must be gathered; left where it lies, text goes wrong."""
    monkeypatch.setattr(Slots, "compact", lambda self, rows: self.commit(len(rows)))
    report = audit(tiny_orthrus(), strategies=("chain", "tree"))

    chain, tree = report.strategies
    assert chain.num_identical == 3
    assert tree.num_broken > 0


def test_plain_decoding_that_leaves_a_damaged_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_wrong_writer(monkeypatch)
    report = audit(tiny_orthrus(), strategies=("chain",), max_new_tokens=4)

    assert not report.passed
    assert report.damages[0].startswith("prompt 1, baseline: ")


def test_a_head_that_rounds_by_the_number_of_rows_makes_near_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens with one row of the head; several rows at a time prefer the other by a hair."""
    orthrus = tiny_orthrus(disturb=0.0)
    favourite = orthrus.generate("x", max_new_tokens=40).token_ids[-1]
    twin = plant_tie(orthrus, favourite)
    head = DualView.head

    def nudged(self: DualView, hidden: Tensor, *, drafts: bool = False) -> Tensor:
        logits = head(self, hidden, drafts=drafts)
        if not drafts:
            logits[..., twin if logits.shape[:-1].numel() > 1 else favourite] += 1e-4
        return logits

    monkeypatch.setattr(DualView, "head", nudged)
    report = audit(orthrus, strategies=("ar", "chain", "tree"))

    assert report.passed
    assert report.strategies[0].num_identical == 3
    assert report.mismatches
    for mismatch in report.mismatches:
        assert mismatch.verdict == "near-tie"
        assert (mismatch.baseline_token, mismatch.our_token) == (favourite, twin)
        assert mismatch.gap == pytest.approx(1e-4, rel=0.1)
        assert mismatch.rounding_spread == pytest.approx(1e-4, rel=0.1)
        assert mismatch.residue is not None
        assert mismatch.residue < 1e-5


def test_the_shape_of_plain_decoding_is_plain_decoding_to_the_bit() -> None:
    """A prompt of several chunks, then row by row: what the baseline decided by, and no other rounding."""
    orthrus = tiny_orthrus(dtype=torch.bfloat16, config=EngineConfig(chunk=5))
    config = AuditOptions(prompts=PROMPTS, max_new_tokens=12).decode_config("ar")
    prompt_ids = orthrus.base.encode_prompt("a prompt of some chunks")
    ids = orthrus.stream_ids(prompt_ids, config).drain().token_ids

    for position in (0, 1, 9):
        ours = replay_ours(orthrus, prompt_ids, config, ids, position)
        shapes = baseline_logits(orthrus, "plain", config, prompt_ids, list(ids[:position]), ours.chunks)
        assert ours.logits_V is not None
        assert torch.equal(shapes[ONE_ROW], ours.logits_V)
        assert torch.equal(shapes[AS_DECODED], ours.logits_V)


@pytest.mark.parametrize(
    ("runner", "dtype", "precision", "expected"),
    [
        ("compiled", torch.float32, None, "stock"),
        ("compiled", torch.float32, "int8", "plain"),
        ("compiled", torch.bfloat16, None, "plain"),
        ("eager", torch.bfloat16, None, "stock"),
        ("eager", torch.float32, "int8", "stock"),
    ],
)
def test_what_is_compared_with_when_nobody_says(
    runner: str, dtype: torch.dtype, precision: str | None, expected: str
) -> None:
    orthrus = tiny_orthrus(dtype=dtype)
    # Labels are enough: nothing is compiled or rounded here.
    orthrus.engine.runner.name, orthrus.dual.precision = runner, precision
    report = audit(orthrus, against=None, strategies=("ar",), max_new_tokens=2)

    assert report.passed
    assert report.options["against"] == expected
    whose = "the stock model's," if expected == "stock" else "plain decoding by the compiled runner,"
    assert f"3 of 3 outputs identical to {whose}" in report.summary
    other = audit(orthrus, against="plain", strategies=("ar",), max_new_tokens=2)
    assert other.options["against"] == "plain"
