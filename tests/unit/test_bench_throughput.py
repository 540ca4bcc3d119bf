"""benchmarks/throughput.py on a tiny model: what it runs, and the arithmetic of ratios."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.tiny_orthrus import tiny_orthrus

from orthrus.api import Orthrus

FOLDER = Path(__file__).parents[2] / "benchmarks"
TEXTS = ["first prompt", "a second one", "third", "the fourth of them", "x", "six"]


def loaded(name: str) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module(name)
    for each in (name, "llama_side"):
        sys.modules.pop(each, None)


@pytest.fixture(scope="module")
def throughput() -> Iterator[Any]:
    yield from loaded("throughput")


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "prompts.jsonl"
    records = [{"prompt": text, "domain": ("math", "chat")[i % 2]} for i, text in enumerate(TEXTS)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(Orthrus, "load", lambda *_, **__: tiny_orthrus())
    return file


def run(script: Any, *args: str) -> None:
    typer.main.get_command(script.app).main(list(args), standalone_mode=False)


@pytest.mark.parametrize("shortest", [12, 4])
def test_all_arms_at_every_concurrency(
    throughput: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortest: int
) -> None:
    class Side:
        """Answers as our plain decoding does, and notes how many at a time."""

        def __init__(self, path: Path, num_positions: int, num_sequences: int) -> None:
            self.asked: list[int] = []
            self.num_sequences = num_sequences
            sides.append(self)

        def set_threads(self, number: int) -> None:
            pass

        def close(self) -> None:
            pass

        def decode_together(self, ids: list[list[int]], num_new: int) -> Any:
            self.asked.append(len(ids))
            asked = [throughput.Asked(each, num_new) for each in ids]
            return throughput.our_arm(tiny_orthrus(), "ar")(asked, 1).answers

    sides: list[Side] = []
    monkeypatch.setattr(throughput, "LlamaSide", Side)
    monkeypatch.setattr(throughput, "default_gguf", lambda: tmp_path / "m.gguf")
    monkeypatch.setattr(throughput, "best_threads", lambda *_: {1: 2.0, 2: 1.0})
    monkeypatch.setattr(throughput, "find_spec", lambda _: object())
    output = tmp_path / "new" / "throughput.json"
    options = ("--concurrency", "1", "--concurrency", "3", "--precision", "float32", "--requests", "4")
    run(
        throughput,
        str(prompts),
        *options,
        "--rounds",
        "2",
        "--max-new-tokens",
        "12",
        "--shortest",
        str(shortest),
        "--repeats",
        "2",
        "--output",
        str(output),
    )

    report = json.loads(output.read_text())
    assert {"kind", "legend", "settings", "options", "prompts", "provenance"} <= report.keys()
    rows = {(row["arm"], row["concurrency"]): row for row in report["results"]}
    assert list(rows) == [(arm, n) for n in (1, 3) for arm in ("ar", "auto", "transformers", "llama.cpp")]
    for (arm, level), row in rows.items():
        assert row["num_equal"] == row["num_requests"] == (4 if level == 1 else 6), (arm, level)
        assert row["first_differences"] == {}
        assert row["tokens_per_second"]["low"] > 0
        assert row["to_ar"] == pytest.approx(1.0) if arm == "ar" else row["to_ar"] > 0
        assert row["to_one"] == pytest.approx(1.0) if level == 1 else row["to_one"] > 0
        ours = arm in ("ar", "auto")
        assert ours == ("decoding" in row) == ("decoding_to_one" in row)
        assert not ours or level != 1 or row["decoding_to_one"] == pytest.approx(1.0)
    assert rows["ar", 1]["tokens_per_pass"] == 1.0
    # Six requests, three at a time: a prompt joins as soon as another has ended.
    assert 1.5 < rows["ar", 3]["tokens_per_pass"] <= 3.0
    lengths = report["prompts"]["new_tokens"]
    assert (set(lengths) == {12}) == (shortest == 12)
    assert all(shortest <= length <= 12 for length in lengths)
    (side,) = sides
    assert (side.num_sequences, set(side.asked)) == (3, {1, 3})


def test_passes_with_prompts_are_not_decoding(throughput: Any) -> None:
    asked = [throughput.Asked([1, 2, 3], 6), throughput.Asked([4, 5], 4), throughput.Asked([6], 5)]
    arm = throughput.our_arm(tiny_orthrus(), "ar")
    alone, together = arm(asked, 1), arm(asked, 2)
    # One at a time, each prompt's pass decides one token.
    assert (alone.num_passes, alone.decoded) == (15, 12)
    assert alone.answers == together.answers
    # Two begin in one pass; the third's prompt shares one with the first.
    assert (together.num_passes, together.decoded) == (9, 15 - 2 - 2)
    assert together.decode_s > 0.0


def test_quick_is_little(throughput: Any, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.json"
    run(throughput, str(prompts), "--quick", "--no-llama", "--output", str(output))
    report = json.loads(output.read_text())
    assert {(row["precision"], row["concurrency"]) for row in report["results"]} == {
        ("float32", n) for n in (1, 2, 4)
    }
    assert len(report["prompts"]["lengths"]) == 4
    with pytest.raises(typer.BadParameter, match="6 prompts have at most 192 tokens, and 9 are needed"):
        run(
            throughput,
            str(prompts),
            "--requests",
            "9",
            "--concurrency",
            "1",
            "--no-llama",
            "--output",
            str(output),
        )


def test_llama_cpp_decodes_a_token_of_every_sequence_at_once(
    throughput: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for its C interface, whose sequences must be fed every position once, in order."""
    llama_side = sys.modules["llama_side"]

    class Batch:
        def __init__(self, size: int) -> None:
            self.n_tokens = 0
            self.token, self.pos, self.n_seq_id, self.logits = ([0] * size for _ in range(4))
            self.seq_id = [[0] for _ in range(size)]

    class FakeC:
        def __init__(self) -> None:
            self.seen: dict[int, list[int]] = {}
            self.rows: list[int] = []
            self.sizes: list[int] = []
            self.freed = 0

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

        def llama_memory_clear(self, *_: Any) -> None:
            self.seen = {}

        def llama_batch_init(self, size: int, *_: int) -> Batch:
            return Batch(size)

        def llama_batch_free(self, _: Batch) -> None:
            self.freed += 1

        def llama_decode(self, _: Any, batch: Batch) -> int:
            self.rows = []
            self.sizes.append(batch.n_tokens)
            for row in range(batch.n_tokens):
                ids = self.seen.setdefault(batch.seq_id[row][0], [])
                assert batch.pos[row] == len(ids)
                ids.append(batch.token[row])
                self.rows.append(ids[-1])
            return 0

        def llama_sampler_sample(self, _s: Any, _c: Any, row: int) -> int:
            return self.rows[row] + 1

    llama = object.__new__(llama_side.Llama)
    llama._c, llama._context, llama._sampler = FakeC(), None, None
    assert llama.decode_together([[5, 6], [10], [20, 21, 22]], 3) == [(7, 8, 9), (11, 12, 13), (23, 24, 25)]
    assert llama._c.sizes == [2, 1, 3, 3, 3]
    assert llama._c.freed == 5
