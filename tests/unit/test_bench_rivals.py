"""The rivals' arms give one text, and the figures are those of the runs."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_orthrus import tiny_orthrus

FOLDER = Path(__file__).parents[2] / "benchmarks" / "rivals"


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = spec_from_file_location("rivals", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_arm_gives_the_stock_models_text(rivals: Any) -> None:
    orthrus = tiny_orthrus()
    arms = {
        rivals.STOCK: rivals.stock(orthrus),
        "lookup": rivals.stock(orthrus, prompt_lookup_num_tokens=3),
        "ours": rivals.ours(orthrus, "fused_tree"),
    }
    ids = [orthrus.base.encode_prompt(text) for text in ("a prompt a prompt a prompt", "another")]
    runs = rivals.measure(arms, ids, 24, 2)
    results = {name: rivals.summary(mine, runs[rivals.STOCK]) for name, mine in runs.items()}
    assert all(r["num_equal"] == r["num_prompts"] == 2 for r in results.values())
    assert results[rivals.STOCK]["speedup"] == pytest.approx(1.0)
    assert results[rivals.STOCK]["tokens_per_pass"] == 1.0
    assert results["ours"]["tokens_per_pass"] > 1.0
    assert "| lookup |" in rivals.table(results)
    assert rivals.kept(runs["lookup"][0][0])["tokens"] == 24


def test_the_speed_up_is_a_ratio_of_whole_times(rivals: Any) -> None:
    answer = rivals.Answer
    base = [[answer((1, 2), 5.0, 40.0, 2)] * 2, [answer((1, 2), 5.0, 10.0, 2)] * 2]
    mine = [[answer((1, 2), 4.0, 20.0, 1)] * 2, [answer((1, 3), 4.0, 10.0, 1)] * 2]
    found = rivals.summary(mine, base)
    assert found["speedup"] == pytest.approx(2.0**0.5)
    assert found["interval"] == pytest.approx([1.0, 2.0])
    assert found["num_equal"] == 1
    assert found["tokens_per_second"] == pytest.approx(1e3 * 4 / 30)
