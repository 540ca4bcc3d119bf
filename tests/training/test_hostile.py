"""Recipes, corpora and manifests that somebody spoilt: one sentence each."""

import datetime
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from orthrus.errors import OrthrusError
from orthrus.training import manifest
from orthrus.training.corpus import read_source
from orthrus.training.packs import packed_corpora
from orthrus.training.prompt_sources import read_prompts_of
from orthrus.training.recipe import TrainConfig
from orthrus.training.recipe_file import load_recipe

KEYS = [f.name for f in fields(TrainConfig)]
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
VALUES: list[Any] = [
    True, -1, 0, 10**15, -(10**30), 10**30, -0.5, 1e300, float("nan"), float("inf"), "", " ",
    "~nobody-here/x", "a\0b", "x" * 9999, "\ud800", "\x1b[31m", [], [[]], [None], [1, 1], [-1, 2.5], ["", ""],
    [{}], {}, {"a": 1}, datetime.date(2020, 1, 1), b"\xff", {1, 2}, [10**30], ["a\0b"],
]  # fmt: skip


def one_sentence(error: OrthrusError) -> None:
    text = str(error)
    assert 10 < len(text) < 1500, text[:300]
    assert text.rstrip().endswith((".", "?"))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_a_recipe_with_wrong_values(tmp_path: Path, key: str) -> None:
    file = tmp_path / "recipe.yaml"
    for value in VALUES:
        file.write_text(yaml.safe_dump({key: value}))
        try:
            config = load_recipe(file)
        except OrthrusError as error:
            one_sentence(error)
            continue
        found = getattr(config, key)
        if isinstance(found, float):
            assert found == float(value)
        else:
            assert found == value or found == tuple(value if isinstance(value, list) else [value])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 2000, "steps: " + "[" * 2000, "steps: 2020-99-99", f"steps: {'9' * 5000}", "[]", "0", "false",
        "'a'", "steps: !!python/object:os.system x", "a: *nowhere", "\x01", LAUGHS, f"{LAUGHS}corpus: *i",
        f"{LAUGHS}", "? [1]\n: 2", "1: 2", "null: 3", "&a [*a]", "corpus: &a [*a]", "steps:\n\t- 1",
    ],
)  # fmt: skip
def test_texts_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(OrthrusError) as caught:
        load_recipe(file)
    one_sentence(caught.value)


def test_recipes_that_are_no_text_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for content in (b"\xff\xfes\0t\0", b"steps: \xe9", "steps: 3".encode("utf-16")):
        file.write_bytes(content)
        with pytest.raises(OrthrusError, match="not UTF-8"):
            load_recipe(file)
    with pytest.raises(OrthrusError, match="cannot be read"):
        load_recipe(tmp_path)
    file.write_bytes("\ufeffsteps: 3".encode())
    assert load_recipe(file).steps == 3
    file.write_text("")
    assert load_recipe(file) == TrainConfig()
    for override in ("steps", "steps=[", f"steps={'9' * 5000}", "=3", "steps=" + "[" * 2000, "\ud800=1"):
        with pytest.raises(OrthrusError) as caught:
            load_recipe(file, [override])
        one_sentence(caught.value)


PROMPT, ANSWER = {"prompt_ids": [3, 4], "domain": "x"}, {"prompt": 0, "answer_ids": [5], "finished": True}
JUNK: list[Any] = [
    None, True, -1, 1.0, 10**30, "0", "", [], [[]], {}, [True], [1.5], [-1], [10**30], ["3"], [None], "a\nb",
    "\ud800", "\x1b[0m",
]  # fmt: skip
LINES = [
    b"[3]",
    b"[]",
    b"3",
    b"null",
    b'{"prompt"',
    b"\xff\xfe",
    b"[" * 99_999,
    b'{"prompt": NaN}',
    b"9" * 9999,
]


def corpus(folder: Path, prompt: Any = PROMPT, answer: Any = ANSWER) -> Path:
    folder.mkdir(exist_ok=True)
    for name, record in (("prompts.jsonl", prompt), ("answers-00000.jsonl", answer)):
        (folder / name).write_bytes(record if isinstance(record, bytes) else json.dumps(record).encode())
    return folder


@pytest.mark.parametrize("key", ["prompt_ids", "domain", "prompt", "answer_ids"])
def test_records_of_a_corpus_with_wrong_values(tmp_path: Path, key: str) -> None:
    for value in JUNK:
        spoilt = corpus(tmp_path, PROMPT | {key: value}, ANSWER | {key: value})
        if (key, value) in (("domain", "0"), ("answer_ids", [])) or (key == "prompt" and value is False):
            continue
        with pytest.raises(OrthrusError) as caught:
            packed_corpora([str(spoilt)], 32)
        one_sentence(caught.value)
        assert ".jsonl" in str(caught.value)
    for missing in (corpus(tmp_path, {}), corpus(tmp_path, answer={})):
        with pytest.raises(OrthrusError):
            packed_corpora([str(missing)], 32)


@pytest.mark.parametrize("line", LINES)
def test_lines_of_a_corpus_that_are_no_records(tmp_path: Path, line: bytes) -> None:
    for folder in (corpus(tmp_path, line), corpus(tmp_path, answer=line)):
        with pytest.raises(OrthrusError, match=r"\.jsonl"):
            packed_corpora([str(folder)], 32)
    (tmp_path / "source-00.jsonl").write_bytes(line)
    with pytest.raises(OrthrusError, match="line 1"):
        read_source(tmp_path / "source-00.jsonl")
    with pytest.raises(OrthrusError):
        read_prompts_of(tmp_path / "source-00.jsonl")


def test_a_truncated_shard_a_mark_and_folders_in_the_place_of_files(tmp_path: Path) -> None:
    whole = json.dumps(ANSWER).encode()
    with pytest.raises(OrthrusError, match=r"line 2 .* run synth again"):
        packed_corpora([str(corpus(tmp_path, answer=whole + b"\n" + whole[:-9]))], 32)
    marked = corpus(tmp_path, b"\xef\xbb\xbf" + json.dumps(PROMPT).encode(), whole + b"\r\n\n")
    assert packed_corpora([str(marked)], 32).dialogues == 1
    (tmp_path / "answers-00001.jsonl").mkdir()
    with pytest.raises(OrthrusError, match=r"answers-00001\.jsonl cannot be read"):
        packed_corpora([str(tmp_path)], 32)
    for name in ("prompts.jsonl", "nowhere", "prompts.jsonl/x", "a\0b", "~nobody-here"):
        with pytest.raises(OrthrusError):
            packed_corpora([str(tmp_path / name)], 32)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{}", '{"settings": [], "sources": {}}', '{"settings": {}, "sources": []}',
             '{"settings": {}}', "\xff", "[" * 99_999]
)  # fmt: skip
def test_manifests(tmp_path: Path, text: str) -> None:
    corpus(tmp_path)
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    checks: list[Callable[[], object]] = [
        lambda: manifest.check_corpus_folder(tmp_path),
        lambda: manifest.begin(tmp_path, {}, {}),
        lambda: manifest.note_source(tmp_path, "source-00.jsonl", {}),
        lambda: manifest.forget_sources(tmp_path),
        lambda: manifest.base_fingerprint(tmp_path),
        lambda: packed_corpora([str(tmp_path), str(tmp_path) + "/."], 32),
    ]
    for check in checks:
        with pytest.raises(OrthrusError, match=r"manifest\.json is damaged"):
            check()
    assert manifest.corpus_sources(tmp_path) == []
    assert (tmp_path / "manifest.json").read_text(encoding="latin-1") == text


def test_sources_of_a_manifest_are_read_as_far_as_they_say(tmp_path: Path) -> None:
    sources = [3, None, {"file": "a/b.jsonl"}, {"dataset": "x/y", "domain": "math"}]
    content = {"settings": {"sources": sources}, "sources": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert manifest.corpus_sources(tmp_path) == ["b.jsonl", "x/y (math)"]


def test_files_of_the_user_that_look_like_a_corpus_stay(tmp_path: Path) -> None:
    (tmp_path / "source-00.jsonl").write_text("mine")
    with pytest.raises(OrthrusError, match=r"source-00\.jsonl without"):
        manifest.check_corpus_folder(tmp_path)
    with pytest.raises(OrthrusError, match=r"source-00\.jsonl without"):
        manifest.begin(tmp_path, {"seed": 1}, {})
    (tmp_path / "source-00.jsonl").rename(tmp_path / "source-07.jsonl")
    content = {"settings": {}, "sources": {"source-00.jsonl": {}, "../mine": {}}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "source-00.jsonl").write_text("ours")
    manifest.forget_sources(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "source-07.jsonl"]
