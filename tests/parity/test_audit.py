"""The audit passes what is sound, fails what is broken, and tells a near-tie from both."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.faults import plant_tie, plant_wrong_writer
from tests.tiny import FAMILY_CONFIGS
from tests.tiny_orthrus import tiny_orthrus
from tests.ways import DRAFTING
from torch import Tensor

from orthrus.api import Orthrus, decode_config
from orthrus.audit import AuditOptions, AuditReport, run_audit
from orthrus.audit.explain import judge
from orthrus.audit.place import scores
from orthrus.audit.replay import replay_ours
from orthrus.audit.shapes import AS_DECODED, ONE_ROW, baseline_logits
from orthrus.config import BASELINES, FIXED_STRATEGIES, SamplingParams, Strategy
from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.tree import DraftTree
from orthrus.engine import choices, engine
from orthrus.engine import round as engine_round
from orthrus.engine.engine import EngineConfig
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import EagerRunner


@dataclass(frozen=True)
class Ask:
    prompt: str


PROMPTS = [Ask("a tiny prompt"), Ask("x"), Ask("something longer, with more to read before the answer")]


def audit(orthrus: Orthrus, **options: object) -> AuditReport:
    return run_audit(orthrus, AuditOptions(prompts=PROMPTS, **{"max_new_tokens": 40, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_every_family_passes(name: str, options: dict[str, object]) -> None:
    report = audit(tiny_orthrus(name), max_new_tokens=20, **options)

    assert report.passed
    assert report.mismatches == ()
    assert [s.strategy for s in report.strategies] == list(FIXED_STRATEGIES)
    for result in report.strategies:
        assert (result.num_identical, result.num_prompts) == (3, 3)
        assert (result.acceptance_rate is None) == (result.strategy == "ar")


def test_the_papers_cycle_passes_too() -> None:
    report = audit(tiny_orthrus(), floor=False, strategies=("chain", "fused_tree"))

    assert report.passed
    assert [s.num_identical for s in report.strategies] == [3, 3]


def test_a_sampled_text_is_no_greedy_one() -> None:
    """The stock model really draws: another seed, another text, and each is our own."""
    orthrus = tiny_orthrus()
    texts = {
        orthrus.generate(PROMPTS[2].prompt, max_new_tokens=40, temperature=temperature, seed=seed).token_ids
        for temperature, seed in ((0.0, 1), (1.0, 1), (1.0, 2))
    }
    assert len(texts) == 3
    for seed in (1, 2):
        assert audit(orthrus, temperature=1.0, seed=seed, strategies=("tree",)).passed


def test_the_report_counts_acceptance_as_the_streams_do() -> None:
    orthrus = tiny_orthrus(disturb=0.0)
    config = AuditOptions(prompts=PROMPTS, max_new_tokens=40).decode_config("chain")
    streams = [orthrus.stream_ids(orthrus.base.encode_prompt(ask.prompt), config) for ask in PROMPTS]
    stats = [stream.drain().stats for stream in streams]

    chain = audit(orthrus, strategies=("chain",)).strategies[0]

    assert chain.acceptance_rate == sum(s.num_accepted for s in stats) / sum(s.num_drafted for s in stats)
    assert chain.acceptance_rate > 0
    assert chain.tokens_per_forward == sum(s.num_tokens for s in stats) / sum(s.num_passes for s in stats) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_accepting_everything_fails(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def last_path(tree: DraftTree, ar_ids: Sequence[int]) -> list[int]:
        return tree.paths()[-1]

    monkeypatch.setattr("orthrus.engine.work.accepted_rows", last_path)
    report = audit(tiny_orthrus(), temperature=temperature)

    assert not report.passed
    ar, *others = report.strategies
    assert ar.num_identical == 3
    assert [s.num_broken for s in others] == [3] * len(others)
    assert all(m.verdict == "broken rule" for m in report.mismatches)
    assert all("was not committed" in m.reason for m in report.mismatches)
    assert "FAILED" in report.summary


@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
def test_noise_that_is_not_the_seeds_fails_a_sampled_audit(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws of the right distribution, but others than plain decoding's once a draft was judged."""
    choose = choices.choose

    def shifted(logits_RV: Tensor, judged: Sequence[choices.Judged]) -> list[list[int]]:
        moved = [j._replace(positions=[p + 1000 * (len(j.paths) > 1) for p in j.positions]) for j in judged]
        return choose(logits_RV, moved)

    monkeypatch.setattr(engine_round, "choose", shifted)
    assert audit(tiny_orthrus(), strategies=(strategy,)).passed
    report = audit(tiny_orthrus(), strategies=(strategy,), temperature=1.0)
    assert report.strategies[0].num_broken > 0
    assert not report.passed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", ["chain", "fused_tree"])
def test_a_corrupt_cache_does_not_excuse_itself(
    strategy: Strategy, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token is our own scores' best, and still wrong: only the stock model's noise can tell."""
    hidden = EagerRunner.hidden

    def corrupted(self: EagerRunner, p: Pass, pool: SlotPool) -> Tensor:
        hidden_RC = hidden(self, p, pool)
        for span in p.spans:
            if span.length > 20:
                pool.values[0][:, :, span.places[5]] = 0.0
        return hidden_RC

    monkeypatch.setattr(EagerRunner, "hidden", corrupted)
    report = audit(tiny_orthrus(), strategies=(strategy,), temperature=temperature)

    assert not report.passed
    assert any("above" in m.reason for m in report.mismatches)
    assert all(
        m.residue is not None and m.rounding_spread is not None and m.residue > 10 * m.rounding_spread
        for m in report.mismatches
    )


def test_a_slot_of_the_wrong_writer_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_wrong_writer(monkeypatch)
    report = audit(tiny_orthrus(), strategies=("ar",))

    assert not report.passed
    assert report.strategies[0].num_identical == 3
    assert "slot 0" in report.damages[0]


def together(**options: object) -> AuditReport:
    """Five prompts, two of which begin with the same whole page, at most three at a time."""
    page = "the same beginning of more than sixty-four characters, which fills a page of slots: "
    prompts = [*PROMPTS, Ask(page + "one"), Ask(page + "and another")]
    orthrus = tiny_orthrus("qwen3", config=EngineConfig(chunk=32))
    given: dict[str, Any] = {"prompts": prompts, "max_new_tokens": 24, "concurrency": 3, **options}
    return run_audit(orthrus, AuditOptions(**given))


@pytest.mark.parametrize("against", BASELINES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_that_share_passes_have_the_baselines_text(against: str, temperature: float) -> None:
    report = together(against=against, temperature=temperature, strategies=("ar", "chain", "fused_tree"))

    assert report.passed
    assert [s.num_identical for s in report.strategies] == [5, 5, 5]
    assert report.options["concurrency"] == 3
    assert "3 at a time" in report.summary


def test_a_fault_of_company_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request reads its neighbour's slot; alone, as the replay is, nothing is wrong."""
    hidden = EagerRunner.hidden

    def corrupted(self: EagerRunner, p: Pass, pool: SlotPool) -> Tensor:
        if len(p.spans) > 1:
            first, second = (span.places[0] for span in p.spans[:2])
            pool.values[0][:, :, second] = pool.values[0][:, :, first]
        return hidden(self, p, pool)

    monkeypatch.setattr(EagerRunner, "hidden", corrupted)
    assert together(concurrency=1, strategies=("ar",)).passed
    report = together(strategies=("ar",))
    assert not report.passed
    assert all("decoding again" in m.reason for m in report.mismatches)


def test_auto_can_be_audited() -> None:
    report = audit(tiny_orthrus(), strategies=("auto",), concurrency=2)
    assert report.passed
    assert report.strategies[0].num_identical == 3


def test_an_early_end_is_a_broken_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = engine.StopRules
    monkeypatch.setattr(engine, "StopRules", lambda ends, max_new_tokens: rules(ends, 5))
    report = audit(tiny_orthrus(), strategies=("ar",))

    assert not report.passed
    assert all(m.our_token is None and m.position == 5 for m in report.mismatches)
    assert "(end)" in report.to_markdown()


def test_a_constructed_near_tie_is_a_near_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens with one and the same row of the head; a change far below rounding picks the other."""
    orthrus = tiny_orthrus(disturb=0.0)
    first = audit(orthrus, strategies=("ar",))
    favourite = orthrus.generate("x", max_new_tokens=1).token_ids[0]
    twin = plant_tie(orthrus, favourite)
    head = DualView.head

    def nudged(self: DualView, hidden: Tensor, *, drafts: bool = False) -> Tensor:
        logits = head(self, hidden, drafts=drafts)
        logits[..., twin] += 1e-6
        return logits

    monkeypatch.setattr(DualView, "head", nudged)
    report = audit(orthrus, strategies=("ar", "chain", "fused_tree"))

    assert first.passed
    assert report.passed
    assert report.mismatches
    for mismatch in report.mismatches:
        assert mismatch.verdict == "near-tie"
        assert {mismatch.baseline_token, mismatch.our_token} == {favourite, twin}
        assert mismatch.gap is not None
        assert mismatch.rounding_spread is not None
        assert mismatch.gap <= 2 * mismatch.rounding_spread
        assert mismatch.residue is not None
        assert mismatch.residue < 1e-4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bfloat16_passes(temperature: float) -> None:
    report = audit(tiny_orthrus(dtype=torch.bfloat16), temperature=temperature)

    assert report.passed
    assert report.model["dtype"] == "bfloat16"


def test_the_rule_itself() -> None:
    stock = torch.tensor([5.0, 4.9, 0.0])
    block = torch.tensor([4.96, 4.94, 0.0])

    tie = judge({ONE_ROW: stock, AS_DECODED: block}, block.flip(0)[[1, 2, 0]], 0, 1)
    assert tie.rounding_spread == pytest.approx(0.04)
    assert (tie.verdict, tie.gap) == ("broken rule", pytest.approx(0.1))
    tie = judge({ONE_ROW: stock, AS_DECODED: block - 0.06}, torch.tensor([4.9, 4.92, 0.0]), 0, 1)
    assert tie.verdict == "near-tie"
    # The same tie, but our logits preferred another token than the one that was committed.
    liar = judge({ONE_ROW: stock, AS_DECODED: block - 0.06}, torch.tensor([4.93, 4.92, 0.0]), 0, 1)
    assert liar.verdict == "broken rule"
    assert judge({ONE_ROW: stock, AS_DECODED: stock}, None, 0, 1).verdict == "broken rule"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("strategy", "floor"), DRAFTING)
def test_replays_compute_what_generate_computes(strategy: Strategy, floor: bool, temperature: float) -> None:
    """Our passes, and both baselines in all their shapes: each the other's oracle."""
    orthrus = tiny_orthrus("gemma2")
    options = AuditOptions(prompts=PROMPTS, max_new_tokens=30, floor=floor, temperature=temperature, seed=3)
    config = options.decode_config(strategy)
    prompt_ids = orthrus.base.encode_prompt("replay this prompt")
    ids = orthrus.stream_ids(prompt_ids, config).drain().token_ids

    for position in (0, 1, 7, 20):
        ours = replay_ours(orthrus, prompt_ids, config, ids, position)
        stock, plain = (
            baseline_logits(orthrus, against, config, prompt_ids, list(ids[:position]), ours.chunks)
            for against in BASELINES
        )
        assert ours.token == ids[position]
        assert ours.logits_V is not None
        assert stock.keys() == plain.keys()
        for logits_V in (ours.logits_V, *stock.values(), *plain.values()):
            torch.testing.assert_close(logits_V, stock[ONE_ROW], atol=1e-4, rtol=1e-4)
            place = len(prompt_ids) + position
            assert int(scores(logits_V, config.sampling, place).argmax()) == ids[position]


@pytest.mark.parametrize("strategy", ["ar", "chain", "fused_tree"])
def test_a_replay_projects_the_rows_that_the_engine_projects(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a head whose logits hang on how many rows it is given, as in low precision they do a little."""
    orthrus = tiny_orthrus()
    real_head, real_choose, seen = orthrus.dual.head, choices.choose, []

    def head(hidden: Tensor, *, drafts: bool = False) -> Tensor:
        return real_head(hidden, drafts=drafts) * (1 + 0.01 * len(hidden))

    def choose(logits_RV: Tensor, judged: Sequence[choices.Judged]) -> list[list[int]]:
        seen.extend(logits_RV.clone())
        return real_choose(logits_RV, judged)

    monkeypatch.setattr(orthrus.dual, "head", head)
    monkeypatch.setattr(engine_round, "choose", choose)
    config = decode_config(strategy=strategy, max_new_tokens=30)
    prompt_ids = orthrus.base.encode_prompt("replay this prompt")
    ids = orthrus.stream_ids(prompt_ids, config).drain().token_ids
    for position in (1, 7, 20):
        seen.clear()
        ours = replay_ours(orthrus, prompt_ids, config, ids, position)
        assert any(torch.equal(ours.logits_V, logits_V) for logits_V in seen)


def test_the_score_of_a_sampled_token_is_what_the_draw_maximises() -> None:
    logits_V = torch.randn(50, generator=torch.Generator().manual_seed(0))
    sampling = SamplingParams(temperature=0.7, seed=9)
    noise_V = exponential_noise(9, [41], 50, "cpu")[0]
    expected_V = ((logits_V / 0.7).exp() / noise_V).log()
    torch.testing.assert_close(scores(logits_V, sampling, 41), expected_V)
    assert scores(logits_V, SamplingParams(), 41) is logits_V


def test_the_report_in_every_form() -> None:
    seen: list[tuple[str, int, int]] = []
    orthrus = tiny_orthrus()
    report = run_audit(
        orthrus, AuditOptions(prompts=PROMPTS[:1], max_new_tokens=8), lambda *event: seen.append(event)
    )

    raw = json.loads(json.dumps(report.to_dict()))
    assert raw["passed"] is True
    assert raw["options"]["against"] == "stock"
    assert "5 of 5 outputs identical to the stock model's," in raw["summary"]
    assert raw["provenance"]["seed"] is None
    assert raw["model"]["block_size"] == 8
    assert {"baseline", "identical", "near_ties", "broken", "gap", "rounding_spread"} <= raw["legend"].keys()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.to_table())
    assert "PASSED: 5 of 5" in console.export_text()
    assert "| chain | 1 | 1 |" in report.to_markdown()
    assert report.to_csv().startswith("strategy,")
    assert [done for _, done, _ in seen] == list(range(7))
    assert [name for name, *_ in seen] == ["baseline", *FIXED_STRATEGIES, "done"]
    assert all(total == 6 for *_, total in seen)


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": []},
        {"prompts": PROMPTS, "strategies": ()},
        {"prompts": PROMPTS, "strategies": ("magic",)},
        {"prompts": PROMPTS, "against": "llama.cpp"},
        {"prompts": PROMPTS, "concurrency": 0},
    ],
)
def test_wrong_options_are_told(options: dict[str, object]) -> None:
    with pytest.raises(UserInputError):
        AuditOptions(**options)  # type: ignore[arg-type]


def test_wrong_block_size_is_told() -> None:
    with pytest.raises(UserInputError, match="block_size 99"):
        audit(tiny_orthrus(), block_size=99)
