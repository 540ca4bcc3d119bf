"""The view that a run begins with."""

from dataclasses import replace
from pathlib import Path

import torch

from orthrus.base.loading import Base
from orthrus.errors import UserInputError
from orthrus.model.checkpoint import fresh_view, load_view
from orthrus.model.dual_view import DualView
from orthrus.training.corpus import Sample
from orthrus.training.recipe import TrainConfig


def starting_view(base: Base, config: TrainConfig) -> DualView:
    """A fresh view of the recipe's layers and block size, or the one in `init_view`, in full precision.

    The block size is the recipe's in either case: a view may go on with longer blocks than it knows. Raises
    UserInputError when `init_view` has twins in other layers than the recipe asks for, CheckpointError when
    it is missing or belongs to another base.
    """
    if config.init_view is None:
        return fresh_view(base, config.block_size, config.layers)
    # Differences from the AR twins are small: half precision would blur what was learnt.
    dual = load_view(base, Path(config.init_view).expanduser(), dtype=torch.float32)
    if config.layers is not None and dual.config.layers != config.layers:
        found = "all layers" if dual.config.layers is None else f"layers {list(dual.config.layers)}"
        raise UserInputError(
            f"the view in {config.init_view} has twins in {found}, the recipe wants layers "
            f"{list(config.layers)}; leave out one of layers and init_view."
        )
    dual.config = replace(dual.config, block_size=config.block_size, trained=False, provenance={})
    return dual


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
