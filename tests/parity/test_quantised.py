"""Quantised bases: every strategy writes what the quantised model's own generate writes, with any view."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.folders import load_disturbed, save_base
from tests.quantised_folders import KINDS, save_quantised
from tests.tiny import disturb_view, tiny_prompt
from tests.training.test_forward import LAYOUT, _sequences, assert_training_equals_decoding
from tests.ways import WAYS
from torch import nn

from orthrus import Orthrus
from orthrus.audit import AuditOptions, run_audit
from orthrus.base import load_base
from orthrus.base.fingerprint import fingerprint
from orthrus.base.quantised import check_gradients, plain_linear, plain_weight
from orthrus.config import DecodeConfig
from orthrus.errors import CheckpointError, CorruptFileError, OrthrusWarning, UnsupportedModelError
from orthrus.model.checkpoint import save_view, untrained_view
from orthrus.model.merged import save_merged
from orthrus.model.twin import twins
from orthrus.training.blocks import draw_blocks
from orthrus.training.forward import Objective, TrainingPass

pytest.importorskip("torchao")

PROMPT = tiny_prompt(15, seed=5)
NUM_NEW = 24
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two views of it, and its quantised siblings."""
    root = tmp_path_factory.mktemp("quantised")
    base = save_base(root / "base")
    _, dual = load_disturbed(base, 0.1)
    made = {"base": base, "full": root / "full", "delta4": root / "delta4"}
    save_view(dual, made["full"])
    save_view(dual, made["delta4"], "delta4")
    return made | {kind: save_quantised(base, root / kind.replace(" ", "-"), kind) for kind in KINDS}


def load(folder: Path, view: str | Path = "untrained", **options: Any) -> Orthrus:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OrthrusWarning)
        return Orthrus.load(str(folder), str(view), device="cpu", **options)


def assert_same_text(orthrus: Orthrus, kind: str) -> None:
    """Greedy, token for token, and drafts are accepted: a broken drafter gives right text too.

    Rounded activations leave near-ties, which fall one way on one processor and another way on another.
    """
    model = orthrus.stock()
    assert not twins(model)
    model.generation_config.eos_token_id = None
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0)
    expected = out[0, len(PROMPT) :].tolist()
    assert len(set(expected)) >= 3
    for strategy, floor in WAYS:
        config = DecodeConfig(max_new_tokens=NUM_NEW, strategy=strategy, floor=floor, ignore_eos=True)
        result = orthrus.stream_ids(PROMPT, config).drain()
        found = list(result.token_ids)
        if found != expected and kind.endswith("activations"):
            assert_near_tie(orthrus, expected, found)
        else:
            assert found == expected, strategy
        assert (result.stats.num_accepted > 0) == (strategy != "ar")


@torch.inference_mode()
def assert_near_tie(orthrus: Orthrus, expected: list[int], found: list[int]) -> None:
    """The first tokens that differ have all but equal scores."""
    place = next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)
    model = orthrus.stock()
    scores_V = model(torch.tensor([PROMPT + expected[:place]])).logits[0, -1].float()
    gap = scores_V.max() - scores_V[[expected[place], found[place]]].min()
    assert gap < 0.05 * scores_V.std(), (place, gap, scores_V.std())


@EVERY_KIND
@pytest.mark.parametrize("view", ["untrained", "full", "delta4"])
def test_every_strategy_writes_the_quantised_models_own_text(
    folders: dict[str, Path], kind: str, view: str
) -> None:
    orthrus = load(folders[kind], folders.get(view, view))
    assert orthrus.describe()["quantised"] == KINDS[kind]
    assert_same_text(orthrus, kind)


@EVERY_KIND
def test_low_rank_twins_leave_the_quantised_projection_in_place(folders: dict[str, Path], kind: str) -> None:
    base = load_base(str(folders[kind]), device="cpu")
    dual = untrained_view(base, rank=4)
    disturb_view(dual, 0.1)
    assert_same_text(Orthrus(base, dual), kind)


@EVERY_KIND
def test_a_view_of_the_unquantised_base_comes_with_its_own_weights(
    folders: dict[str, Path], kind: str
) -> None:
    trained = load(folders["base"], folders["full"]).dual
    with pytest.warns(OrthrusWarning, match=f"quantised as {KINDS[kind]}") as caught:
        orthrus = Orthrus.load(str(folders[kind]), str(folders["full"]), device="cpu")
    assert trained.config.base_fingerprint in str(caught[0].message)
    assert orthrus.describe()["base_fingerprint"] == trained.config.base_fingerprint
    ours, theirs = orthrus.dual.view_parameters(), trained.view_parameters()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for twin in twins(orthrus.dual.base).values():
        assert type(twin.diffusion) is nn.Linear
        assert type(twin.diffusion.weight) is nn.Parameter
        assert type(twin.ar.weight) is not nn.Parameter
    # 4-bit differences land on the sibling's own weights: as far off as those are, and a rounding.
    near = load(folders[kind], folders["delta4"]).dual
    exact = load(folders["base"], folders["delta4"]).dual
    for (path, twin), other in zip(twins(near.base).items(), twins(exact.base).values(), strict=True):
        shift = plain_weight(twin.ar, torch.float32) - other.ar.weight
        found = twin.diffusion.weight - other.diffusion.weight
        assert torch.allclose(found, shift, atol=1e-6), path


@EVERY_KIND
def test_an_untrained_twin_starts_from_the_weights_that_the_base_stands_for(
    folders: dict[str, Path], kind: str
) -> None:
    dual = load(folders[kind]).dual
    x_NC = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    tolerance = 0.02 if "activations" in kind else 1e-5
    for twin in twins(dual.base).values():
        ar, diffusion = twin.ar(x_NC), twin.diffusion(x_NC)
        assert (ar - diffusion).norm() < tolerance * ar.norm()


def test_fingerprints_tell_quantised_weights_apart_and_stay(folders: dict[str, Path]) -> None:
    names = {
        name: fingerprint(load_base(str(folders[name]), device="cpu").model) for name in ("base", *KINDS)
    }
    assert names["int8 weights"] == fingerprint(load_base(str(folders["int8 weights"]), device="cpu").model)
    # Rounding activations changes what the weights do, not what they are.
    assert names["int8 weights"] == names["int8 weights and activations"]
    assert len(set(names.values())) == 3


def test_half_precision_around_quantised_weights(folders: dict[str, Path]) -> None:
    dual = load(folders["int8 weights"], folders["full"], dtype="bfloat16").dual
    assert {p.dtype for p in dual.view_parameters().values()} == {torch.bfloat16}


def test_a_dtype_that_the_method_cannot_work_in_is_one_sentence(folders: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"\(torchao IntxWeightOnly int4\).* choose") as caught:
        load(folders["int4 weights"], dtype="bfloat16")
    assert "\n" not in str(caught.value)


def test_quantised_weights_go_where_they_are_asked_to(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They refuse to be moved afterwards. No accelerator is needed to see what transformers is told."""
    asked: list[Any] = []

    def from_pretrained(*_: Any, **options: Any) -> None:
        asked.append(options.get("device_map"))
        raise RuntimeError("enough")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained)
    monkeypatch.setattr("orthrus.base.loading.pick_device", lambda _: "cuda:1")
    with pytest.raises(UnsupportedModelError, match=r"torchao .*\(enough\)"):
        load_base(str(folders["int8 weights"]), device="cuda:1")
    with pytest.raises(CorruptFileError):
        load_base(str(folders["base"]), device="cuda:1")
    assert asked == [{"": "cuda:1"}, None]


def test_the_audit_says_what_lossless_is_equal_to(folders: dict[str, Path]) -> None:
    prompts = [SimpleNamespace(prompt="abc")]
    for name in ("base", "int8 weights"):
        report = run_audit(load(folders[name]), AuditOptions(prompts=prompts, max_new_tokens=8))
        assert report.passed
        says = "equal to this quantised base (torchao Int8WeightOnly)" in report.summary
        assert says == (name != "base") == ("quantised" in report.to_dict()["model"])


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("kind", ["int8 weights", "int4 weights"])
def test_training_over_quantised_weights(folders: dict[str, Path], kind: str, rank: int | None) -> None:
    """The pass is the decoding pass; the gradient is that of the same model with plain matrices."""
    base = load_base(str(folders[kind]), device="cpu")
    check_gradients(base.model, base.name)
    dual = untrained_view(base, 5, rank=rank)
    disturb_view(dual, 0.1)
    assert_training_equals_decoding(dual)
    gradients = []
    for _ in range(2):
        dual.zero_grad()
        TrainingPass(dual, Objective())(draw_blocks(_sequences(), [0, 1], 6, LAYOUT)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in dual.view_parameters().items()})
        for path, module in list(dual.base.named_modules()):
            if type(module) is nn.Linear and type(module.weight) is not nn.Parameter:
                parent, _, name = path.rpartition(".")
                plain = plain_linear(module, torch.float32).requires_grad_(False)
                setattr(dual.base.get_submodule(parent), name, plain)
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0
        assert (gradient - gradients[1][name]).norm() < 1e-3 * gradient.norm()


def test_merged_folders_hold_ordinary_weights_only(folders: dict[str, Path], tmp_path: Path) -> None:
    orthrus = load(folders["int8 weights"])
    with pytest.raises(CheckpointError, match=r"quantised \(torchao Int8WeightOnly\).* save the view alone"):
        save_merged(orthrus.dual, orthrus.base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    save_view(orthrus.dual, tmp_path / "view")
    assert json.loads((tmp_path / "view" / "view_config.json").read_text())["base_name"] == str(
        folders["int8 weights"]
    )


def test_damaged_quantised_weights_are_no_matter_of_the_machine(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders["int8 weights"].iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            content = content[: len(content) // 2]
        (tmp_path / file.name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"cannot be read.*fetch it again"):
        load(tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    from tests import tiny
    from transformers import BitsAndBytesConfig, LlamaConfig

    # Its groups of 64 weights need a wider model.
    wide = LlamaConfig(**{**tiny.COMMON, "hidden_size": 64, "intermediate_size": 128})
    monkeypatch.setitem(tiny.FAMILY_CONFIGS, "wide", wide)
    base = save_base(tmp_path / "base", "wide")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    orthrus = load(save_quantised(base, tmp_path / "bnb", config=config))
    disturb_view(orthrus.dual, 0.02)
    assert orthrus.describe()["quantised"].startswith(f"bitsandbytes {bits}-bit")
    assert_same_text(orthrus, f"bitsandbytes {bits}")
