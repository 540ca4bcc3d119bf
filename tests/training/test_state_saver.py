"""Saving beside the training: what is written, by whom, and what becomes of a save that fails."""

import os
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from tests.run_states import state, state_bytes
from tests.tiny import tiny_dual
from tests.training.test_trainer import CONFIG
from tests.workers import run_together
from torch.distributed.tensor import DTensor

from orthrus.errors import CorruptFileError, OrthrusWarning, StorageError
from orthrus.model.dual_view import DualView
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.moving_mean import MovingMean
from orthrus.training.processes import Processes
from orthrus.training.run_folder import run_folder
from orthrus.training.run_state import RunState, find_state, load_state, trained_parameters
from orthrus.training.state_folder import STATE, drop_state, hold_state_folder, shards_folder, state_file
from orthrus.training.state_saver import StateSaver

SHARDED = replace(CONFIG, sharding="fsdp2", ema_decay=0.5)
FIRST, SECOND = (f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2))


class Trained:
    """A view that this process shares with the others, and an optimizer that has made a step."""

    def __init__(self, processes: Processes, *, steps: int = 1) -> None:
        self.processes = processes
        self.dual: DualView = tiny_dual(block_size=5, mask_token_id=None)
        # Three processes find less than a row each in a part of it.
        self.dual.add_repair(4)
        processes.share(TrainingPass(self.dual, Objective(), "dense", "none"))
        self.optimizer = torch.optim.AdamW(trained_parameters(self.dual).values(), lr=0.1, fused=True)
        self.mean = MovingMean(trained_parameters(self.dual), 0.5)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        for parameter in trained_parameters(self.dual).values():
            parameter.grad = parameter.detach() * 0.3
        self.optimizer.step()

    def saver(self, run: Path) -> StateSaver:
        return StateSaver(run, self.dual, self.optimizer, self.mean, SHARDED, "corpus", self.processes)

    def load(self, run: Path) -> RunState:
        saved = find_state(run, self.dual, SHARDED, "corpus")
        assert saved is not None
        return load_state(saved, self.dual, self.optimizer, self.mean, self.processes)


@contextmanager
def trained(**settings: Any) -> Iterator[Trained]:
    with closing(Processes(SHARDED)) as processes:
        yield Trained(processes, **settings)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    with run_folder(tmp_path / "run") as held:
        yield held.path


def save(case: Trained, run: Path, step: int) -> None:
    with case.saver(run) as saver:
        saver.save(RunState(step, [(step, 1.5)]))


def test_training_goes_on_while_a_state_is_written_and_the_next_save_says_that_it_failed(run: Path) -> None:
    with trained() as case:
        save(case, run, 1)
        before = state_bytes(run)
        # The writer waits until somebody reads, and then fails: nobody can go back in a pipe.
        shards_folder(run, 2).mkdir()
        pipe = shards_folder(run, 2) / FIRST
        os.mkfifo(pipe)
        saver = case.saver(run)
        saver.save(RunState(2))
        case.step()
        pipe.read_bytes()
        with pytest.raises(StorageError, match=r"was not saved \(OSError.*; the one saved before it is kept"):
            saver.save(RunState(3))
        assert state_bytes(run) == before
        values = {name: p.detach().clone() for name, p in case.dual.view_parameters().items()}
        with saver:
            saver.save(RunState(4))
            # What is written is what was there when the save began.
            case.step()
        whole = state(run)
        assert whole["step"] == 4
        for name, value in values.items():
            assert torch.equal(whole["view"][name], value), name
            assert not torch.equal(case.dual.view_parameters()[name], value) or not value.any()
        assert [p.name for p in (run / STATE).glob("step-*")] == ["step-00000004"]


def test_a_full_disk_keeps_the_state_before(run: Path) -> None:
    with trained() as case:
        save(case, run, 1)
        before = state_bytes(run)
        shards_folder(run, 2).mkdir()
        (shards_folder(run, 2) / FIRST).symlink_to("/dev/full")
        with pytest.raises(StorageError, match=r"the disk ran full while writing .*state; free some space"):
            save(case, run, 2)
        assert state_bytes(run) == before
        assert not shards_folder(run, 2).exists()
        shards_folder(run, 3).write_text("in the way")
        with pytest.raises(StorageError, match=r"cannot be written \(File exists\)"):
            save(case, run, 3)
        assert state(run)["step"] == 1


def save_and_fail(case: Trained, run: Path, step: int) -> None:
    with case.saver(run) as saver:
        saver.save(RunState(step))
        raise ZeroDivisionError


def test_an_error_waits_for_the_save_and_says_when_that_failed_too(run: Path) -> None:
    with trained() as case:
        with pytest.raises(ZeroDivisionError):
            save_and_fail(case, run, 1)
        assert state(run)["step"] == 1
        shards_folder(run, 2).mkdir()
        (shards_folder(run, 2) / FIRST).symlink_to("/dev/full")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", OrthrusWarning)
            with pytest.raises(ZeroDivisionError):
                save_and_fail(case, run, 2)
        assert "the disk ran full" in str(said[0].message)
        assert state(run)["step"] == 1


def assert_same(run: Path, other: Path) -> None:
    one, two = state(run), state(other)
    for key in ("step", "scores", "updates"):
        assert one[key] == two[key]
    torch.testing.assert_close(two["view"], one["view"], atol=0, rtol=0)
    torch.testing.assert_close(two["optimizer"], one["optimizer"], atol=0, rtol=0)


def hold(case: Trained, run: Path) -> None:
    if case.processes.is_main:
        hold_state_folder(run, "ours")
    case.processes.first_problem(None)


def save_in_two(folder: str) -> None:
    root = Path(folder)
    with trained() as case:
        hold(case, root / "two")
        save(case, root / "two", 7)
        shards = shards_folder(root / "two", 7)
        assert sorted(p.name for p in shards.iterdir()) == [FIRST, SECOND]
        parameters = case.dual.view_parameters().items()
        local = {n: p.detach().to_local() for n, p in parameters if isinstance(p, DTensor)}
        assert len(local) == len(parameters)
        mine = load_tensors((shards / (FIRST, SECOND)[case.processes.index]).read_bytes())
        for name, part in local.items():
            assert torch.equal(mine[f"view.{name}"], part), name

        # One of the two cannot write: both are told, and the state before is kept.
        before = state_bytes(root / "two")
        if not case.processes.is_main:
            shards_folder(root / "two", 8).mkdir(exist_ok=True)
            (shards_folder(root / "two", 8) / SECOND).symlink_to("/dev/full")
        with pytest.raises(StorageError, match="the disk ran full"):
            save(case, root / "two", 8)
        case.processes.first_problem(None)
        assert state_bytes(root / "two") == before

        # One of the two holds a weight that is no number: both refuse the state.
        if not case.processes.is_main:
            with torch.no_grad():
                local["mask_embedding"][0] = torch.nan
        hold(case, root / "nan")
        save(case, root / "nan", 7)
        with pytest.raises(CorruptFileError, match=r"view\.mask_embedding is not a tensor of finite numbers"):
            case.load(root / "nan")


def save_again(folder: str, name: str) -> None:
    """Load what two processes saved, and save it as these do."""
    root = Path(folder)
    with trained(steps=0) as case:
        hold(case, root / name)
        found = case.load(root / "two")
        with case.saver(root / name) as saver:
            saver.save(found)


def refuse_damaged(folder: str) -> None:
    with trained(steps=0) as case:
        with pytest.raises(CorruptFileError, match=f"{SECOND} was changed after it was written"):
            case.load(Path(folder) / "two")
        assert not case.optimizer.state


def test_what_some_processes_saved_others_load_to_the_bit(tmp_path: Path) -> None:
    for name in ("two", "three", "one", "nan"):
        (tmp_path / name).mkdir()
    run_together(save_in_two, 2, tmp_path / "store-2", str(tmp_path))
    run_together(save_again, 3, tmp_path / "store-3", str(tmp_path), "three")
    save_again(str(tmp_path), "one")
    assert_same(tmp_path / "two", tmp_path / "three")
    assert_same(tmp_path / "two", tmp_path / "one")
    # The oracle of the oracle: a run alone makes the same weights.
    with trained() as case:
        for name, parameter in case.dual.view_parameters().items():
            assert torch.equal(state(tmp_path / "two")["view"][name], parameter), name
    # Each process checks some of the shards; one that finds a damage tells all.
    shard = shards_folder(tmp_path / "two", 7) / SECOND
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    run_together(refuse_damaged, 2, tmp_path / "store-damaged", str(tmp_path))
    assert state_file(tmp_path / "two").is_file()


def test_a_state_that_is_over_goes_without_what_is_not_the_runs(run: Path) -> None:
    with trained() as case:
        save(case, run, 1)
        (run / STATE / "notes.txt").write_text("mine")
        drop_state(run)
        assert [file.name for file in (run / STATE).iterdir()] == ["notes.txt"]
        (run / STATE / "notes.txt").unlink()
        drop_state(run)
        assert not (run / STATE).exists()
