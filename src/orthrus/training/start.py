"""The view that a run begins with."""

from dataclasses import replace
from pathlib import Path

import torch

from orthrus.base.loading import Base
from orthrus.base.quantised import check_gradients
from orthrus.errors import UserInputError
from orthrus.model.checkpoint import fresh_view, load_view
from orthrus.model.dual_view import DualView
from orthrus.model.twin import chosen_names
from orthrus.training.corpus import Sample
from orthrus.training.recipe import TrainConfig


def starting_view(base: Base, config: TrainConfig) -> DualView:
    """A fresh view of the recipe's kind and block size, or the one in `init_view`, in full precision.

    The block size is the recipe's in either case: a view may go on with longer blocks than it knows. Raises
    UserInputError when `init_view` has other layers, twins, rank or mask than the recipe asks for (a key that
    is left out takes what it has) and for a quantised base that no gradient passes through, CheckpointError
    when it is missing or belongs to another base.
    """
    check_gradients(base.model, base.name)
    if config.init_view is None:
        return fresh_view(
            base,
            config.block_size,
            config.layers,
            twins=config.twins,
            rank=config.rank,
            mask=config.mask,
            seed=config.seed,
        )
    # Differences from the AR twins are small: half precision would blur what was learnt.
    dual = load_view(base, Path(config.init_view).expanduser(), dtype=torch.float32)
    _check_same_kind(dual, config)
    dual.config = replace(dual.config, block_size=config.block_size, trained=False, provenance={})
    return dual


def _check_same_kind(dual: DualView, config: TrainConfig) -> None:
    """UserInputError for the first setting of the view in `init_view` that is not the recipe's."""
    view = dual.config
    layers = range(dual.base.config.num_hidden_layers) if view.layers is None else view.layers
    has: dict[str, object] = {
        "layers": sorted(layers),
        "twins": chosen_names(dual.family, view.twins),
        "rank": view.rank,
        "mask": "trained" if view.mask_token_id is None else view.mask_token_id,
    }
    wants: dict[str, object] = {
        "layers": None if config.layers is None else sorted(config.layers),
        "twins": None if config.twins is None else chosen_names(dual.family, config.twins),
        "rank": config.rank,
        "mask": None if config.mask == "auto" else config.mask,
    }
    for key, wanted in wants.items():
        if wanted is not None and wanted != has[key]:
            raise UserInputError(
                f"the view in {config.init_view} has {_words(key, has[key])}, the recipe wants "
                f"{_words(key, wanted)}; leave out one of {key} and init_view."
            )


def _words(key: str, value: object) -> str:
    if key == "twins" and isinstance(value, tuple):
        return f"twins of {', '.join(value)}"
    if key == "rank" and value is None:
        return "full-rank twins"
    return f"{key} {value}"


def check_samples(base: Base, samples: list[Sample], corpus: str) -> None:
    """UserInputError when a dialogue of a corpus folder has token ids or a length unknown to this base."""
    num_rows = base.model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    largest = max(max((*s.prompt_ids, *s.answer_ids)) for s in samples)
    if largest >= num_rows:
        raise UserInputError(
            f"the corpus in {corpus} has token id {largest}, but {base.name} has {num_rows} tokens; make a "
            "corpus with this base."
        )
    longest = max(len(s.prompt_ids) + len(s.answer_ids) for s in samples)
    if longest > base.context_length:
        raise UserInputError(
            f"the corpus in {corpus} has a dialogue of {longest} tokens, but {base.name}'s context holds "
            f"{base.context_length}; make a corpus with this base."
        )
