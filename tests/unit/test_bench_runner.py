"""The runner on a tiny model: all arms, interleaved, same tokens."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny_orthrus import tiny_orthrus

from orthrus.base.bench_prompts import BenchPrompt
from orthrus.bench import BenchOptions, run_bench, runner
from orthrus.bench.runner import prompts_digest
from orthrus.engine.stock import stock_generate
from orthrus.errors import UserInputError
from orthrus.model.twin import twins

PROMPTS = [
    BenchPrompt("first prompt", "math"),
    BenchPrompt("second one", "chat"),
    BenchPrompt("third", "chat"),
]


def test_all_arms_with_the_stock_models_tokens() -> None:
    seen: list[tuple[str, int, int]] = []
    orthrus = tiny_orthrus()
    report = run_bench(
        orthrus,
        BenchOptions(prompts=PROMPTS, max_new_tokens=20, repeats=2),
        lambda *event: seen.append(event),
    )

    stock, ar, chain = report.overall
    assert [row.arm for row in report.overall] == ["stock", "ar", "chain"]
    for row in report.overall:
        assert row.equal_to_plain == (3, 3)
        assert row.tokens == stock.tokens
        assert row.ttft_ms.low > 0
        assert row.tpot_ms.low > 0
    assert (stock.tokens_per_forward_pooled, ar.tokens_per_forward_pooled) == (1.0, 1.0)
    assert chain.cycles < ar.cycles
    assert sum(chain.accepted_histogram) > 0
    assert {row.domain for row in report.rows} == {"all", "math", "chat"}
    # 3 arms, one warm-up round, 3 prompts, 2 repeats; then the end.
    assert [event[1] for event in seen] == [*range(3 + 18), 21]
    assert twins(orthrus.dual.base)
    json.dumps(report.to_dict())


def test_every_strategy_writes_what_plain_decoding_writes() -> None:
    strategies = ("chain", "tree", "fused", "fused_tree")
    report = run_bench(
        tiny_orthrus(),
        BenchOptions(
            prompts=PROMPTS, strategies=strategies, temperatures=(0.0, 1.0), max_new_tokens=16, repeats=2
        ),
    )

    rows = {(row.temperature, row.arm): row for row in report.overall}
    assert [arm for _, arm in rows] == ["stock", "ar", *strategies] * 2
    for (temperature, arm), row in rows.items():
        # Sampled stock text is drawn by another generator.
        assert row.equal_to_plain == (None if (temperature, arm) == (1.0, "stock") else (3, 3))
        assert row.rows_per_pass > 1.0 or arm in ("stock", "ar")
    assert all(rows[t, "fused"].passes < rows[t, "chain"].passes < rows[t, "ar"].passes for t in (0.0, 1.0))
    # The text of another seed: repeats are no copies of each other.
    assert len({run.num_accepted for run in report.runs if run.temperature and run.arm == "chain"}) > 1


def test_a_text_that_differs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = runner._Bench.decode

    def wrong(self: Any, job: Any) -> Any:
        broken = job.arm == "chain" and job.repeat == 1 and job.prompt_index == 0
        run = decode(self, job)
        return replace(run, output="other") if broken else run

    monkeypatch.setattr(runner._Bench, "decode", wrong)
    options = BenchOptions(
        prompts=PROMPTS[:2], temperatures=(0.0, 1.0), max_new_tokens=6, repeats=2, warmup=0
    )
    rows = run_bench(tiny_orthrus(), options).overall
    assert [row.equal_to_plain for row in rows] == [(2, 2), (2, 2), (1, 2), None, (2, 2), (1, 2)]


def test_the_digest_names_the_prompts() -> None:
    report = run_bench(tiny_orthrus(), BenchOptions(prompts=PROMPTS, max_new_tokens=2, repeats=1, warmup=0))
    digest = prompts_digest(PROMPTS)
    assert report.options["prompts_digest"] == digest
    changed = [PROMPTS[::-1], PROMPTS[:2], [*PROMPTS[:2], BenchPrompt("third", "math")]]
    assert len({digest, *map(prompts_digest, changed)}) == 4


def test_arms_take_turns() -> None:
    report = run_bench(
        tiny_orthrus(), BenchOptions(prompts=PROMPTS[:1], max_new_tokens=4, repeats=3, warmup=0)
    )

    order = [run.arm for run in report.runs]
    assert order == ["stock", "ar", "chain", "ar", "chain", "stock", "chain", "stock", "ar"]


def test_sampling_repeats_itself() -> None:
    options = BenchOptions(prompts=PROMPTS[:1], max_new_tokens=12, temperatures=(0.8,), seed=None, repeats=2)
    first, second = (run_bench(tiny_orthrus(), options) for _ in range(2))

    assert [r.num_tokens for r in first.runs] == [r.num_tokens for r in second.runs]
    assert [r.num_accepted for r in first.runs] == [r.num_accepted for r in second.runs]


def test_stock_runs_ignore_the_checkpoints_filters_and_the_callers_randomness() -> None:
    orthrus = tiny_orthrus()
    prompt_ids, options = [5, 6, 7], {"max_new_tokens": 10, "eos_token_ids": frozenset({2})}
    model = orthrus.stock()
    plain = stock_generate(model, prompt_ids, **options)  # type: ignore[arg-type]
    model.generation_config.repetition_penalty = 5.0
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    again = stock_generate(model, prompt_ids, **options)  # type: ignore[arg-type]
    sampled = stock_generate(model, prompt_ids, temperature=1.0, seed=4, **options)  # type: ignore[arg-type]

    assert model.generation_config.repetition_penalty == 5.0
    assert again.token_ids == plain.token_ids
    assert sampled.token_ids != plain.token_ids
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"strategies": ("forest",)}, "strategy must be one of"),
        ({"repeats": 0}, "repeats"),
        ({"warmup": -1}, "warmup"),
        ({"temperatures": (0.0, -1.0)}, "temperature must"),
        ({"temperatures": ()}, "at least one temperature"),
        ({"temperatures": (0.0, 0.0)}, "twice"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_wrong_options_are_told(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserInputError, match=said):
        BenchOptions(**({"prompts": PROMPTS} | changes))  # type: ignore[arg-type]


def test_what_does_not_fit_the_model_is_told_before_anything_runs() -> None:
    with pytest.raises(UserInputError, match="block_size 9"):
        run_bench(tiny_orthrus(), BenchOptions(prompts=PROMPTS, block_size=9))
    with pytest.raises(UserInputError, match="context"):
        run_bench(tiny_orthrus(), BenchOptions(prompts=[BenchPrompt("x" * 300)]))
