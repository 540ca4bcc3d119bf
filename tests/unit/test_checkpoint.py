"""View folders: written whole or not at all, read back bit for bit, refused in one sentence when broken."""

import errno
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.engines import decode
from tests.folders import load_disturbed, save_base
from tests.tiny import disturb_view, tiny_prompt

from orthrus.base import hub
from orthrus.base.loading import Base, load_base
from orthrus.base.resolve import resolve
from orthrus.config import DecodeConfig
from orthrus.errors import (
    CheckpointError,
    CorruptFileError,
    OrthrusError,
    OrthrusWarning,
    StorageError,
    UserInputError,
)
from orthrus.model import checkpoint
from orthrus.model.checkpoint import average_view, save_view, untrained_view
from orthrus.model.dual_view import DualView
from orthrus.model.loading import load_dual
from orthrus.model.names import FROM_FILE, TO_FILE, from_file, is_view_tensor, to_file
from orthrus.model.twin import twins
from orthrus.model.view_config import ViewConfig


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def view_folder(base_folder: Path, tmp_path: Path) -> Path:
    _, dual = load_disturbed(base_folder)
    save_view(dual, tmp_path / "view")
    return tmp_path / "view"


def load(base_folder: Path, view_folder: Path) -> tuple[Base, DualView]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_dual(str(base_folder), str(view_folder), device="cpu")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "view_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "phi3", "gemma3", "olmo2"])
def test_saving_and_loading_is_bit_equal(name: str, tmp_path: Path) -> None:
    base_folder = save_base(tmp_path / "base", name)
    _, dual = load_disturbed(base_folder)
    save_view(dual, tmp_path / "view")
    _, again = load(base_folder, tmp_path / "view")
    before, after = dual.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.config == dual.config


def test_a_view_with_a_mask_embedding_and_some_layers_comes_back_whole(
    base_folder: Path, tmp_path: Path
) -> None:
    base, _ = load_dual(str(base_folder), "untrained", device="cpu")
    model = load_dual(str(base_folder), "untrained", device="cpu")[1]
    stock = model.stock()
    pass
    # A base free of twins, for a view of another shape.
    for path, twin in twins(stock).items():
        parent, _, name = path.rpartition(".")
        setattr(stock.get_submodule(parent), name, twin.ar)
    config = ViewConfig(block_size=6, layers=(1,), goes_on=0.5, provenance={"recipe": "x", "steps": [1, 2]})
    dual = DualView(stock, base.family, config)
    with torch.no_grad():
        dual.mask_embedding.add_(1.0)
    save_view(dual, tmp_path / "view")
    _, again = load(base_folder, tmp_path / "view")
    assert again.config == config
    assert torch.equal(again.mask_embedding, dual.mask_embedding)
    assert {path.split(".")[2] for path in twins(again.base)} == {"1"}


def test_the_folder_holds_the_view_only(view_folder: Path) -> None:
    tensors = load_file(view_folder / "view.safetensors")
    assert len(tensors) == 2 * 4
    assert all(is_view_tensor(name) for name in tensors)
    assert "model.layers.0.self_attn.q_proj_diff.weight" in tensors
    assert {f.name for f in view_folder.iterdir()} == {
        "README.md", "config.json", "view.safetensors", "view_config.json",
    }  # fmt: skip


def test_a_view_folder_loads_its_base_by_name(base_folder: Path, view_folder: Path) -> None:
    base, dual = load_dual(str(view_folder), device="cpu")
    assert base.source.path == base_folder
    assert dual.config.base_name == str(base_folder)


def test_loading_and_decoding_leave_the_frozen_base_as_it_was(base_folder: Path, view_folder: Path) -> None:
    before = load_file(base_folder / "model.safetensors")
    _, dual = load(base_folder, view_folder)
    config = DecodeConfig(max_new_tokens=30, strategy="fused_tree")
    result = decode(dual, tiny_prompt(9), config)
    assert result.stats.num_accepted > 0
    stock = dual.stock()
    after = stock.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_existing_folder_is_never_overwritten(base_folder: Path, view_folder: Path) -> None:
    before = {f.name: f.read_bytes() for f in view_folder.iterdir()}
    _, dual = load_disturbed(base_folder, amount=0.9)
    with pytest.raises(UserInputError, match="exists already"):
        save_view(dual, view_folder)
    assert {f.name: f.read_bytes() for f in view_folder.iterdir()} == before


def test_a_full_disk_leaves_nothing_behind(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, file: Path, **_: Any) -> None:
        file.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    _, dual = load_disturbed(base_folder)
    with pytest.raises(StorageError, match="disk ran full"):
        save_view(dual, tmp_path / "view")
    assert {f.name for f in tmp_path.iterdir()} == {"base"}


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "view.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "view.safetensors")


Q_DIFF = "model.layers.0.self_attn.q_proj_diff.weight"
O_DIFF = "model.layers.1.self_attn.o_proj_diff.weight"
BROKEN: dict[str, tuple[Any, type[OrthrusError], str]] = {
    "wrong shape": (
        lambda f: edit_tensors(f, **{Q_DIFF: torch.zeros(3, 3)}),
        CheckpointError,
        rf"{Q_DIFF} has shape \(3, 3\)",
    ),
    "missing tensor": (
        lambda f: edit_tensors(f, **{O_DIFF: None}),
        CheckpointError,
        f"lacks 1 tensors, {O_DIFF}",
    ),
    "unknown tensor": (
        lambda f: edit_tensors(f, **{Q_DIFF.replace("layers.0", "layers.7"): torch.zeros(2)}),
        CheckpointError,
        "has 1 tensors too many, model.layers.7",
    ),
    "no weights": (
        lambda f: (f / "view.safetensors").unlink(),
        CheckpointError,
        "view.safetensors is missing",
    ),
    "no config": (lambda f: (f / "view_config.json").unlink(), CheckpointError, "no view_config.json"),
    "cut weights": (
        lambda f: (f / "view.safetensors").write_bytes((f / "view.safetensors").read_bytes()[:200]),
        CorruptFileError,
        "view.safetensors cannot be read",
    ),
    "not safetensors": (
        lambda f: (f / "view.safetensors").write_bytes(b"x" * 999),
        CorruptFileError,
        "cannot be read",
    ),
    "not JSON": (lambda f: (f / "view_config.json").write_text("{"), CorruptFileError, "not valid JSON"),
    "not UTF-8": (
        lambda f: (f / "view_config.json").write_bytes(b'{"a": "\xff"}'),
        CorruptFileError,
        "not valid JSON",
    ),
    "not an object": (
        lambda f: (f / "view_config.json").write_text("[]"),
        CorruptFileError,
        "not a JSON object",
    ),
    "newer format": (lambda f: change_config(f, format_version=2), CheckpointError, "version 2, .* upgrade"),
    "unknown field": (lambda f: change_config(f, colour="red"), CheckpointError, "colour"),
    "no block size": (lambda f: change_config(f, block_size=...), CheckpointError, "block_size"),
    "deep nesting": (
        lambda f: (f / "view_config.json").write_text("[" * 100_000),
        CorruptFileError,
        "not valid JSON",
    ),
    "format version as text": (
        lambda f: change_config(f, format_version="1"),
        CheckpointError,
        "version '1', this",
    ),
    **{
        f"{name} {value!r}": (
            lambda f, name=name, value=value: change_config(f, **{name: value}),
            CheckpointError,
            f"{name} of a view must be ",
        )
        for name, values in {
            "block_size": [1, "8", 8.0, 2.5, 10**9, 10**30, None, True],
            "repair_rank": [0, 10**9, "4"],
            "mask_token_id": ["60", [1], 2.5, True],
            "layers": ["ab", ["0"], [[0]], {"a": 1}, [0.0, 1], 3, [True]],
            "twins": ["q_proj", [1], {"q_proj": 1}],
            "base_name": [5],
            "trained": ["yes", 1],
            "provenance": ["x", []],
            "goes_on": [2.0, "0.5"],
        }.items()
        for value in values
    },
    "layers beyond": (lambda f: change_config(f, layers=[0, 9]), CheckpointError, "layer 9"),
    "mask beyond": (lambda f: change_config(f, mask_token_id=4096), CheckpointError, "mask token id 4096"),
}


@pytest.mark.parametrize(("spoil", "error", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_view_is_refused_in_one_sentence(
    spoil: Any, error: type[OrthrusError], message: str, base_folder: Path, view_folder: Path
) -> None:
    spoil(view_folder)
    with pytest.raises(error, match=message) as caught:
        load(base_folder, view_folder)
    assert "\n" not in str(caught.value)


def test_a_view_of_another_base_of_the_same_shape_warns_with_both_fingerprints(
    view_folder: Path, tmp_path: Path
) -> None:
    other = save_base(tmp_path / "other", seed=1)
    trained_on = json.loads((view_folder / "view_config.json").read_text())["base_fingerprint"]
    with pytest.warns(OrthrusWarning, match="stays lossless") as caught:
        _, dual = load_dual(str(other), str(view_folder), device="cpu")
    fresh = load_dual(str(other), "untrained", device="cpu")[1].config.base_fingerprint
    message = str(caught[0].message)
    assert trained_on in message
    assert fresh in message
    assert fresh != trained_on
    ar, chain = (
        decode(dual, tiny_prompt(9), DecodeConfig(max_new_tokens=20, strategy=s)).token_ids
        for s in ("ar", "chain")
    )
    assert ar == chain


def test_a_view_of_another_family_is_refused(view_folder: Path, tmp_path: Path) -> None:
    phi = save_base(tmp_path / "phi", "phi3")
    # What is refused is not warned of too.
    warnings.simplefilter("error", OrthrusWarning)
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        load_dual(str(phi), str(view_folder), device="cpu")


def test_a_base_from_the_hub_is_remembered_by_its_id(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the folder of this machine's cache, which means nothing elsewhere."""
    asked: list[str | None] = []

    def fetch(repo_id: str, revision: str | None = None, **_: Any) -> Path:
        asked.append(revision)
        return base_folder

    monkeypatch.setattr(hub, "fetch", fetch)
    base, dual = load_dual("owner/name", "untrained", revision="v1", device="cpu")
    assert (base.name, dual.config.base_name, base.source.kind) == ("owner/name", "owner/name", "hub")
    assert set(asked) == {"v1"}


def test_the_table_of_names_and_its_inverse() -> None:
    assert len(FROM_FILE) == len(TO_FILE)
    for module in ("q_proj", "qkv_proj", "k_norm"):
        ours, file = (
            f"model.layers.3.self_attn.{m}.weight" for m in (f"{module}.diffusion", f"{module}_diff")
        )
        assert to_file(ours) == file
        assert from_file(file) == ours
        assert is_view_tensor(file)
    assert not is_view_tensor("model.layers.3.self_attn.q_proj.weight")
    assert is_view_tensor("mask_embedding")


@pytest.mark.parametrize("chance", [-0.1, 1.5, "0.5", True])
def test_a_chance_that_guesses_go_on_is_a_chance(chance: Any) -> None:
    with pytest.raises(CheckpointError, match="goes_on of a view must be a number from 0 to 1"):
        ViewConfig(block_size=4, goes_on=chance)


def test_a_view_may_be_the_mean_of_several(base_folder: Path, tmp_path: Path) -> None:
    _, first = load(base_folder, "untrained")
    _, second = load(base_folder, "untrained")
    for seed, dual in enumerate((first, second)):
        disturb_view(dual, 0.3, seed)
        dual.config = replace(
            dual.config,
            trained=True,
            goes_on=0.5,
            provenance={"tokens_per_cycle": 2.5, "recipe": {"seed": seed}},
        )
    save_view(second, tmp_path / "second", "delta4")
    packed = load(base_folder, tmp_path / "second")[1].view_parameters()
    expected = {name: (p + packed[name]) / 2 for name, p in first.view_parameters().items()}
    average_view(first, [tmp_path / "second"])
    for name, parameter in first.view_parameters().items():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-7)
    # What was measured of one view is not true of the mean.
    assert first.config.goes_on is None
    assert first.config.provenance == {"recipe": {"seed": 0}, "averaged": [second.config.provenance]}
    save_view(first, tmp_path / "mean")
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "| mean of | 2 trained views |" in card
    assert "## Training of a view in the mean" in card

    low_rank = untrained_view(load_base(resolve(str(base_folder)), device="cpu"), rank=2)
    low_rank.config = replace(low_rank.config, base_fingerprint=first.config.base_fingerprint, trained=True)
    save_view(low_rank, tmp_path / "low-rank")
    with pytest.raises(CheckpointError, match="has rank 2, the other one None: only views of one kind"):
        average_view(first, [tmp_path / "low-rank"])
