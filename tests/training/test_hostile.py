"""Recipes, corpora, manifests and saved states that somebody spoilt: one sentence each."""

import datetime
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.tiny import tiny_dual
from tests.training.test_trainer import CONFIG, run

from orthrus.errors import OrthrusError
from orthrus.training import manifest
from orthrus.training.corpus import read_source
from orthrus.training.packs import packed_corpora
from orthrus.training.prompt_sources import read_prompts_of
from orthrus.training.recipe import TrainConfig
from orthrus.training.recipe_file import load_recipe
from orthrus.training.run_folder import STATE_FILE, check_run_folder
from orthrus.training.run_state import load_state

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(folder, "run", replace(CONFIG, steps=2))
    return folder / "run"


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("step", [-1, "3", 1.5, True, None, 10**30]),
        ("scores", [None, {}, [3], [(1,)], [("a", 1.0)], [(1, float("nan"))]]),
        ("view", [None, {}, [], "spoil", "shape", "nan", "list"]),
        ("optimizer", [None, {}, {"state": []}, {"state": {99: {}}}, {"state": {0: {"exp_avg": 3}}}]),
        ("config", [None, [], 3]),
        ("corpus", ["other", None, 3]),
        ("base", ["other", 3]),
    ],
)
def test_saved_states(saved: Path, tmp_path: Path, key: str, values: list[Any]) -> None:
    whole = torch.load(saved / STATE_FILE, weights_only=True)
    dual, config = tiny_dual(block_size=5, mask_token_id=None), replace(CONFIG, steps=2)
    assert load_state(saved, dual, config, whole["corpus"]) is not None
    for value in values:
        spoilt = value
        if key == "view" and isinstance(value, str):
            name, tensor = next(iter(whole["view"].items()))
            wrong = {"spoil": 3, "shape": tensor[:1], "nan": tensor * torch.nan, "list": tensor.tolist()}
            spoilt = whole["view"] | {name: wrong[value]}
        torch.save(whole | {key: spoilt}, tmp_path / STATE_FILE)
        with pytest.raises(OrthrusError) as caught:
            load_state(tmp_path, dual, config, whole["corpus"])
        one_sentence(caught.value)


def test_files_that_are_no_saved_states(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    state = tmp_path / "run" / STATE_FILE
    dual = tiny_dual(block_size=5, mask_token_id=None)
    for content in (b"", b"my notes", b"PK\x03\x04"):
        state.write_bytes(content)
        with pytest.raises(OrthrusError, match=r"cannot be read as the state .* move it away"):
            run(tmp_path, "run", CONFIG, dual=dual)
        assert state.read_bytes() == content
    for mine in (torch.ones(3), {"model": torch.ones(3)}, [1, 2]):
        torch.save(mine, state)
        with pytest.raises(OrthrusError, match="not the state of a run; move it away"):
            run(tmp_path, "run", CONFIG, dual=dual)
    state.unlink()
    (tmp_path / "run" / "run.json").unlink(missing_ok=True)
    state.mkdir()
    with pytest.raises(OrthrusError, match="is no file; move it away"):
        check_run_folder(tmp_path / "run")
    state.rmdir()
    for text in ("mine", "[]", '{"kind": "other", "id": "3"}', '{"kind": "orthrus-train", "id": 3}'):
        (tmp_path / "run" / "run.json").write_text(text)
        with pytest.raises(OrthrusError, match="not written by a training run; move it away"):
            check_run_folder(tmp_path / "run")
