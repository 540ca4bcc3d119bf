"""The settings of a view, which are stored with its weights."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from orthrus.errors import CheckpointError

FORMAT_VERSION = 1
Encoding = Literal["full", "delta4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewConfig:
    """Settings of a diffusion view.

    block_size: K that it was trained with (the largest that may be asked for). mask_token_id: id of a frozen
    embedding row used as mask, or None for a trained mask embedding. layers: indices with twins, None for
    all. twins: the modules of a layer that have one, None for all of its attention. rank: of low-rank twins,
    None for full ones. rank_scale: what their part is multiplied by (alpha / r of LoRA). repair_rank: of the
    repair head, None for a view without. base_name, base_fingerprint: the base it belongs to. trained: False
    for a view that equals the AR one. encoding: how the folder stores the weights, as they are or as 4-bit
    differences from the AR twins. goes_on: the chance that a guess stands where those before it did, as real decodes
    had it when the view was kept; None where nobody measured. provenance: how it was made (recipe, data, versions,
    commit; figures and license for the card), free-form JSON.
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
        if self.block_size < 2:
            raise CheckpointError(f"a view needs a block size of at least 2, not {self.block_size}.")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise CheckpointError(f"the rank of a view's twins must be a positive number, not {self.rank!r}.")
        if type(self.rank_scale) not in (int, float) or not 0 < self.rank_scale < math.inf:
            raise CheckpointError(
                f"the scale of a view's low-rank twins must be a positive number, not {self.rank_scale!r}."
            )
        if self.goes_on is not None and not is_chance(self.goes_on):
            raise CheckpointError(
                f"the chance that a view's guesses go on must lie within 0 and 1, not {self.goes_on!r}."
            )
        if self.repair_rank is not None and (type(self.repair_rank) is not int or self.repair_rank < 1):
            raise CheckpointError(
                f"the rank of a repair head must be a positive number, not {self.repair_rank!r}."
            )
        if self.twins is not None and not self.twins:
            raise CheckpointError("a view needs at least one twin; leave `twins` out for all.")
        if self.encoding not in get_args(Encoding):
            known = " and ".join(get_args(Encoding))
            raise CheckpointError(
                f"the view is stored as '{self.encoding}', this release reads {known}; upgrade orthrus."
            )

    def num_guesses(self, num_rows: int) -> int:
        """How many rows of a block guess a token that the AR row at its anchor does not decide.

        All but the first, and but the last one of a block as long as in training, of which nothing was asked.
        """
        return min(num_rows, self.block_size - 1) - 1

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ViewConfig":
        """Read `view_config.json`; CheckpointError on a newer format, unknown or missing fields."""
        fields = dict(raw)
        version = fields.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"the view has format version {version}, this release reads {FORMAT_VERSION}; "
                "upgrade orthrus."
            )
        try:
            for name in ("layers", "twins"):
                if fields.get(name) is not None:
                    fields[name] = tuple(fields[name])
            return cls(**fields)
        except TypeError as e:
            raise CheckpointError(f"view_config.json does not fit this release: {e}.") from e


def is_chance(value: object) -> bool:
    """Whether this is a number from 0 to 1."""
    return type(value) in (int, float) and 0 <= value <= 1  # type: ignore[operator]
