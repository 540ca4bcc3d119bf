"""A sharded run begins without the whole base in memory of any process: its files are mapped until they are cut."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.folders import save_base
from tests.training.test_trainer import CONFIG
from tests.workers import run_together
from torch.distributed.tensor import DTensor

from orthrus.base.loading import load_base
from orthrus.model.checkpoint import untrained_view
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.processes import Processes, loading_device
from orthrus.training.recipe import TrainConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what is mapped")
SHARDED = replace(CONFIG, sharding="fsdp2")


def is_mapped(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether the tensor's memory is that of a file in the folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(place, 16) for place in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(".safetensors") and str(folder) in line
    return False


def test_a_base_in_the_dtype_of_its_files_stays_mapped(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    for dtype, mapped in (("float32", True), ("bfloat16", False)):
        base = load_base(str(folder), dtype=dtype, device="cpu")
        assert {is_mapped(p, folder) for p in base.model.parameters()} == {mapped}


def cut(name: str) -> None:
    folder = Path(name)
    assert loading_device(SHARDED) == "cpu"
    base = load_base(name, dtype="float32", device=loading_device(SHARDED))
    dual = untrained_view(base, CONFIG.block_size)
    frozen = [p for p in base.model.parameters() if not p.requires_grad]
    assert frozen
    assert all(is_mapped(p, folder) for p in frozen)
    Processes(SHARDED).share(
        TrainingPass(dual, Objective(loss="kl", weights="uniform", gamma=1.0, smoothing=0.0))
    )
    shards = [p for p in dual.parameters() if isinstance(p, DTensor)]
    assert len(shards) == len(list(dual.parameters()))
    # No shard lies in the files, and each process holds half of every tensor, up to what does not divide.
    assert not any(is_mapped(shard.to_local(), folder) for shard in shards)
    whole, held = (sum(map(size, shards)) for size in (torch.Tensor.numel, lambda p: p.to_local().numel()))
    assert abs(held / whole - 0.5) < 0.05


def test_no_process_keeps_what_it_does_not_share(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    run_together(cut, 2, tmp_path / "store", str(folder))


@pytest.mark.parametrize(
    ("config", "num_processes", "expected"),
    [(SHARDED, 2, "cpu"), (SHARDED, 1, "cuda:0"), (CONFIG, 2, "cuda:0")],
)
def test_only_sharded_runs_load_on_the_cpu(
    config: TrainConfig, num_processes: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = SimpleNamespace(num_processes=num_processes, device="cuda:0")
    monkeypatch.setattr("orthrus.training.processes.this_process", lambda: process)
    assert loading_device(config) == expected
