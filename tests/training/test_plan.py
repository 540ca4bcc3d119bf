"""Plans against what is counted and measured: parameters exactly, the rest within the tolerances named here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tiny import FAMILY_CONFIGS, VARIANTS, tiny_dual, variant_of
from tests.training.measured_step import LiveBytes, measure, step, training, work_of
from transformers import LlamaConfig

from orthrus.errors import UserInputError
from orthrus.training import losses, plan
from orthrus.training.plan import (
    Memory,
    activation_bytes,
    gathered_bytes,
    hours,
    layer_bytes,
    logits_bytes,
    memory,
    pass_flops,
)
from orthrus.training.plan_run import Machine, plan_run, what_to_change
from orthrus.training.plan_shape import plan_shape, shape_of
from orthrus.training.recipe import TrainConfig

# Shares that measurements may differ by; of the peak, how far it may stay below the plan.
SAVED, PEAK, FLOPS, LOGITS = 0.01, 0.2, 0.02, 0.02
GB = 10**9
CONFIG_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
PAPER = TrainConfig(
    block_size=32,
    num_anchors=256,
    sequence_length=2048,
    batch_size=128,
    epochs=2,
    weights="uniform",
)
LLAMA_8B = plan_shape(CONFIG_8B, PAPER)
H100 = Machine(num_gpus=8, bytes_each=80 * GB, peak=989e12, utilisation=0.4)


def recipe_of(settings: dict[str, Any]) -> TrainConfig:
    settings = dict(settings)
    mask = "trained" if settings.pop("mask_token_id", 0) is None else 60
    return TrainConfig(mask=mask, **settings)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_parameters_are_those_of_the_real_model(name: str, variant: str) -> None:
    settings = variant_of(name, variant)
    if not settings.get("twins", ("any",)):
        pytest.skip("this family has none of these modules")
    dual = tiny_dual(name, **settings)
    planned = plan_shape(FAMILY_CONFIGS[name], recipe_of(settings))
    of_view = {id(p) for p in dual.view_parameters().values()}
    assert planned.parameters == sum(p.numel() for p in dual.base.parameters() if id(p) not in of_view)
    assert planned.view_parameters == dual.num_view_parameters() == planned.trained_parameters
    assert planned == shape_of(dual)


def test_a_repair_head_learns_alone() -> None:
    recipe = TrainConfig(train="repair", init_view="elsewhere", repair_rank=5)
    dual = tiny_dual("qwen3", repair_rank=5)
    shape = shape_of(dual, trains_twins=False)
    assert (
        shape.trained_parameters == sum(p.numel() for p in dual.repair.parameters()) < shape.view_parameters
    )  # type: ignore[union-attr]
    assert not shape.learning_layers
    with pytest.raises(UserInputError, match="elsewhere"):
        plan_shape(FAMILY_CONFIGS["qwen3"], recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_saved_bytes_and_operations_of_every_family(name: str, dtype: torch.dtype) -> None:
    assert_planned(name, dtype)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "all"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_saved_bytes_and_operations_of_every_kind_of_view(name: str, variant: str) -> None:
    assert_planned(name, torch.bfloat16, **variant_of(name, variant))


@pytest.mark.parametrize("trains_twins", [True, False])
def test_saved_bytes_and_operations_with_a_repair_head(trains_twins: bool) -> None:
    assert_planned("llama", torch.bfloat16, trains_twins=trains_twins, repair_rank=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(FAMILY_CONFIGS))
def test_saved_bytes_and_operations_of_layers_that_run_again(name: str, dtype: torch.dtype) -> None:
    assert_planned(name, dtype, activations="layer")


def assert_planned(name: str, dtype: torch.dtype, **settings: Any) -> None:
    found = measure(name, dtype, **settings)
    shape, work = found.shape, found.work
    rows = work.micro_batch_size * work.sequence_length
    # What is not saved but lives on beside it: the AR pass's hidden states, its keys where nothing reads them, masks.
    beside = work.dtype_bytes * rows * shape.hidden
    beside += (1 + shape.windowed) * work.dtype_bytes * work.block_rows * work.sequence_length
    unread = shape.num_layers - len(shape.learning_layers)
    beside += unread * rows * (shape.keys + shape.values) * work.dtype_bytes
    if work.recomputed:
        # Of these, autograd holds the functions that will make or read them.
        learning = shape.learning_layers
        beside += work.block_rows * max(layer_bytes(shape, work, layer) for layer in learning)
        beside += len(learning) * rows * (shape.keys + shape.values) * work.dtype_bytes
        beside += work.block_rows * 2 * shape.rope_tables * shape.head_dim * work.dtype_bytes
    # Autograd's, but gone with its chunk: a part of the logits.
    beside -= shape.capped_logits * work.target_rows * shape.vocab * work.dtype_bytes
    assert found.saved == pytest.approx(activation_bytes(shape, work) - beside, rel=SAVED)
    # torch has no formula for its attention on a CPU, nor for experts.
    uncounted = 0 if name == "gemma2" else shape.num_layers * rows * 4 * work.sequence_length * shape.queries
    if shape.experts is not None:
        weights = shape.experts[1] * 3 * shape.mlp * shape.hidden
        uncounted += 2 * weights * (shape.num_layers * (rows + work.block_rows))
        uncounted += 2 * weights * len(shape.learning_layers) * work.block_rows * (1 + work.recomputed)
    assert found.flops == pytest.approx(pass_flops(shape, work) - uncounted, rel=FLOPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_of_a_step(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a step makes, but for the weights: activations, logits, gradients, the backward pass."""
    monkeypatch.setattr(losses, "_CPU_SLICE", 128)
    monkeypatch.setattr(plan, "CHUNK", 128)
    passed, batch = training("llama", dtype)
    with LiveBytes() as live:
        step(passed, batch, dtype)
    planned = memory(shape_of(passed.dual), work_of(batch, dtype))
    copies = planned.view_weights - 4 * shape_of(passed.dual).view_parameters
    backward = planned.workspace - GB - 0.05 * (planned.total - planned.workspace)
    expected = planned.gradients + planned.activations + planned.logits + copies + backward
    assert (1 - PEAK) * expected < live.peak <= expected


def test_the_optimizer_holds_what_is_planned() -> None:
    passed, batch = training("llama", torch.float32)
    step(passed, batch, torch.float32)
    parameters = [p for p in passed.dual.view_parameters().values() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    planned = memory(shape_of(passed.dual), work_of(batch, torch.float32))
    held = sum(
        value.nbytes for entry in optimizer.state.values() for key, value in entry.items() if key != "step"
    )
    assert planned.optimizer == held
    assert planned.gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    assert planned.view_weights == sum(p.nbytes for p in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_chunk_of_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a chunk is compared whole."""
    monkeypatch.setattr(losses, "_CPU_SLICE", 128)
    monkeypatch.setattr(plan, "CHUNK", 128)
    vocab, rows = 4000, 300
    head = torch.nn.Linear(8, vocab, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(rows, 8, dtype=dtype, requires_grad=True)
    which = torch.arange(rows)
    with LiveBytes() as live:
        losses.row_losses(
            "kl", hidden, torch.randn(rows, 8, dtype=dtype), which, which, head
        ).loss_R.sum().backward()
    shape = replace(plan_shape(FAMILY_CONFIGS["llama"], TrainConfig(mask=60)), vocab=vocab)
    _, batch = training("llama", dtype)
    planned = logits_bytes(shape, work_of(batch, dtype))
    assert live.peak == pytest.approx(planned, rel=LOGITS)


def test_shards_cut_weights_and_optimizer_and_are_whole_at_times() -> None:
    shape = LLAMA_8B
    assert shape.parameters == 8_030_261_248
    assert shape.view_parameters == 1_342_177_280
    work = plan_run(LLAMA_8B, PAPER, H100, None).work
    alone, ddp, cut = (
        memory(shape, work),
        memory(shape, work, processes=8),
        memory(shape, work, processes=8, sharded=True),
    )
    assert ddp.base_weights == alone.base_weights == 2 * shape.parameters
    assert ddp.gradients == 2 * alone.gradients == 8 * shape.trained_parameters
    assert cut.optimizer == shape.trained_parameters
    assert cut.base_weights < alone.base_weights / 3
    assert cut.activations == ddp.activations
    assert gathered_bytes(shape, work, processes=8) > 2 * shape.parameters + 4 * shape.view_parameters
    assert isinstance(cut, Memory)


def test_flex_reads_half_a_sequence_and_saves_no_scores() -> None:
    flex = plan_run(LLAMA_8B, PAPER, H100, None).work
    dense = plan_run(LLAMA_8B, replace(PAPER, attention="dense"), H100, None).work
    assert (flex.attention, flex.read_rows) == ("flex", 1024)
    assert (dense.attention, dense.read_rows) == ("dense", 2048)
    assert layer_bytes(LLAMA_8B, dense, 1) - layer_bytes(LLAMA_8B, flex, 1) > 100_000


def test_what_a_step_and_a_run_do() -> None:
    plan = plan_run(LLAMA_8B, PAPER, H100, 500_000)
    assert plan.tokens == 128 * 2048
    assert plan.targets == 128 * 256 * 31
    assert plan.num_steps == round(2 * 500_000 / 128)
    assert plan.total_flops == plan.num_steps * plan.step_flops
    # A sequence: 2048 AR rows through 7 G weights, 8192 block rows through them there and back, and targets through
    # the head.
    assert 250e12 < plan.step_flops / 128 < 400e12
    assert plan.hours == pytest.approx(hours(plan.total_flops, peak=989e12, utilisation=0.4, processes=8))
    # A ragged share is waited for.
    ragged = plan_run(LLAMA_8B, replace(PAPER, batch_size=9, steps=10), H100, None)
    assert ragged.hours == pytest.approx(
        hours(10 * 16 * plan.step_flops / 128, peak=989e12, utilisation=0.4, processes=8)
    )
    assert plan_run(LLAMA_8B, PAPER, H100, None).hours is None


def test_targets_without_weight_are_not_planned() -> None:
    without = replace(PAPER, num_clean=2, first_target=1)
    assert plan_run(LLAMA_8B, without, H100, None).work.targets == 30
    assert plan_run(LLAMA_8B, replace(without, clean_share=0.5), H100, None).work.targets == 31


def test_what_to_change_first_and_no_more() -> None:
    def fits(limit: float) -> Any:
        machine = replace(H100, bytes_each=limit * GB)
        low = plan_shape(CONFIG_8B, replace(PAPER, rank=64))
        return lambda recipe: (
            plan_run(low if recipe.rank else LLAMA_8B, recipe, machine, None).peak_bytes <= limit * GB
        )

    wide = replace(PAPER, micro_batch_size=2, batch_size=128)
    needed = plan_run(LLAMA_8B, PAPER, H100, None).peak_bytes / GB
    assert what_to_change(wide, 8, fits(needed + 1)) == {"micro_batch_size": 1}
    changes = what_to_change(PAPER, 8, fits(needed - 10))
    assert changes == {"activations": "layer"}
    assert what_to_change(PAPER, 8, fits(45)) == {"activations": "layer", "sharding": "fsdp2"}
    many = replace(PAPER, num_anchors=4096, activations="layer", sharding="fsdp2")
    assert set(what_to_change(many, 8, fits(45))) == {"num_anchors"}
    assert what_to_change(PAPER, 8, fits(10)) == {}


def test_machines_that_cannot_be() -> None:
    for changes in ({"num_gpus": 0}, {"bytes_each": 0.0}, {"peak": -1.0}, {"utilisation": 1.5}):
        with pytest.raises(UserInputError, match="--"):
            replace(H100, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserInputError, match="batch_size 4 is less"):
        plan_run(LLAMA_8B, replace(PAPER, batch_size=4), H100, None)
