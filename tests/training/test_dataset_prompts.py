"""Data sets as prompt sources: the shapes they come in, what is drawn, and what is refused. No network."""

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from orthrus.errors import MissingExtraError, UserInputError
from orthrus.training.dataset_prompts import open_dataset, user_turns


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(folder: Path, *records: dict[str, Any], split: str = "train") -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(folder)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
SHARED = [
    {"from": "system", "value": "x"},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "So."},
]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "Why?", "messages": SHARED[:1]}, ("Why?",)),
        ({"question": "Why?", "answer": "So."}, ("Why?",)),
        ({"instruction": "Why?", "input": "", "output": "So."}, ("Why?",)),
        ({"instruction": "Translate.", "input": "Why?"}, ("Translate.\n\nWhy?",)),
        ({"turns": ["Why?", "And then?"]}, ("Why?", "And then?")),
        ({"messages": MESSAGES}, ("Why?",)),
        ({"conversations": SHARED}, ("Why?",)),
        # As trainers of preferences store them.
        ({"prompt": MESSAGES, "chosen": SHARED}, ("Why?",)),
    ],
)
def test_the_usual_shapes(tmp_path: Path, record: dict[str, Any], turns: tuple[str, ...]) -> None:
    found = open_dataset(write_jsonl(tmp_path / "set", record), None, "train")
    assert found.turns(None, 0) == found.turns(1, 0) == [turns]
    assert found.column == next(iter(record))
    assert found.revision


def test_messages_stored_by_column_and_what_holds_no_turn() -> None:
    assert user_turns({"role": ["system", "user"], "content": ["x", "Why?"]}) == ("Why?",)
    for nothing in (None, "  ", [], {}, 3, [3], MESSAGES[:1], [{"role": "user", "content": None}]):
        assert user_turns(nothing) == ()


def test_parquet_is_read_and_only_what_is_needed(tmp_path: Path) -> None:
    columns = {"answer": ["a", "b", "c"], "question": ["One?", None, "Three?"]}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "set" / "train-00000-of-00001.parquet"))
    found = open_dataset(str(tmp_path / "set"), None, "train")
    assert found.turns(None, 0) == [("One?",), ("Three?",)]
    assert [list(row) for row in found.rows] == [["question"]] * 3


def test_a_count_is_drawn_with_the_seed(tmp_path: Path) -> None:
    folder = write_jsonl(tmp_path / "set", *({"prompt": f"Number {i}?"} for i in range(40)))

    def draw(count: int | None, seed: int) -> list[tuple[str, ...]]:
        return open_dataset(folder, None, "train").turns(count, seed)

    assert draw(None, 1) == [(f"Number {i}?",) for i in range(40)]
    assert draw(5, 1) == draw(5, 1) != draw(5, 2)
    assert draw(5, 1) != draw(None, 1)[:5]
    assert sorted(draw(99, 1)) == sorted(draw(None, 1))


def test_what_cannot_be_used_is_said_in_one_sentence(tmp_path: Path) -> None:
    folder = write_jsonl(tmp_path / "set", {"text": "x", "label": 1})
    with pytest.raises(UserInputError, match=r"only text, label; write its prompts to a JSONL file"):
        open_dataset(folder, None, "train")
    with pytest.raises(UserInputError, match=r"no split 'test'.*'train'"):
        open_dataset(folder, None, "test")
    with pytest.raises(UserInputError, match=r"cannot be read .*'main'.*CONFIG"):
        open_dataset(folder, "main", "train")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserInputError, match=r"no data set .*empty with files"):
        open_dataset(str(empty), None, "train")
    with pytest.raises(UserInputError, match="hub is out of reach"):
        open_dataset("nobody/nothing", None, "train")
    silent = write_jsonl(tmp_path / "silent", {"messages": MESSAGES[:1]})
    with pytest.raises(UserInputError, match="holds a user turn in its column 'messages'"):
        open_dataset(silent, None, "train").turns(None, 0)
    (tmp_path / "set" / "train.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": ')
    with pytest.raises(UserInputError, match="cannot be read"):
        open_dataset(folder, None, "train").turns(None, 0)


def test_an_unknown_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset_builder", unknown)
    with pytest.raises(UserInputError, match=r"no data set a/b .*spelling.*hf auth login"):
        open_dataset("a/b", None, "train")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r'pip install "orthrus-lm\[train\]"'):
        open_dataset("a/b", None, "train")
