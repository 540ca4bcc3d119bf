"""The runner on a tiny model: all arms, interleaved, same tokens."""

import json

import pytest
import torch
from tests.tiny_orthrus import tiny_orthrus

from orthrus.bench import BenchOptions, BenchPrompt, run_bench
from orthrus.engine.probe import stock_generate
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
        assert row.equal_to_stock == (3, 3)
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


def test_arms_take_turns() -> None:
    report = run_bench(
        tiny_orthrus(), BenchOptions(prompts=PROMPTS[:1], max_new_tokens=4, repeats=3, warmup=0)
    )

    order = [run.arm for run in report.runs]
    assert order == ["stock", "ar", "chain", "ar", "chain", "stock", "chain", "stock", "ar"]


def test_sampling_repeats_itself_and_compares_nothing() -> None:
    options = BenchOptions(prompts=PROMPTS[:1], max_new_tokens=12, temperature=0.8, seed=None, repeats=2)
    first, second = (run_bench(tiny_orthrus(), options) for _ in range(2))

    assert [r.num_tokens for r in first.runs] == [r.num_tokens for r in second.runs]
    assert [r.num_accepted for r in first.runs] == [r.num_accepted for r in second.runs]
    assert all(row.equal_to_stock is None for row in first.rows)


def test_stock_runs_ignore_the_checkpoints_filters_and_the_callers_randomness() -> None:
    orthrus = tiny_orthrus()
    prompt_ids, options = [5, 6, 7], {"max_new_tokens": 10, "eos_token_ids": frozenset({2})}
    with orthrus.stock() as model:
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
        ({"strategies": ("tree",)}, "strategy must be one of"),
        ({"repeats": 0}, "repeats"),
        ({"warmup": -1}, "warmup"),
        ({"temperature": -1.0}, "temperature"),
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
