"""A view of no numbers at all: NaN, infinities or far too large ones in its weights change no text."""

from functools import cache

import pytest
import torch
from tests.engines import decode, engine_for, run_all
from tests.tiny import tiny_dual, tiny_prompt
from tests.unit.test_policy import FLAT
from tests.ways import WAYS

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.engine.costs import Costs
from orthrus.engine.runners import make_runner
from orthrus.model.dual_view import DualView
from orthrus.model.runner import EagerRunner, Runner

PROMPT = tiny_prompt(12, seed=4)
BROKEN = {"nan": torch.nan, "inf": torch.inf, "minus inf": -torch.inf, "overflow": 1e38}
SAMPLING = {
    "greedy": SamplingParams(),
    "sampled": SamplingParams(temperature=1.0, seed=3),
    "filters": SamplingParams(temperature=1.4, top_k=20, top_p=0.95, min_p=0.02, seed=4),
    "rules": SamplingParams(temperature=0.7, repetition_penalty=1.3, logit_bias={7: -100.0}, seed=5),
}
WHERE = ["everything", "one value projection", "half", "repair head"]
EVERY_WAY = [*WAYS, ("auto", True)]


def broken(value: float, where: str, *, name: str = "llama") -> DualView:
    dual = tiny_dual(name, disturb=0.1, repair_rank=4)
    with torch.no_grad():
        for i, (path, parameter) in enumerate(dual.view_parameters().items()):
            is_hit = {
                "everything": True,
                "one value projection": i == 2,
                "half": not path.startswith("repair") and i % 2 == 0,
                "repair head": path.startswith("repair"),
            }[where]
            if is_hit:
                parameter.fill_(value) if where != "half" else parameter.view(-1)[::3].fill_(value)
    return dual


@cache
def plain(params: SamplingParams, name: str = "llama") -> tuple[int, ...]:
    config = DecodeConfig(max_new_tokens=24, strategy="ar", sampling=params)
    return decode(tiny_dual(name), PROMPT, config).token_ids


def check_every_way(runner: Runner, params: SamplingParams, expected: tuple[int, ...]) -> None:
    """Each strategy alone, then all of them in one engine, beside a healthy neighbour in their passes."""
    configs = [
        DecodeConfig(max_new_tokens=24, strategy=strategy, floor=floor, sampling=params, node_budget=12)
        for strategy, floor in EVERY_WAY
    ]
    for config in configs:
        assert decode(runner, PROMPT, config).token_ids == expected, config.strategy
    engine = engine_for(runner)
    requests = [engine.submit(PROMPT, config, eos_token_ids=frozenset()) for config in configs]
    run_all(engine, requests)
    assert [tuple(request.token_ids) for request in requests] == [expected] * len(configs)


@pytest.fixture(autouse=True)
def made_up_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthrus.engine.engine.pass_costs", lambda *_, **__: Costs(FLAT, FLAT))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("params", SAMPLING.values(), ids=SAMPLING)
def test_the_text_is_that_of_plain_decoding(params: SamplingParams, value: float, where: str) -> None:
    check_every_way(EagerRunner(broken(value, where)), params, plain(params))


@pytest.mark.parametrize("name", ["gemma2", "qwen3-sliding", "phi3"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
def test_other_families_too(name: str, value: float) -> None:
    check_every_way(
        EagerRunner(broken(value, "everything", name=name)), SamplingParams(), plain(SamplingParams(), name)
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN)
def test_compiled_passes_too(value: float, where: str) -> None:
    runner = make_runner(broken(value, where), "compiled")
    for params in SAMPLING.values():
        check_every_way(runner, params, plain(params))
