"""The view that a run begins with: of the recipe's kind, or that of `init_view`, or one clear sentence."""

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engines import decode
from tests.folders import save_base
from tests.tiny import disturb_view, tiny_dual
from tests.training.test_trainer import CONFIG, own_answers, run

from orthrus.base.loading import load_base
from orthrus.base.resolve import resolve
from orthrus.config import DecodeConfig
from orthrus.errors import OrthrusWarning, UserInputError
from orthrus.model.checkpoint import save_view, untrained_view
from orthrus.training.recipe import TrainConfig
from orthrus.training.start import check_packs, starting_view, warn_of_other_models

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def base_folder(tmp_path):
    return save_base(tmp_path / "base")


def load(folder):
    return load_base(resolve(str(folder)), device="cpu")


def packs_of(**bases: str | None) -> Any:
    about = {name: SimpleNamespace(about=SimpleNamespace(base=base)) for name, base in bases.items()}
    return SimpleNamespace(parts=about)


def test_answers_of_another_model_are_warned_of(base_folder):
    dual = starting_view(load(base_folder), CONFIG)
    own = dual.config.base_fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_models(dual, packs_of(own=own, unknown=None))
    with pytest.warns(OrthrusWarning, match=r"the corpus in other are another model's \(blake2b:0\)"):
        warn_of_other_models(dual, packs_of(own=own, other="blake2b:0"))


def test_a_dialogue_that_is_not_in_the_pack_is_not_too_long(base_folder):
    base = load(base_folder)

    def packs_with(longest: int, sequence_length: int) -> Any:
        about = SimpleNamespace(longest=longest, sequence_length=sequence_length, largest_id=3)
        return SimpleNamespace(parts={"mine": SimpleNamespace(about=about)})

    check_packs(base, packs_with(10**6, base.context_length))
    with pytest.raises(
        UserInputError, match=f"corpus in mine has a dialogue of {base.context_length + 1} tokens"
    ):
        check_packs(base, packs_with(base.context_length + 1, 10**6))


def test_a_view_that_trains_on_does_not_keep_how_far_its_guesses_went(base_folder, tmp_path):
    dual = untrained_view(load(base_folder), 4)
    dual.config = replace(dual.config, goes_on=0.5)
    save_view(dual, tmp_path / "view")
    assert (
        starting_view(load(base_folder), TrainConfig(init_view=str(tmp_path / "view"))).config.goes_on is None
    )


def test_an_untrained_view_is_of_the_recipes_kind(base_folder):
    recipe = {"twins": ("v_proj", "q_proj"), "rank": 2, "layers": (1,), "mask": "trained", "block_size": 6}
    first, again, other = (
        starting_view(load(base_folder), TrainConfig(**recipe, seed=seed)) for seed in (1, 1, 2)
    )
    config = first.config
    assert (config.twins, config.rank, config.layers) == (("q_proj", "v_proj"), 2, (1,))
    assert (config.mask_token_id, config.block_size) == (None, 6)
    ours = first.view_parameters()
    assert set(ours) == {
        "mask_embedding",
        *(
            f"model.layers.1.self_attn.{m}.diffusion.{part}.weight"
            for m in ("q_proj", "v_proj")
            for part in ("down", "up")
        ),
    }
    assert all(torch.equal(p, again.view_parameters()[n]) for n, p in ours.items())
    assert any(not torch.equal(p, other.view_parameters()[n]) for n, p in ours.items())


def test_a_recipe_that_says_nothing_takes_what_the_view_has(base_folder, tmp_path):
    view = untrained_view(load(base_folder), 6, (1,), twins=("q_proj", "v_proj"), rank=2, mask="trained")
    disturb_view(view, 0.2)
    save_view(view, tmp_path / "view")
    said = {"twins": ("v_proj", "q_proj"), "rank": 2, "layers": (1,), "mask": "trained"}
    for recipe in ({}, said):
        dual = starting_view(load(base_folder), TrainConfig(init_view=str(tmp_path / "view"), **recipe))
        assert dual.config.rank == 2
        for name, parameter in dual.view_parameters().items():
            assert torch.equal(parameter, view.view_parameters()[name])


def test_all_layers_and_all_twins_may_be_named_or_left_out(base_folder, tmp_path):
    save_view(untrained_view(load(base_folder)), tmp_path / "view")
    named = {"twins": ("o_proj", "v_proj", "k_proj", "q_proj"), "layers": (1, 0), "mask": 60}
    starting_view(load(base_folder), TrainConfig(init_view=str(tmp_path / "view"), **named))


@pytest.mark.parametrize(
    ("kind", "recipe", "message"),
    [
        (
            {"layers": (1,)},
            {"layers": (0,)},
            r"has layers \[1\], the recipe wants layers \[0\]; .* layers and",
        ),
        (
            {},
            {"twins": ("q_proj",)},
            "has twins of q_proj, k_proj, v_proj, o_proj, .* wants twins of q_proj;",
        ),
        (
            {},
            {"rank": 4},
            "has full-rank twins, the recipe wants rank 4; leave out one of rank and init_view",
        ),
        ({"rank": 2}, {"rank": 4}, "has rank 2, the recipe wants rank 4"),
        (
            {"rank": 2, "rank_scale": 8.0},
            {"rank_scale": 4.0},
            "rank_scale 8.0, the recipe wants rank_scale 4.0",
        ),
        ({}, {"mask": "trained"}, "has mask 60, the recipe wants mask trained"),
        ({"mask": "trained"}, {"mask": 5}, "has mask trained, the recipe wants mask 5"),
    ],
)
def test_a_recipe_that_wants_another_kind_is_refused(kind, recipe, message, base_folder, tmp_path):
    save_view(untrained_view(load(base_folder), **kind), tmp_path / "view")
    with pytest.raises(UserInputError, match=message) as caught:
        starting_view(load(base_folder), TrainConfig(init_view=str(tmp_path / "view"), **recipe))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [
        {"twins": ("q_proj", "k_proj", "v_proj"), "mask_token_id": None},
        {"rank": 8, "mask_token_id": None},
        {"rank": 4, "rank_scale": 8.0, "twins": SEVEN, "mask_token_id": None},
        {"rank": 8, "mask_token_id": 60, "twins": ("q_proj", "v_proj")},
        {"layers": (1,), "mask_token_id": 60},
    ],
    ids=["no o", "rank 8", "all seven, rank 4, scale 8", "rank 8, q and v, fixed mask", "one layer"],
)
def test_views_of_every_kind_learn_and_stay_lossless(kind, tmp_path):
    dual = tiny_dual(block_size=5, **kind)
    frozen = {n: p.clone() for n, p in dual.base.named_parameters() if ".diffusion." not in n}
    samples = own_answers(dual, 2, 20)
    before = acceptance(dual, samples)
    config = CONFIG.__class__(
        **{f: getattr(CONFIG, f) for f in ("block_size", "dtype", "learning_rate")},
        steps=60, num_anchors=19, batch_size=2, sequence_length=26, weights="uniform",
    )  # fmt: skip
    run(tmp_path, "run", config, dual=dual, samples=samples)
    assert acceptance(dual, samples) >= before + 0.3
    for name, parameter in dual.base.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


def acceptance(dual, samples):
    """Share of accepted drafts in greedy decodes, which must be the base's own answers."""
    accepted = drafted = 0
    for sample in samples:
        config = DecodeConfig(max_new_tokens=20, strategy="chain", floor=False)
        result = decode(dual, list(sample.prompt_ids), config)
        assert result.token_ids == sample.answer_ids
        accepted, drafted = accepted + result.stats.num_accepted, drafted + result.stats.num_drafted
    return accepted / drafted
