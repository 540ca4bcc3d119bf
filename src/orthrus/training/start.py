"""Makes or loads the view with which a run starts, and checks its corpora."""

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base
from orthrus.base.quantised import check_gradients
from orthrus.errors import OrthrusWarning, UserInputError
from orthrus.model.checkpoint import load_view, untrained_view
from orthrus.model.dual_view import DualView
from orthrus.model.twin import chosen_names
from orthrus.training.packs import Packs
from orthrus.training.recipe import TrainConfig

DEFAULT_REPAIR_RANK = 128


def starting_view(base: Base, config: TrainConfig) -> DualView:
    """An untrained view of the recipe's kind and block size, or the one in `init_view`, in full precision.

    If the recipe wants a repair head and the view has none, it gets one. The block size is the recipe's, so a view may
    continue with longer blocks. Raises UserInputError if `init_view` has other layers, twins, ranks or another mask
    than the recipe states (a missing key accepts any), and for a quantised base through which no gradient passes.
    Raises CheckpointError if `init_view` is missing or belongs to another base.
    """
    check_gradients(base.model, base.name)
    width = int(base.model.get_input_embeddings().weight.shape[1])  # type: ignore[index]
    most = {"rank": width, "repair_rank": max(width, 1024)}
    for key, rank in (("rank", config.rank), ("repair_rank", config.repair_rank)):
        if rank is not None and rank > most[key]:
            raise UserInputError(f"{key} {rank} is too much for {base.name}; give at most {most[key]}.")
    if config.init_view is None:
        dual = untrained_view(
            base,
            config.block_size,
            config.layers,
            twins=config.twins,
            rank=config.rank,
            rank_scale=config.rank_scale or 1.0,
            mask=config.mask,
            seed=config.seed,
        )
        return _with_repair(dual, config)
    # The fingerprint is taken first, because twins change the names of the weights.
    weights = fingerprint(base.model)
    # float32, because differences from the AR twins are small, and half precision would lose part of them.
    dual = load_view(base, Path(config.init_view).expanduser(), dtype=torch.float32)
    _check_same_kind(dual, config)
    # With `train: repair` the twins come from another run, whose provenance is kept.
    provenance = {"twins": dual.config.provenance} if config.train == "repair" else {}
    # A view that continues with another base, such as a fine-tuned one, belongs to that base.
    dual.config = replace(
        dual.config,
        block_size=config.block_size,
        trained=False,
        # It was measured on the view as it was.
        goes_on=None,
        provenance=provenance,
        base_name=base.reference,
        base_fingerprint=weights,
    )
    return _with_repair(dual, config)


def _with_repair(dual: DualView, config: TrainConfig) -> DualView:
    rank = config.repair_rank or (DEFAULT_REPAIR_RANK if config.train == "repair" else None)
    if dual.repair is None and rank is not None:
        dual.add_repair(rank, config.seed)
    return dual


def _check_same_kind(dual: DualView, config: TrainConfig) -> None:
    """Raises UserInputError for the first setting of `init_view` that differs from the recipe."""
    view = dual.config
    layers = range(dual.base.config.num_hidden_layers) if view.layers is None else view.layers
    has: dict[str, object] = {
        "layers": sorted(layers),
        "twins": chosen_names(dual.family, view.twins),
        "rank": view.rank,
        "rank_scale": view.rank_scale,
        "repair_rank": view.repair_rank,
        "mask": "trained" if view.mask_token_id is None else view.mask_token_id,
    }
    wants: dict[str, object] = {
        "layers": None if config.layers is None else sorted(config.layers),
        "twins": None if config.twins is None else chosen_names(dual.family, config.twins),
        "rank": config.rank,
        "rank_scale": config.rank_scale,
        # A view without a repair head gets one.
        "repair_rank": None if view.repair_rank is None else config.repair_rank,
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
    if key == "repair_rank":
        return f"a repair head of rank {value}"
    if key == "rank" and value is None:
        return "full-rank twins"
    return f"{key} {value}"


def warn_of_other_models(dual: DualView, packs: Packs) -> None:
    """Warn if the corpus's answers are from another model than the base, because nothing else would show it.

    It is no error, because it may be intended, and because the same model has another fingerprint if it is quantised.
    """
    own = dual.config.base_fingerprint
    for corpus, pack in packs.parts.items():
        if pack.about.base is not None and pack.about.base != own:
            warnings.warn(
                f"the answers of the corpus in {corpus} are another model's ({pack.about.base}), or this one's in int8 "
                f"or int4, not those of {dual.config.base_name} ({own}): a view learns to foresee its own base, so "
                "make a corpus with it.",
                OrthrusWarning,
                stacklevel=2,
            )


def check_packs(base: Base, packs: Packs) -> None:
    """Raises UserInputError if a dialogue has unknown token ids, or is longer than the base's context."""
    num_rows = base.model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    for corpus, pack in packs.parts.items():
        largest = pack.about.largest_id
        # Dialogues longer than a sequence are not in the pack.
        longest = min(pack.about.longest, pack.about.sequence_length)
        if largest >= num_rows:
            raise UserInputError(
                f"the corpus in {corpus} has token id {largest}, but {base.name} has {num_rows} tokens; make a "
                "corpus with this base."
            )
        if longest > base.context_length:
            raise UserInputError(
                f"the corpus in {corpus} has a dialogue of {longest} tokens, but {base.name}'s context holds "
                f"{base.context_length}; make a corpus with this base."
            )
