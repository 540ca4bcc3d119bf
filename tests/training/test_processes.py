"""Two processes end as one does, whether each holds everything or its shards; and so do their files."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from tests.run_states import state
from tests.tiny import tiny_dual, tiny_prompt
from tests.training.test_trainer import CONFIG, run
from tests.workers import run_together
from torch.distributed.tensor import DTensor

from orthrus.errors import DivergedError, UserInputError
from orthrus.model.dual_view import DualView
from orthrus.model.twin import twins
from orthrus.training.processes import this_process
from orthrus.training.recipe import TrainConfig
from orthrus.training.run_folder import BEST, LAST, RunFolder, run_folder
from orthrus.training.trainer import Hooks
from orthrus.training.view_score import Scorer, decoded, keep_view

# Three sequences for two processes: the second one has nothing left to do in the last pass.
CASE = replace(CONFIG, batch_size=3, steps=6, evaluate_every=4, log_every=1, ema_decay=0.5)
HALF = replace(CASE, dtype="bfloat16", steps=2)
HEAD = replace(CASE, train="repair", init_view="elsewhere", steps=4)
BASE: Any = SimpleNamespace(eos_token_ids=frozenset(), context_length=256)
PROMPTS = [tiny_prompt(5, seed) for seed in range(3)]


def train_and_score(
    folder: str, name: str, config: TrainConfig, *, stop_after: int | None = None, alone: bool = False
) -> None:
    """A run with real decodes, in this process or its share of a group's; leaves state, logs and views."""
    dual = tiny_dual(block_size=5, mask_token_id=None)
    if config == replace(HALF, sharding=config.sharding):
        # Without a mask embedding nothing that enters the first layer has a gradient.
        dual = tiny_dual("llama-tied", block_size=5)
        dual.base.bfloat16()
    if config.train == "repair":
        dual.add_repair(4)
    process = this_process()
    assert process.num_processes == (1 if alone else 2)
    with run_folder(Path(folder) / name, is_main=process.is_main_process) as held:
        _train_and_score(held, name, config, dual, process, stop_after, alone)


def _train_and_score(
    held: RunFolder,
    name: str,
    config: TrainConfig,
    dual: DualView,
    process: PartialState,
    stop_after: int | None,
    alone: bool,
) -> None:
    scorer = Scorer(BASE, PROMPTS, held, {"recipe": {"evaluate_prompts": 2}}, process)
    logs: list[tuple[float, float]] = []
    used: set[torch.dtype] = set()
    for twin in twins(dual.base).values():
        twin.diffusion.register_forward_pre_hook(lambda module, _: used.add(module.weight.dtype))

    def stop() -> bool:
        dtype = getattr(torch, config.dtype)
        assert all(p.dtype == dtype for p in dual.base.parameters() if not p.requires_grad)
        assert all(isinstance(p, DTensor) for p in dual.parameters()) == (
            config.sharding == "fsdp2" and not alone
        )
        return process.is_main_process and len(logs) == stop_after

    hooks = Hooks(
        on_log=lambda log: logs.append((log.loss, log.grad_norm)), evaluate=scorer, should_stop=stop
    )
    _, state = run(held.path.parent, name, config, hooks, dual, held=held)
    if config.sharding == "fsdp2" and not alone and not state.scores:
        assert used == {getattr(torch, config.dtype)}
    # The view is whole again, for everybody.
    assert not any(isinstance(p, DTensor) for p in dual.parameters())
    if state.scores and state.scores[-1][0] == state.step:
        told: list[tuple[int, int]] = []
        found = decoded(dual, BASE, PROMPTS, lambda *told_now: told.append(told_now))
        assert [now for now, _ in told] == sorted(now for now, _ in told)
        assert 0 < told[0][0] < told[-1][0] <= {most for _, most in told}.pop()
        assert found.num_tokens / found.num_cycles == state.scores[-1][1]
        assert dual.config.goes_on == found.num_accepted / found.num_judged
    if process.is_main_process:
        keep_view(dual, held, LAST, {})
        torch.save(logs, held.path / "logs.pt")


def diverge(folder: str) -> None:
    """The gradients of some shards only are not numbers: everybody must notice."""
    dual = tiny_dual(block_size=5, mask_token_id=None)
    with torch.no_grad():
        dual.mask_embedding[0] = torch.inf
    with pytest.raises(DivergedError):
        run(Path(folder), "diverged", replace(CASE, sharding="fsdp2"), dual=dual)


def leave_while_scoring(folder: str, name: str, config: TrainConfig) -> None:
    """A run that ends, on all processes, over the real decode of step 4."""

    def fail(dual: DualView, step: int) -> float:
        raise UserInputError("interrupted")

    dual = tiny_dual(block_size=5, mask_token_id=None)
    with pytest.raises(UserInputError):
        run(Path(folder), name, config, Hooks(evaluate=fail), dual)


def in_two(folder: str) -> None:
    for sharding in ("ddp", "fsdp2"):
        train_and_score(folder, f"two-{sharding}", replace(CASE, sharding=sharding))
    train_and_score(folder, "begun-two", replace(CASE, sharding="fsdp2"), stop_after=3)
    train_and_score(folder, "begun-one", replace(CASE, sharding="fsdp2"))
    leave_while_scoring(folder, "left-scoring", replace(CASE, sharding="fsdp2"))
    train_and_score(folder, "left-scoring", replace(CASE, sharding="fsdp2"))
    diverge(folder)
    train_and_score(folder, "head-two", replace(HEAD, sharding="fsdp2"))
    train_and_score(folder, "half-two", replace(HALF, sharding="fsdp2"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train_and_score(str(folder), "one", replace(CASE, sharding="fsdp2"), alone=True)
    train_and_score(str(folder), "begun-one", CASE, stop_after=3, alone=True)
    run_together(in_two, 2, folder / "store", str(folder))
    train_and_score(str(folder), "begun-two", CASE, alone=True)
    train_and_score(str(folder), "half-one", HALF, alone=True)
    train_and_score(str(folder), "head-one", HEAD, alone=True)
    return folder


@pytest.mark.parametrize("name", ["two-ddp", "two-fsdp2", "begun-one", "begun-two", "left-scoring"])
def test_the_saved_state_is_that_of_one_process(runs: Path, name: str) -> None:
    one, other = state(runs / "one"), state(runs / name)
    assert other["step"] == 6
    assert other["scores"] == one["scores"]
    assert [step for step, _ in one["scores"]] == [4, 6]
    # Adam divides by the root of tiny averages; what is left of rounding is a ten-thousandth of a step.
    torch.testing.assert_close(other["view"], one["view"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other["optimizer"], one["optimizer"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other["mean"], one["mean"], atol=1e-6, rtol=1e-6)
    assert other["mean"].keys() == other["view"].keys()
    for view in (BEST, LAST):
        assert (runs / name / view / "view.safetensors").is_file()


def test_a_repair_head_alone_trains_in_shards_too(runs: Path) -> None:
    one, two = (state(runs / name) for name in ("head-one", "head-two"))
    assert one["view"]["repair.out.weight"].any()
    assert len(one["optimizer"]) == len(one["mean"]) == 4
    torch.testing.assert_close(two["view"], one["view"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(two["optimizer"], one["optimizer"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["two-ddp", "two-fsdp2"])
def test_losses_and_gradient_norms_are_those_of_one_process(runs: Path, name: str) -> None:
    one, other = (torch.load(runs / run / "logs.pt") for run in ("one", name))
    assert len(one) == 6
    torch.testing.assert_close(torch.tensor(other), torch.tensor(one), atol=1e-5, rtol=1e-5)


def test_a_base_in_half_precision_stays_so_in_shards(runs: Path) -> None:
    one, two = (torch.load(runs / f"half-{run}" / "logs.pt") for run in ("one", "two"))
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=1e-2, rtol=1e-2)
    saved = state(runs / "half-two")
    assert {t.dtype for t in saved["view"].values()} == {torch.float32}
    # What passes gather is rounded; what is kept is not.
    kept = load_file(runs / "half-two" / LAST / "view.safetensors")
    mean = {name.replace(".diffusion", "_diff"): t for name, t in saved["mean"].items()}
    torch.testing.assert_close(kept, mean, atol=0, rtol=0)
