"""Twins: a frozen projection and its diffusion side, behind the name that the stock code calls."""

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orthrus.base.families import Family, decoder_layers
from orthrus.base.quantised import is_quantised, plain_linear
from orthrus.errors import CheckpointError, UserInputError
from orthrus.model.shadow import shadow


class RowSplit(threading.local):
    """The number of AR rows of a pass, after which the diffusion rows start. All twins of a model share one object.

    The stock code calls a projection only with its input, so the number is stored here while its thread runs the pass.
    None means that every row is AR. This is the stock behaviour, which other threads and other callers get.
    """

    num_ar_rows: int | None = None

    def __deepcopy__(self, _: dict[int, Any]) -> "RowSplit":
        return RowSplit()

    @contextmanager
    def at(self, num_ar_rows: int) -> Iterator[None]:
        """A context in which rows `[0, num_ar_rows)` of passes are AR rows, and all others diffusion rows."""
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
        num_ar, num_diffusion = self._num_rows(x)
        if num_diffusion == 0:
            return self.ar(x)  # type: ignore[no-any-return]
        if num_ar == 0:
            return self.diffusion(x)  # type: ignore[no-any-return]
        ar_x, diffusion_x = x.split([num_ar, num_diffusion], dim=self.row_dim)
        return torch.cat([self.ar(ar_x), self.diffusion(diffusion_x)], dim=self.row_dim)

    def _num_rows(self, x: Tensor) -> tuple[int, int]:
        """(AR rows, diffusion rows) of an input."""
        num_rows = x.shape[self.row_dim]
        num_ar = num_rows if self.split.num_ar_rows is None else self.split.num_ar_rows
        return num_ar, num_rows - num_ar


class LowRank(nn.Module):
    """`scale * up(down(x))`. down starts with small random values, and up with zeros, so the result starts at zero."""

    def __init__(
        self,
        ar: nn.Module,
        rank: int,
        generator: torch.Generator,
        dtype: torch.dtype,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        # Sizes come from the layer's fields, because the weight of a quantised layer has another shape.
        num_inputs, num_outputs = int(ar.in_features), int(ar.out_features)  # type: ignore[arg-type]
        if rank > num_inputs:
            raise CheckpointError(
                f"rank {rank} is more than the {num_inputs} inputs of a projection; lower it, or leave it "
                "out for full-rank twins."
            )
        device = next((t.device for t in (*ar.parameters(), *ar.buffers())), None)
        self.down = nn.Linear(num_inputs, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, num_outputs, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            # Drawn on the CPU, so that the values do not depend on the device.
            self.down.weight.copy_(torch.randn(rank, num_inputs, generator=generator) * num_inputs**-0.5)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        return self.up(low if self.scale == 1.0 else low * self.scale)  # type: ignore[no-any-return]


class LowRankTwin(Twin):
    """A twin whose diffusion side is the AR projection plus a low-rank part: `ar(x) + scale * up(down(x))`.

    The AR projection runs once for all rows, and the low-rank part is added to the diffusion rows only. Only this part
    belongs to the view, so the base's own projection may be quantised. Source: arXiv 2106.09685.
    """

    def forward(self, x: Tensor) -> Tensor:
        num_ar, num_diffusion = self._num_rows(x)
        out: Tensor = self.ar(x)
        if num_diffusion == 0:
            return out
        if num_ar == 0:
            return out + self.diffusion(x)  # type: ignore[no-any-return]
        ar_out, diffusion_out = out.split([num_ar, num_diffusion], dim=self.row_dim)
        added = self.diffusion(x.narrow(self.row_dim, num_ar, num_diffusion))
        return torch.cat([ar_out, diffusion_out + added], dim=self.row_dim)


def inject(
    model: nn.Module,
    family: Family,
    layers: Iterable[int] | None = None,
    *,
    names: Iterable[str] | None = None,
    rank: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> RowSplit:
    """Put twins into the given layers (all by default). They start equal to the base.

    names: which of the family's modules get twins, by default all of its attention. rank: of low-rank twins; None for
    full copies. seed: for the random side of low-rank twins. scale: the factor on their low-rank part. Norms are copied
    in either case. The copy of a quantised projection is an ordinary one in the model's dtype, because only that can be
    trained. The base stays frozen and unchanged, with its twinned modules as `twin.ar`. Returns the split that the
    twins share. Raises CheckpointError for an unknown layer or name, UserInputError if the model has a view already.
    """
    if twins(model):
        raise UserInputError("this base carries a view already; load it once more for another view.")
    split = RowSplit()
    every = list(decoder_layers(model))  # type: ignore[arg-type]
    layers = range(len(every)) if layers is None else tuple(layers)
    for index in layers:
        if not 0 <= index < len(every):
            raise CheckpointError(
                f"the view has twins in layer {index}, but this base has {len(every)} layers."
            )
    wanted = chosen_names(family, names)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    made: list[tuple[nn.Module, str, Twin]] = []
    for index in layers:
        for name in wanted:
            module = family.module_of(every[index], name)
            ar = getattr(module, name, None)
            if ar is None or isinstance(ar, nn.Identity):
                continue
            if rank is None or family.is_norm(name):
                plain = plain_linear(ar, model.dtype) if is_quantised(ar) else copy.deepcopy(ar)  # type: ignore[arg-type]
                twin = Twin(ar, plain.requires_grad_(True), split, family.row_dim(name))
            else:
                part = LowRank(ar, rank, generator, model.dtype, scale)  # type: ignore[arg-type]
                twin = LowRankTwin(ar, part, split, family.row_dim(name))
            made.append((module, name, twin))
    for module, name, twin in made:
        setattr(module, name, twin)
    return split


def chosen_names(family: Family, names: Iterable[str] | None) -> tuple[str, ...]:
    """The modules that get twins, in the family's order. Raises CheckpointError for an unknown name."""
    names = family.twin_names if names is None else tuple(names)
    if unknown := [name for name in names if name not in family.known_twins]:
        raise CheckpointError(
            f"{family.name} has no {unknown[0]} that could get a twin; choose among "
            f"{', '.join(family.known_twins)}."
        )
    return tuple(name for name in family.known_twins if name in names)


def twins(model: nn.Module) -> dict[str, Twin]:
    """All twins by their module path, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Twin)}


def stock(model: PreTrainedModel) -> PreTrainedModel:
    """The model without twins, made of the modules with which it was loaded, for baselines and audits.

    The given model keeps its twins, and may be used at the same time.
    """

    def base_side(path: str, module: nn.Module) -> nn.Module | None:
        return module.ar if isinstance(module, Twin) else None

    return shadow(model, base_side)  # type: ignore[return-value]
