"""The settings of a view, which are stored with its weights."""

import math
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from orthrus.errors import CheckpointError

FORMAT_VERSION = 1
LARGEST_BLOCK, LARGEST_RANK = 2**12, 2**16
"""Limits far above what any machine can hold. A larger number is a mistake."""
Encoding = Literal["full", "delta4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """Settings of a diffusion view.

    block_size: the K of its training, which is the largest that may be requested. mask_token_id: id of a frozen
    embedding row that is the mask, or None for a trained mask embedding. layers: indices of layers with twins, None for
    all. twins: the modules of a layer that have one, None for all of its attention. rank: of low-rank twins, None for
    full ones. rank_scale: the factor on their part (alpha / r of LoRA). repair_rank: of the repair head, None without
    one. base_name, base_fingerprint: the base that it belongs to. trained: False for a view that equals the AR one.
    encoding: how the folder stores the weights, as they are or as 4-bit differences from the AR twins. goes_on: the
    probability that a guess is accepted if those before it were, measured by real decoding; None if not measured.
    provenance: how the view was made (recipe, data, versions, commit; figures and license for the card), as free JSON.
    """

    block_size: int
    mask_token_id: int | None = None
    layers: tuple[int, ...] | None = None
    twins: tuple[str, ...] | None = None
    rank: int | None = None
    rank_scale: float = 1.0
    repair_rank: int | None = None
    base_name: str = ""
    base_fingerprint: str = ""
    trained: bool = False
    encoding: Encoding = "full"
    goes_on: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, (is_right, what) = getattr(self, each.name), _FIELDS[each.name]
            if not is_right(value) and not (value is None and each.default is None):
                raise CheckpointError(f"{each.name} of a view must be {what}, not {reprlib.repr(value)}.")
        if self.twins is not None and not self.twins:
            raise CheckpointError("a view needs at least one twin; leave `twins` out for all.")
        if self.encoding not in get_args(Encoding):
            known = " and ".join(get_args(Encoding))
            raise CheckpointError(
                f"the view is stored as '{self.encoding}', this release reads {known}; upgrade orthrus."
            )

    def num_guesses(self, num_rows: int) -> int:
        """How many rows of a block guess a token that the AR row at its anchor does not decide.

        These are all rows but the first. The last row of a block of full length makes no guess either, because it had
        no target in training.
        """
        return min(num_rows, self.block_size - 1) - 1

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ViewConfig":
        """Read `view_config.json`. Raises CheckpointError for another format, and unknown or missing fields."""
        given = dict(raw)
        version = given.pop("format_version", None)
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"the view has format version {reprlib.repr(version)}, this release reads {FORMAT_VERSION}; "
                "upgrade orthrus."
            )
        try:
            for name in ("layers", "twins"):
                if isinstance(given.get(name), list):
                    given[name] = tuple(given[name])
            return cls(**given)
        except TypeError as e:
            raise CheckpointError(f"view_config.json does not fit this release: {e}.") from e


def is_chance(value: object) -> bool:
    """Whether this is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]


def _is_int(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _are(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, tuple) and all(map(kind, values))


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "block_size": (_is_int(2, LARGEST_BLOCK), f"a number from 2 to {LARGEST_BLOCK}"),
    "mask_token_id": (_is_int(-(2**31), 2**31), "a token id"),
    "layers": (_are(_is_int(-(2**16), 2**16)), "a list of numbers of layers"),
    "twins": (_are(_is(str)), "a list of names of modules"),
    "rank": (_is_int(1, LARGEST_RANK), f"a number from 1 to {LARGEST_RANK}"),
    "rank_scale": (lambda value: type(value) in (int, float) and 0 < value < math.inf, "a positive number"),
    "repair_rank": (_is_int(1, LARGEST_RANK), f"a number from 1 to {LARGEST_RANK}"),
    "base_name": (_is(str), "a text"),
    "base_fingerprint": (_is(str), "a text"),
    "trained": (_is(bool), "true or false"),
    "encoding": (_is(str), "a text"),
    "goes_on": (is_chance, "a number from 0 to 1"),
    "provenance": (_is(dict), "an object"),
}
"""For each field, a test of its value, and a description of allowed values. The base checks ids and layers itself."""
