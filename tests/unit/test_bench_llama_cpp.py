"""benchmarks/against_llama_cpp.py without llama.cpp: who runs when, what is asked, the arithmetic."""

import ctypes
import hashlib
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from tests.tiny_orthrus import tiny_orthrus

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("against_llama_cpp")
    for name in ("against_llama_cpp", "llama_side"):
        del sys.modules[name]


class FakeC:
    """The functions of llama_cpp that are called; token n is followed by n + 1, whatever ends a text."""

    llama_token = ctypes.c_int32

    def __init__(self, loads: bool = True) -> None:
        self.loads = loads
        self.fed: list[list[int]] = []
        self.clears = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_: SimpleNamespace()

    def llama_log_callback(self, function: Any) -> Any:
        return function

    def llama_model_load_from_file(self, path: bytes, _: Any) -> Any:
        return path if self.loads else None

    def llama_memory_clear(self, *_: Any) -> None:
        self.clears += 1

    def llama_batch_get_one(self, array: Any, count: int) -> list[int]:
        return list(array)[:count]

    def llama_decode(self, _: Any, batch: list[int]) -> int:
        self.fed.append(batch)
        return 0

    def llama_sampler_sample(self, *_: Any) -> int:
        return self.fed[-1][-1] + 1


def test_one_decode_and_one_choice_a_token(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_side import Llama

    fake = FakeC()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    llama = Llama(Path("x.gguf"), 64)
    for _ in range(2):
        fake.fed.clear()
        run = llama.decode([5, 6, 7], 4)
        assert run.token_ids == (8, 9, 10, 11)
        assert fake.fed == [[5, 6, 7], [8], [9], [10]]
        assert run.ttft_ms > 0
        assert run.decode_ms > 0
    assert fake.clears == 2
    monkeypatch.setitem(sys.modules, "llama_cpp", FakeC(loads=False))
    with pytest.raises(ValueError, match="cannot load"):
        Llama(Path("x.gguf"), 64)


def test_the_fastest_number_of_threads(script: Any) -> None:
    asked: list[int] = []

    class Side:
        def set_threads(self, number: int) -> None:
            asked.append(number)

        def decode(self, _: list[int], num_new: int) -> Any:
            # The first round is slow for all: it must not count.
            ms = 1000.0 if len(asked) <= 3 else {1: 40.0, 2: 20.0, 3: 30.0}[asked[-1]]
            return script.Run(tuple(range(num_new)), 1.0, ms)

    found = script.best_threads(Side(), [1], range(1, 4), num_new=11, repeats=2)
    assert found == {1: 250.0, 2: 500.0, 3: pytest.approx(1000 / 3)}
    assert asked == [1, 2, 3] * 3


def test_arms_take_turns(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SETTLE_S", 0.0)
    called: list[tuple[str, int]] = []

    def arm(name: str) -> Any:
        def decode(prompt_ids: list[int], num_new: int) -> Any:
            called.append((name, num_new))
            return script.Run((1,) * num_new, 1.0, 1.0)

        return decode

    arms = {name: arm(name) for name in "abc"}
    order = [(name, prompt) for name, prompt, _ in script.measure(arms, [[1], [2]], 40, 2)]
    assert called[:3] == [("a", 16), ("b", 16), ("c", 16)]
    assert order == [(name, i // 2) for i, names in enumerate(("abc", "bca", "cab", "abc")) for name in names]


def test_ratios_are_of_the_same_prompt_and_repeat(script: Any) -> None:
    def run(tokens: tuple[int, ...], ttft_ms: float, decode_ms: float) -> Any:
        return script.Run(tokens, ttft_ms, decode_ms)

    same, other = (1, 2, 3), (1, 9, 3)
    theirs = [[run(same, 1, 10), run(same, 1, 40), run(same, 1, 20)], [run(same, 2, 8)] * 3]
    ours = [[run(same, 1, 5), run(same, 1, 10), run(same, 1, 20)], [run(other, 2, 2)] * 3]
    results = script.summarise({"ours": ours, script.LLAMA: theirs})
    row = results["ours"]
    # 2, 4 and 1 on the first prompt; 4 on the second.
    assert row["decode_ratio"]["by_prompt"] == [2.0, 4.0]
    assert (row["decode_ratio"]["median"], row["decode_ratio"]["interval"]) == (3.0, [2.0, 4.0])
    assert row["ratio"]["by_prompt"] == [pytest.approx(11 / 6), 2.5]
    assert row["decode_tokens_per_second"] == (200.0 + 1000.0) / 2
    assert row["first_difference"] == [None, 1]
    assert row["num_equal"] == 1
    assert "ratio" not in results[script.LLAMA]
    table = script.table(results)
    assert "| ours | 600.0 |" in table
    assert "3.00 [2.00, 4.00] (2.00..4.00)" in table
    assert script.first_difference((1, 2), (1, 2, 3)) == 2


def test_settings_go_through_as_they_are(script: Any) -> None:
    assert script.named(["node-budget=12", "floor=false", "view=a=b"]) == {
        "node_budget": 12,
        "floor": False,
        "view": "a=b",
    }
    assert list(script.combinations(dtype=["a", "b"], runner=None)) == [(("dtype", "a"),), (("dtype", "b"),)]
    assert list(script.combinations(dtype=None, runner=None)) == [()]
    with pytest.raises(typer.BadParameter, match="NAME=VALUE"):
        script.named(["floor"])
    with pytest.raises(typer.BadParameter, match="decode_config takes no colour"):
        script.check_keywords({"colour": 1}, script.decode_config)


def test_a_whole_run(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orthrus = tiny_orthrus()
    asked: list[tuple[Any, ...]] = []

    class Side:
        system_info = "fake"

        def __init__(self, path: Path, num_positions: int) -> None:
            asked.append((path.name, num_positions))

        def set_threads(self, number: int) -> None:
            pass

        def close(self) -> None:
            asked.append(("closed",))

        def decode(self, prompt_ids: list[int], num_new: int) -> Any:
            return script.our_side(orthrus, {"strategy": "ar"})(prompt_ids, num_new)

    monkeypatch.setattr(script, "LlamaSide", Side)
    monkeypatch.setattr(script.Orthrus, "load", lambda model, view, dtype=None: orthrus)
    prompts, gguf, output = (tmp_path / name for name in ("p.jsonl", "m.gguf", "r.json"))
    prompts.write_text('{"prompt": "first"}\n{"prompt": "second one"}\n')
    gguf.write_bytes(b"GGUF")
    args = [
        str(prompts),
        "--gguf",
        str(gguf),
        "--max-new-tokens",
        "12",
        "--repeats",
        "2",
        "--output",
        str(output),
    ]
    args += ["--dtype", "float32", "--strategy", "ar", "--strategy", "chain", "--decode", "block-size=4"]
    typer.main.get_command(script.app).main(args, standalone_mode=False)
    report = json.loads(output.read_text())
    assert list(report["results"]) == ["float32, 4, ar", "float32, 4, chain", script.LLAMA]
    assert all(row.get("num_equal", 2) == 2 for row in report["results"].values())
    assert report["settings"]["float32, 4, chain"]["decode"] == {"block_size": 4, "strategy": "chain"}
    assert [len(rows) for rows in report["runs"][script.LLAMA]] == [2, 2]
    assert asked == [("m.gguf", 12 + max(report["prompts"]["lengths"])), ("closed",)]
    assert report["llama_cpp"]["sha256"] == hashlib.sha256(b"GGUF").hexdigest()
    assert report["provenance"]["versions"]["orthrus-lm"]
