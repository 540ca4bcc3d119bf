"""The sceptic's row: graders that grade, code that is kept in its bounds, drafts that are taken unseen."""

import json
from pathlib import Path

import pytest
from tests.tiny_orthrus import tiny_orthrus

TASK = {
    "prompt": 'def add(a, b):\n    """Adds."""\n',
    "entry_point": "add",
    "test": "def check(f):\n    assert f(1, 2) == 3\n",
}


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_numbers_are_compared_by_value() -> None:
    from code_answers import number_is_right

    assert number_is_right(r"first 3, so \boxed{1,200} in 7 days", "1200")
    assert number_is_right("It costs $18.00", "18")
    assert not number_is_right("It is 17.", "18")
    assert not number_is_right("nothing", "18")


def test_code_is_judged_by_its_tests() -> None:
    from code_answers import passes, program

    assert passes(program("Here:\n```python\ndef add(a, b):\n    return a + b\n```", TASK))
    assert not passes(program("```python\ndef add(a, b):\n    return a - b\n```", TASK))
    assert passes(program("    return a + b", TASK))


@pytest.mark.parametrize(
    "source",
    [
        "import socket; socket.socket()",
        "import os; os.system('true') or 1 / 0",
        "x = bytearray(3 * 2**30)",
        "f = open('f', 'w'); f.write('x'); f.flush()",
        "while True: pass",
    ],
)
def test_code_is_kept_in_its_bounds(source: str) -> None:
    from code_answers import passes

    assert not passes(source, seconds=1)


def test_unverified_drafts_take_a_block_a_pass_and_lose_the_text() -> None:
    from sceptic import answer, mcnemar, summary

    orthrus = tiny_orthrus(disturb=0.6)
    task = {"turns": ["a prompt"], "answer": "1"}
    runs = {arm: [answer(orthrus, arm, "gsm8k", task, 60)] for arm in ("base", "orthrus", "unverified")}
    assert runs["orthrus"][0]["ids"] == runs["base"][0]["ids"]
    assert runs["unverified"][0]["ids"] != runs["base"][0]["ids"]
    sums = {arm: summary(mine, runs["base"]) for arm, mine in runs.items()}
    assert sums["unverified"]["tokens_per_pass"] > 5 > sums["orthrus"]["tokens_per_pass"] > 1
    assert [sums[arm]["identical"] for arm in runs] == [1, 1, 0]
    # Outside the benchmark nothing is taken unseen.
    assert answer(orthrus, "orthrus", "gsm8k", task, 60)["ids"] == runs["base"][0]["ids"]
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 6) == pytest.approx(2 / 64)


def test_only_answers_to_the_same_tasks_are_gone_on_with(tmp_path: Path) -> None:
    import sceptic

    tasks = {"gsm8k": [{"turns": ["1 + 1?"], "answer": "#### 2"}]}
    options = {"limit": 3, "tasks": sceptic.digest_of(tasks)}
    kept = tmp_path / "x.part.json"
    assert sceptic.answered(kept, options) is None
    runs = {"gsm8k": {"base": [{"tokens": 1}]}}
    kept.write_text(json.dumps({"options": options, "runs": runs}))
    assert sceptic.answered(kept, options) == runs
    tasks["gsm8k"][0]["turns"] = ["1 + 2?"]
    assert sceptic.answered(kept, options | {"tasks": sceptic.digest_of(tasks)}) is None
