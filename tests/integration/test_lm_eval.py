"""Orthrus as a model of lm-evaluation-harness; left out where the harness is not installed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_orthrus import TinyTokenizer, tiny_orthrus

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'lm_eval>=0.4.13' to test it")
integration = pytest.importorskip("orthrus.integrations.lm_eval")

from orthrus.errors import UserInputError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


class Tokenizer(TinyTokenizer):
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return super().__call__(text)


def model(strategy: str = "chain", **options: Any) -> Any:
    orthrus = tiny_orthrus()
    orthrus.base = replace(orthrus.base, tokenizer=Tokenizer())  # type: ignore[arg-type]
    return integration.OrthrusLM(orthrus=orthrus, strategy=strategy, **options)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [lm_eval.api.instance.Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_log_likelihoods_are_the_stock_models() -> None:
    lm = model()
    answers = lm.loglikelihood(instances("loglikelihood", ("some text", " and more"), ("", "x yz")))
    ids = lm.tok_encode("some text and more")
    with torch.inference_mode():
        log_probs_TV = lm._orthrus.stock()(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(log_probs_TV[i - 1, ids[i]]) for i in range(9, len(ids)))
    assert answers[0][0] == pytest.approx(expected, rel=1e-5)
    assert answers[1][0] < 0


def test_rolling_covers_every_token() -> None:
    lm = model()
    text = "a long text " * 30
    assert len(lm.tok_encode(text)) > lm.max_length
    (rolled,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    assert rolled < -len(text)


def test_texts_are_those_of_the_base_and_end_before_the_stop_string() -> None:
    asks = [
        ("prompt", {"until": [], "max_gen_toks": 24, "do_sample": False}),
        ("other", {"temperature": 0.0}),
    ]
    drafted, plain = (
        model(strategy, batch_size=2, max_gen_toks=16).generate_until(instances("generate_until", *asks))
        for strategy in ("chain", "ar")
    )
    assert drafted == plain
    stop = plain[0][5:7]
    (cut,) = model().generate_until(
        instances("generate_until", ("prompt", {"until": [stop], "max_gen_toks": 24, "temperature": 0}))
    )
    assert cut == plain[0][: plain[0].index(stop)]


def test_unknown_settings_are_told() -> None:
    with pytest.raises(UserInputError, match="num_beams"):
        model().generate_until(instances("generate_until", ("x", {"num_beams": 4})))
    with pytest.raises(UserInputError, match="quantum"):
        model(quantum=1)


def test_the_harness_runs_a_local_task(tmp_path: Path) -> None:
    questions = [{"question": f"{a}, {a + 1},", "answer": f" {a + 2}"} for a in range(3)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(q) + "\n" for q in questions))
    task = {
        "task": "counting",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [","], "max_gen_toks": 8, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    # Reading the harness's own thousands of tasks takes minutes.
    tasks = lm_eval.tasks.TaskManager(include_defaults=False)
    outputs = [
        [
            sample["resps"]
            for sample in lm_eval.simple_evaluate(model=model(strategy), tasks=[task], task_manager=tasks)[
                "samples"
            ]["counting"]
        ]
        for strategy in ("ar", "chain")
    ]
    assert len(outputs[0]) == 3
    assert outputs[0] == outputs[1]
