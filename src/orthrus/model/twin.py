"""Twins: one frozen projection and its diffusion copy behind the name that the stock code calls."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from orthrus.base.families import Family, attention_modules
from orthrus.errors import CheckpointError, UserInputError


class RowSplit:
    """Where a pass turns from AR rows to diffusion rows; one per model, shared by its twins.

    None means that every row is AR: the stock behaviour, also for callers who know nothing of us.
    """

    __slots__ = ("num_ar_rows",)

    def __init__(self) -> None:
        self.num_ar_rows: int | None = None

    @contextmanager
    def at(self, num_ar_rows: int) -> Iterator[None]:
        """Rows `[0, num_ar_rows)` are AR and the others diffusion, for the passes inside."""
        before, self.num_ar_rows = self.num_ar_rows, num_ar_rows
        try:
            yield
        finally:
            self.num_ar_rows = before


class Twin(nn.Module):
    """Sends AR rows through `ar`, the untouched base module, and diffusion rows through `diffusion`.

    `row_dim` is the input's dimension, counted from the end, that enumerates rows: -2 for a projection
    (B, T, C), -3 for a per-head norm (B, T, H, D). Source: arXiv 2605.12825, section 3.
    """

    def __init__(self, ar: nn.Module, diffusion: nn.Module, split: RowSplit, row_dim: int = -2) -> None:
        super().__init__()
        self.ar = ar
        self.diffusion = diffusion
        self.split = split
        self.row_dim = row_dim

    def forward(self, x: Tensor) -> Tensor:
        num_rows = x.shape[self.row_dim]
        num_ar = num_rows if self.split.num_ar_rows is None else min(self.split.num_ar_rows, num_rows)
        if num_ar == num_rows:
            return self.ar(x)  # type: ignore[no-any-return]
        if num_ar == 0:
            return self.diffusion(x)  # type: ignore[no-any-return]
        ar_x, diffusion_x = x.split([num_ar, num_rows - num_ar], dim=self.row_dim)
        return torch.cat([self.ar(ar_x), self.diffusion(diffusion_x)], dim=self.row_dim)


def inject(model: nn.Module, family: Family, layers: Iterable[int] | None = None) -> RowSplit:
    """Put twins into the attention of the given layers (all by default); copies start equal to the base.

    The base's own modules stay where they are, frozen, as `twin.ar`. Returns the split they share. Raises
    CheckpointError for a layer that is not there, UserInputError when the model carries a view already.
    """
    if twins(model):
        raise UserInputError("this base carries a view already; load it once more for another view.")
    split = RowSplit()
    attentions = attention_modules(model)  # type: ignore[arg-type]
    layers = range(len(attentions)) if layers is None else tuple(layers)
    for index in layers:
        if not 0 <= index < len(attentions):
            raise CheckpointError(
                f"the view has twins in layer {index}, but this base has {len(attentions)} layers."
            )
    for index in layers:
        attention = attentions[index]
        for name in family.twin_names:
            ar = getattr(attention, name, None)
            if ar is None or isinstance(ar, nn.Identity):
                continue
            ar.requires_grad_(False)
            diffusion = copy.deepcopy(ar).requires_grad_(True)
            setattr(attention, name, Twin(ar, diffusion, split, family.row_dim(name)))
    return split


def twins(model: nn.Module) -> dict[str, Twin]:
    """All twins by their module path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Twin)}


@contextmanager
def stock(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its twins taken out: the very modules it was loaded with, for baselines and audits."""
    injected = twins(model)
    try:
        for path, twin in injected.items():
            _replace(model, path, twin.ar)
        yield model
    finally:
        for path, twin in injected.items():
            _replace(model, path, twin)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
