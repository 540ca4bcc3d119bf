"""The audit passes what is sound, fails what is broken, and tells a near-tie from both."""

import io
import json
from dataclasses import dataclass

import pytest
import torch
from orthrus.decoding.verify import Verdict
from rich.console import Console
from tests.tiny import FAMILY_CONFIGS
from tests.tiny_orthrus import tiny_orthrus
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.audit import AuditOptions, AuditReport, run_audit
from orthrus.audit.explain import judge
from orthrus.audit.replay import AS_DECODED, ONE_ROW, replay_ours, stock_logits
from orthrus.engine.stream import TokenStream
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.slot_cache import SlotCache


@dataclass(frozen=True)
class Ask:
    prompt: str


PROMPTS = [Ask("a tiny prompt"), Ask("x"), Ask("something longer, with more to read before the answer")]


def audit(orthrus: Orthrus, **options: object) -> AuditReport:
    return run_audit(orthrus, AuditOptions(prompts=PROMPTS, max_new_tokens=40, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("floor", [True, False])
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_every_family_passes(name: str, floor: bool) -> None:
    report = audit(tiny_orthrus(name), floor=floor)

    assert report.passed
    assert report.mismatches == ()
    ar, chain = report.strategies
    assert (ar.strategy, ar.num_identical, ar.acceptance_rate) == ("ar", 3, None)
    assert (chain.strategy, chain.num_identical, chain.num_prompts) == ("chain", 3, 3)
    assert chain.acceptance_rate is not None


def test_the_report_counts_acceptance_as_the_streams_do() -> None:
    orthrus = tiny_orthrus(disturb=0.0)
    config = AuditOptions(prompts=PROMPTS, max_new_tokens=40).decode_config("chain")
    streams = [orthrus.stream_ids(orthrus.base.encode_prompt(ask.prompt), config) for ask in PROMPTS]
    stats = [stream.drain().stats for stream in streams]

    chain = audit(orthrus, strategies=("chain",)).strategies[0]

    assert chain.acceptance_rate == sum(s.num_accepted for s in stats) / sum(s.num_drafted for s in stats)
    assert chain.acceptance_rate > 0
    assert chain.tokens_per_forward == sum(s.num_tokens for s in stats) / sum(s.num_passes for s in stats) > 1


def test_a_verifier_that_accepts_everything_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(draft_ids_K: Tensor, ar_ids_R: Tensor) -> Verdict:
        return Verdict(torch.tensor(len(draft_ids_K)), ar_ids_R[-1])

    monkeypatch.setattr("orthrus.engine.cycles.verify_greedy", accept_all)
    report = audit(tiny_orthrus())

    assert not report.passed
    ar, chain = report.strategies
    assert ar.num_identical == 3
    assert chain.num_broken == 3
    assert all(m.verdict == "broken rule" for m in report.mismatches)
    assert "was not committed" in report.mismatches[0].reason
    assert "FAILED" in report.summary


def test_a_corrupt_cache_does_not_excuse_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token is our own logits' best, and still wrong: only the stock model's noise can tell."""
    run = DualView.run

    def corrupted(self: DualView, p: Pass, cache: SlotCache) -> Tensor:
        logits = run(self, p, cache)
        if cache.lengths[0] > 20:
            cache.values[0][:, :, 5] = 0.0
        return logits

    monkeypatch.setattr(DualView, "run", corrupted)
    report = audit(tiny_orthrus(), strategies=("chain",))

    assert not report.passed
    assert any("above" in m.reason for m in report.mismatches)
    assert all(
        m.residue is not None and m.noise is not None and m.residue > 10 * m.noise for m in report.mismatches
    )


def test_a_slot_of_the_wrong_writer_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    run = DualView.run

    def corrupted(self: DualView, p: Pass, cache: SlotCache) -> Tensor:
        logits = run(self, p, cache)
        cache.writers_BS[0, 0] = 2
        return logits

    monkeypatch.setattr(DualView, "run", corrupted)
    report = audit(tiny_orthrus(), strategies=("ar",))

    assert not report.passed
    assert report.strategies[0].num_identical == 3
    assert "slot 0" in report.damages[0]


def test_an_early_end_is_a_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    init = TokenStream.__init__

    def impatient(self: TokenStream, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)  # type: ignore[arg-type]
        object.__setattr__(self._rules, "max_new_tokens", 5)

    monkeypatch.setattr(TokenStream, "__init__", impatient)
    report = audit(tiny_orthrus(), strategies=("ar",))

    assert not report.passed
    assert all(m.our_token is None and m.position == 5 for m in report.mismatches)
    assert "(end)" in report.to_markdown()


def test_a_constructed_near_tie_is_a_near_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens with one and the same row of the head; a change far below rounding picks the other."""
    orthrus = tiny_orthrus(disturb=0.0)
    first = audit(orthrus, strategies=("ar",))
    favourite = orthrus.generate("x", max_new_tokens=1).token_ids[0]
    twin = favourite + 1
    with torch.no_grad():
        head_VC = orthrus.dual.base.get_output_embeddings().weight
        head_VC[twin] = head_VC[favourite]
    run = DualView.run

    def nudged(self: DualView, p: Pass, cache: SlotCache) -> Tensor:
        logits = run(self, p, cache)
        logits[..., twin] += 1e-6
        return logits

    monkeypatch.setattr(DualView, "run", nudged)
    report = audit(orthrus, strategies=("ar", "chain"))

    assert first.passed
    assert report.passed
    assert report.mismatches
    for mismatch in report.mismatches:
        assert mismatch.verdict == "near-tie"
        assert {mismatch.stock_token, mismatch.our_token} == {favourite, twin}
        assert mismatch.gap is not None
        assert mismatch.noise is not None
        assert mismatch.gap <= 2 * mismatch.noise
        assert mismatch.residue is not None
        assert mismatch.residue < 1e-4


def test_bfloat16_passes() -> None:
    report = audit(tiny_orthrus(dtype=torch.bfloat16))

    assert report.passed
    assert report.model["dtype"] == "bfloat16"


def test_the_rule_itself() -> None:
    stock = torch.tensor([5.0, 4.9, 0.0])
    block = torch.tensor([4.96, 4.94, 0.0])

    tie = judge({ONE_ROW: stock, AS_DECODED: block}, block.flip(0)[[1, 2, 0]], 0, 1)
    assert tie.noise == pytest.approx(0.04)
    assert (tie.verdict, tie.gap) == ("broken rule", pytest.approx(0.1))
    tie = judge({ONE_ROW: stock, AS_DECODED: block - 0.06}, torch.tensor([4.9, 4.92, 0.0]), 0, 1)
    assert tie.verdict == "near-tie"
    # The same tie, but our logits preferred another token than the one that was committed.
    liar = judge({ONE_ROW: stock, AS_DECODED: block - 0.06}, torch.tensor([4.93, 4.92, 0.0]), 0, 1)
    assert liar.verdict == "broken rule"
    assert judge({ONE_ROW: stock, AS_DECODED: stock}, None, 0, 1).verdict == "broken rule"


def test_replays_compute_what_generate_computes() -> None:
    orthrus = tiny_orthrus("gemma2")
    config = AuditOptions(prompts=PROMPTS, max_new_tokens=30).decode_config("chain")
    prompt_ids = orthrus.base.encode_prompt("replay this prompt")
    result = orthrus.stream_ids(prompt_ids, config).drain()

    for position in (0, 1, 7, 20):
        ours = replay_ours(orthrus, prompt_ids, config, position)
        shapes = stock_logits(orthrus, prompt_ids, list(result.token_ids[:position]), ours.chunks, 8)
        assert ours.token == result.token_ids[position]
        assert ours.logits_V is not None
        for logits_V in (ours.logits_V, *shapes.values()):
            assert int(logits_V.argmax()) == result.token_ids[position]
            torch.testing.assert_close(logits_V, shapes[ONE_ROW], atol=1e-4, rtol=1e-4)


def test_the_report_in_every_form() -> None:
    seen: list[tuple[str, int, int]] = []
    orthrus = tiny_orthrus()
    report = run_audit(
        orthrus, AuditOptions(prompts=PROMPTS[:1], max_new_tokens=8), lambda *event: seen.append(event)
    )

    raw = json.loads(json.dumps(report.to_dict()))
    assert raw["passed"] is True
    assert raw["provenance"]["seed"] is None
    assert raw["model"]["block_size"] == 8
    assert {"identical", "near_ties", "broken", "gap", "noise"} <= raw["legend"].keys()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.to_table())
    assert "PASSED: 2 of 2" in console.export_text()
    assert "| chain | 1 | 1 |" in report.to_markdown()
    assert report.to_csv().startswith("strategy,")
    assert [done for _, done, _ in seen] == [0, 1, 2, 3]
    assert all(total == 3 for *_, total in seen)


@pytest.mark.parametrize(
    "options",
    [{"prompts": []}, {"prompts": PROMPTS, "strategies": ()}, {"prompts": PROMPTS, "strategies": ("tree",)}],
)
def test_wrong_options_are_told(options: dict[str, object]) -> None:
    with pytest.raises(UserInputError):
        AuditOptions(**options)  # type: ignore[arg-type]


def test_wrong_block_size_is_told() -> None:
    with pytest.raises(UserInputError, match="block_size 99"):
        audit(tiny_orthrus(), block_size=99)
