"""Saved states that somebody spoilt, lost or mixed up: one sentence each, and nothing is touched."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.run_states import state_bytes
from tests.tiny import tiny_dual
from tests.training.test_hostile import one_sentence
from tests.training.test_trainer import CONFIG, run

from orthrus.base.storage import sha256_file
from orthrus.errors import CorruptFileError, OrthrusError, UserInputError
from orthrus.training.moving_mean import MovingMean
from orthrus.training.processes import Processes
from orthrus.training.run_folder import check_run_folder, run_folder
from orthrus.training.run_state import RunState, find_state, load_state, trained_parameters
from orthrus.training.state_folder import STATE, STATE_FILE, state_file

SETTINGS = replace(CONFIG, steps=2, ema_decay=0.5)
SHARD = "step-00000002/shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(folder, "run", SETTINGS)
    return folder / "run"


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """The state of that run for a test to spoil."""
    shutil.copytree(saved / STATE, tmp_path / STATE)
    return tmp_path


def loaded(folder: Path, corpus: Any = None) -> RunState | None:
    dual = tiny_dual(block_size=5, mask_token_id=None)
    digest = corpus or json.loads(state_file(folder).read_bytes())["corpus"]
    found = find_state(folder, dual, SETTINGS, digest)
    if found is None:
        return None
    trained = trained_parameters(dual)
    optimizer, mean = torch.optim.AdamW(trained.values(), fused=True), MovingMean(trained, SETTINGS.ema_decay)
    with closing(Processes(SETTINGS)) as processes:
        return load_state(found, dual, optimizer, mean, processes)


def change(run: Path, facts: dict[str, Any]) -> None:
    content = json.loads(state_file(run).read_bytes())
    state_file(run).write_text(json.dumps(content | facts))


def change_shard(folder: Path, spoil: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> None:
    """Another shard in the place of the one there, with its name, size and digest in the list."""
    file = folder / STATE / SHARD
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        where = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
    spoil(tensors, where)
    save_file(tensors, file, {"DCP_SHARDING_INFO": json.dumps(where)})
    about = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    change(folder, {"files": {file.name: about}})


def test_a_state_as_it_was_written_is_loaded(copied: Path) -> None:
    assert loaded(copied) == RunState(2, [])
    change_shard(copied, lambda tensors, where: None)
    assert loaded(copied) == RunState(2, [])
    shutil.rmtree(copied / STATE)
    assert loaded(copied, "any") is None


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("kind", ["orthrus-train", None, 3]),
        ("step", [-1, "3", 1.5, True, None, 10**30]),
        ("scores", [None, {}, [3], [(1,)], [("a", 1.0)], [(1, float("nan"))]]),
        ("updates", [None, [], {"elsewhere": 2}, {"mask_embedding": 0.5}, {"mask_embedding": -1}, {}]),
        ("folder", [None, 3, "", ".", "../state", "/tmp", "step-2", "step-00000003", "step-00000002/"]),
        ("files", [None, [], {}, {"../x": {}}, {"shard-00001-model-00001-of-00001.safetensors": 3}]),
        ("config", [None, [], 3]),
        ("corpus", ["other", None, 3]),
        ("base", ["other", 3]),
    ],
)
def test_what_the_json_says(copied: Path, key: str, values: list[Any]) -> None:
    whole = state_file(copied).read_bytes()
    corpus = json.loads(whole)["corpus"]
    for value in values:
        change(copied, {key: value})
        with pytest.raises(UserInputError if key in ("corpus", "base") else CorruptFileError) as caught:
            loaded(copied, corpus)
        one_sentence(caught.value)
        state_file(copied).write_bytes(whole)
    assert loaded(copied) is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be read as the state .* move .* away"),
        (b"my notes", r"cannot be read as the state"),
        (b"\xff\x00", r"cannot be read as the state"),
        (b"[" * 100_000, r"cannot be read as the state"),
        (b"[1, 2]", r"not the state of a run; move .* away"),
        (b'{"kind": "orthrus-state"}', r"not the state of a run"),
    ],
)
def test_json_that_is_none_of_ours(copied: Path, content: bytes, message: str) -> None:
    state_file(copied).write_bytes(content)
    before = state_bytes(copied)
    with pytest.raises(CorruptFileError, match=message) as caught:
        loaded(copied, "any")
    one_sentence(caught.value)
    assert state_bytes(copied) == before


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def doubled(file: Path) -> None:
    shutil.copy(file, file.with_name("shard-00002-model-00001-of-00001.safetensors"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, r"is missing"),
        (truncated, r"bytes in place of"),
        (changed, r"was changed after it was written"),
        (doubled, r"shard-00002-model-00001-of-00001.safetensors is none of its shards"),
    ],
)
def test_shards_that_are_not_as_they_were_listed(
    copied: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(copied / STATE / SHARD)
    before = state_bytes(copied)
    with pytest.raises(
        CorruptFileError, match=rf"{message}.*; move that folder away to start again"
    ) as caught:
        loaded(copied)
    one_sentence(caught.value)
    assert state_bytes(copied) == before


VIEW = "view.mask_embedding"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda tensors, where: tensors[VIEW][0].fill_(torch.nan),
            f"{VIEW} is not a tensor of finite numbers",
        ),
        (lambda tensors, where: tensors.update({VIEW: tensors[VIEW][:1]}), f"{VIEW} is not a tensor"),
        (lambda tensors, where: tensors.update({VIEW: tensors[VIEW].int()}), f"{VIEW} is not a tensor"),
        (lambda tensors, where: where[VIEW].update(saved_offsets=[3]), f"{VIEW} is not a tensor"),
        (lambda tensors, where: where[VIEW].update(saved_offsets="far"), "its shards cannot be read"),
        (lambda tensors, where: where.clear(), "its shards cannot be read"),
        (lambda tensors, where: tensors.pop(VIEW), "the tensors of another view"),
        (lambda tensors, where: tensors.pop("exp_avg.mask_embedding"), "the tensors of another view"),
    ],
)
def test_shards_of_another_content(copied: Path, spoil: Any, message: str) -> None:
    change_shard(copied, spoil)
    with pytest.raises(CorruptFileError, match=message) as caught:
        loaded(copied)
    one_sentence(caught.value)


def test_a_shard_that_is_no_safetensors_file(copied: Path) -> None:
    file = copied / STATE / SHARD
    file.write_bytes(b"PK\x03\x04 pickled")
    change(copied, {"files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}}})
    with pytest.raises(CorruptFileError, match="its shards cannot be read: SafetensorError"):
        loaded(copied)


@pytest.mark.parametrize(
    "mine", ["state/notes.txt", "state/mine/x", f"state/{STATE_FILE}/x", "state/step-00000002/notes.txt"]
)
def test_files_of_the_user_beside_a_state(tmp_path: Path, saved: Path, mine: str) -> None:
    shutil.copytree(saved, tmp_path / "run")
    file = tmp_path / "run" / mine
    if mine.endswith("/x"):
        state_file(tmp_path / "run").unlink()
        file.parent.mkdir()
    file.write_text("precious")
    with pytest.raises(UserInputError, match=r"state holds .*, which this run did not write; move it away"):
        check_run_folder(tmp_path / "run")
    assert file.read_text() == "precious"


def test_states_of_others(tmp_path: Path, saved: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "run.json").unlink()
    with pytest.raises(UserInputError, match="state was not written by this run; move it away"):
        check_run_folder(folder)
    shutil.rmtree(folder / STATE)
    (folder / "state.pt").write_bytes(b"an older version's")
    with pytest.raises(
        UserInputError, match=r"state\.pt is the state of a run of an older version.* move it away"
    ):
        check_run_folder(folder)
    (folder / "state.pt").unlink()
    (folder / STATE).symlink_to(saved / STATE)
    with pytest.raises(UserInputError, match="in the way of a folder of that name"):
        check_run_folder(folder)
    (folder / STATE).unlink()
    for text in ("mine", "[]", '{"kind": "other", "id": "3"}', '{"kind": "orthrus-train", "id": 3}'):
        (folder / "run.json").write_text(text)
        with pytest.raises(OrthrusError, match="not written by a training run; move it away"):
            check_run_folder(folder)


def test_what_a_killed_save_left_is_cleared_and_nothing_else(tmp_path: Path, saved: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    whole = state_bytes(folder)
    left = folder / STATE / "step-00000004"
    left.mkdir()
    shutil.copy(folder / STATE / SHARD, left)
    (folder / STATE / f".{STATE_FILE}.orthrus-scratch-x").write_text("{")
    with run_folder(folder):
        assert state_bytes(folder) == whole
        assert not left.exists()
    # What names the shards cannot be read: they may be the last ones, so they stay.
    state_file(folder).write_text("damaged")
    with run_folder(folder):
        assert (folder / STATE / SHARD).is_file()
