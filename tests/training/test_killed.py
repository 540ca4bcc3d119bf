"""SIGKILL at any moment: the same command goes on and ends with the bits of an unbroken run."""

import os
import random
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.run_states import state
from tests.tiny import tiny_dual, tiny_prompt
from tests.training.test_trainer import CONFIG, run
from tests.workers import CONTEXT, start

from orthrus.base.owned import LOCK, MARK
from orthrus.training.processes import this_process
from orthrus.training.run_folder import BEST, RUN_FILE, run_folder
from orthrus.training.state_folder import STATE, STATE_FILE, state_file
from orthrus.training.trainer import Hooks
from orthrus.training.view_score import Scorer

# Every score of this run is better than the one before, so the best view is replaced twice.
CASE = replace(CONFIG, learning_rate=2e-2, steps=12, save_every=3, evaluate_every=4, log_every=1)
BASE: Any = SimpleNamespace(eos_token_ids=frozenset(), context_length=256)


def train_until(moment: str, folder: str, name: str, reached: Connection | None = None) -> None:
    """The run as the command line makes it; dies where `moment` says, tells its steps to `reached`."""
    kill_at(moment)
    output = Path(folder) / name
    with run_folder(output) as held:
        scorer = Scorer(
            BASE,
            [tiny_prompt(6, seed) for seed in range(2)],
            held,
            {"recipe": {"evaluate_prompts": 2}},
            this_process(),
        )
        if state_file(output).is_file():
            scorer.remember()
        tell = (lambda log: None) if reached is None else (lambda log: reached.send(log.step))
        hooks = Hooks(on_log=tell, evaluate=scorer)
        dual = tiny_dual(block_size=5, mask_token_id=None)
        run(Path(folder), name, CASE, hooks, dual, held=held)


def kill_at(moment: str) -> None:
    """Half-way through the shard of the second state; before or after it takes its place; during the second score; or
    between the renames that put the second best view in the place of the first."""

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def late(*_: Any) -> None:
        # A score of a real model takes minutes, so the save beside it has ended.
        time.sleep(2)
        die()

    def second(function: Any, killer: Any, fits: Any) -> Any:
        calls = 0

        def wrapped(*args: Any) -> Any:
            nonlocal calls
            calls += bool(fits(*args))
            return killer(*args) if calls == 2 and fits(*args) else function(*args)

        return wrapped

    sync, place, rename = os.fsync, Path.replace, Path.rename

    def half(handle: int) -> None:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        die()

    def is_state(path: Path, target: Path) -> bool:
        return target.name == STATE_FILE

    def takes_best(path: Path, target: Path) -> bool:
        return target.name == BEST and not target.parent.name.startswith(".")

    if moment == "writing":
        os.fsync = second(sync, half, lambda *_: True)
    elif moment == "before placing":
        Path.replace = second(place, die, is_state)
    elif moment == "after placing":
        Path.replace = second(place, lambda *args: die(place(*args)), is_state)
    elif moment == "between renames":
        Path.rename = second(rename, late, takes_best)
    elif moment == "scoring":
        Scorer.__call__ = second(Scorer.__call__, late, lambda *_: True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the unbroken run, made the way the others end: in a process of its own."""
    made = tmp_path_factory.mktemp("killed")
    finish(made, "whole")
    return made


def finish(folder: Path, name: str) -> None:
    process = start(train_until, "", str(folder), name)
    process.join(120)
    assert process.exitcode == 0


def kill_at_random(folder: Path, name: str, chance: random.Random) -> int:
    """Kill a run some milliseconds after a step drawn by lot; returns the step it had reported last."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = start(train_until, "", str(folder), name, sender)
    sender.close()
    last, until = 0, chance.randint(1, CASE.steps - 2)
    while last < until:
        last = receiver.recv()
    time.sleep(chance.random() * 0.1)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return last


def assert_ends_as_the_unbroken_run(folder: Path, name: str) -> None:
    finish(folder, name)
    whole, ours = (state(folder / run) for run in ("whole", name))
    assert ours["step"] == whole["step"] == CASE.steps
    assert ours["scores"] == whole["scores"]
    scores = [score for _, score in whole["scores"]]
    assert len(scores) == 3
    assert scores == sorted(scores)
    torch.testing.assert_close(ours["view"], whole["view"], atol=0, rtol=0)
    torch.testing.assert_close(ours["optimizer"], whole["optimizer"], atol=0, rtol=0)
    assert ours["goes_on"] == whole["goes_on"] is not None
    best = [(folder / run / BEST / "view.safetensors").read_bytes() for run in ("whole", name)]
    assert best[0] == best[1]
    assert sorted(p.name for p in (folder / name).iterdir()) == [LOCK, BEST, RUN_FILE, STATE]
    assert sorted(p.name for p in (folder / name / STATE).iterdir()) == [MARK, STATE_FILE, "step-00000012"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_twice_at_random_moments(folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    name = f"random-{seed}"
    kill_at_random(folder, name, chance)
    kill_at_random(folder, name, chance)
    assert_ends_as_the_unbroken_run(folder, name)


@pytest.mark.parametrize(
    "moment", ["writing", "before placing", "after placing", "scoring", "between renames"]
)
def test_killed_while_saving(folder: Path, moment: str) -> None:
    process = start(train_until, moment, str(folder), moment)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    # A step that is scored is saved first.
    expected = {"writing": 3, "before placing": 3, "after placing": 4, "scoring": 8, "between renames": 8}
    assert state(folder / moment)["step"] == expected[moment]
    assert_ends_as_the_unbroken_run(folder, moment)
