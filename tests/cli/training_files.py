"""Prompts, recipes and saved states, as the tests of `synth` and `train` share them."""

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from orthrus.cli import train as train_module

if TYPE_CHECKING:
    from .conftest import Cli, Run

SYNTH = ("-n", "24", "--batch-size", "4", "--shard-size", "5", "--device", "cpu")


def write_prompts(file: Path, number: int = 12) -> str:
    records = [
        {"prompt": f"question {i} of {i * 7}", "domain": ("math", "chat")[i % 2]} for i in range(number)
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(file)


def write_recipe(file: Path, **changes: Any) -> str:
    settings = {
        "block_size": 4,
        "num_anchors": 8,
        "sequence_length": 96,
        "batch_size": 2,
        "steps": 6,
        "learning_rate": 1e-3,
        "dtype": "float32",
        "save_every": 2,
        "evaluate_every": 3,
        "evaluate_prompts": 2,
        "log_every": 2,
    } | changes
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    return str(file)


def stopped_after(cli: "Cli", *arguments: str) -> "Run":
    """A run that Ctrl-C ends after its first logged step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module._Run, "_log", lambda self, entry: signal.raise_signal(signal.SIGINT))
        return cli("train", *arguments)
