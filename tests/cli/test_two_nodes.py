"""Two nodes of a process each, under torchrun's own rendezvous: one is killed and comes back."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from tests.run_states import state

from orthrus.training.state_folder import state_file

from .training_files import write_recipe

LAUNCH = Path(__file__).parents[2] / "recipes" / "launch" / "torchrun.sh"
STEPS = 60
_PORT = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"


class Node:
    """A machine's part of a run: torchrun and its worker, with a log of what they said."""

    def __init__(self, log: Path, *arguments: str, port: str, run: str) -> None:
        environment = {**os.environ, "NODES": "2", "GPUS": "1", "HEAD": "127.0.0.1", "PORT": port, "RUN": run}
        environment |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        self.log, self.port = log, port
        with log.open("a") as written:
            self.process = subprocess.Popen([LAUNCH, *arguments], stderr=written, env=environment)

    def kill(self) -> None:
        """As a machine dies: all of it at once."""
        if self.process.poll() is None:
            everything = psutil.Process(self.process.pid).children(recursive=True)
            for process in [self.process, *everything]:
                process.kill()
            self.process.wait()

    @property
    def curve(self) -> dict[int, str]:
        """What was said of each step: loss and all that follows from the weights."""
        found = re.findall(
            r"^step (\d+)/\d+: (loss [\d.]+, expected tokens per cycle [\d.]+)",
            self.log.read_text(),
            re.MULTILINE,
        )
        return {int(step): words for step, words in found}


@contextmanager
def nodes(folder: Path, name: str, recipe: str) -> Iterator[list[Node]]:
    """Two of them; the second may be replaced."""
    port = subprocess.run(
        [sys.executable, "-c", _PORT], check=True, capture_output=True, text=True
    ).stdout.strip()
    arguments = (recipe, f"output={folder / name}")
    both = [Node(folder / f"{name}-0.log", *arguments, port=port, run=name)]
    try:
        # Here both are the machine that HEAD names, so the first one must be the first to listen.
        while not psutil.Process(both[0].process.pid).net_connections():
            time.sleep(0.1)
        both.append(Node(folder / f"{name}-1.log", *arguments, port=port, run=name))
        yield both
        for node in both:
            assert node.process.wait(300) == 0, node.log.read_text()[-3000:]
    finally:
        for node in both:
            node.kill()


def curve(both: list[Node]) -> dict[int, str]:
    # Whichever holds the first rank prints.
    return both[0].curve | both[1].curve


@pytest.mark.nodes
@pytest.mark.timeout(900)
def test_a_node_that_was_killed_comes_back_and_the_run_ends_as_if_nothing_had_been(
    tmp_path: Path, corpus: str, model_folder: str
) -> None:
    settings = {"steps": STEPS, "save_every": 5, "log_every": 1, "evaluate_prompts": 0, "trackers": []}
    recipe = write_recipe(tmp_path / "recipe.yaml", base=model_folder, corpus=corpus, **settings)
    with nodes(tmp_path, "whole", recipe) as both:
        pass
    whole = curve(both)
    assert sorted(whole) == list(range(1, STEPS + 1))

    with nodes(tmp_path, "broken", recipe) as both:
        saved = state_file(tmp_path / "broken")
        while not saved.exists():
            assert all(node.process.poll() is None for node in both), both[0].log.read_text()[-3000:]
            time.sleep(0.01)
        both[1].kill()
        begun = state(tmp_path / "broken")["step"]
        assert begun < STEPS
        dead = both[1]
        again = (recipe, f"output={tmp_path / 'broken'}")
        both[1] = Node(dead.log, *again, port=dead.port, run="broken")
    assert "going on after step" in both[0].log.read_text() + both[1].log.read_text()
    assert curve(both) == whole
    one, other = (state(tmp_path / name) for name in ("whole", "broken"))
    assert one["step"] == other["step"] == STEPS
    for name, parameter in one["view"].items():
        assert torch.equal(other["view"][name], parameter), name
    views = [tmp_path / name / "view" / "view.safetensors" for name in ("whole", "broken")]
    assert views[0].read_bytes() == views[1].read_bytes()
