"""A training run as one typed record: each field is a YAML key and a `key=value` of the command line."""

import json
import math
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from orthrus.errors import UserInputError
from orthrus.training.losses import LOSSES, WEIGHTS, LossKind, WeightKind

TRACKERS = ("tensorboard", "trackio", "wandb")
AttentionKind = Literal["auto", "dense", "flex"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of `orthrus train`.

    base, corpus, output: the model, the corpus folders, and where the run keeps its state and its view.
    Blocks: block_size (K), num_anchors (blocks a row), row_length (tokens), drop_long; num_clean,
    first_target, clean_share and reveal as in `BlockLayout`.
    Loss: loss, weights, gamma (decay), smoothing (dpace). Batch: batch_rows rows a step over all processes,
    in micro-batches of micro_rows. Optimiser: AdamW with cosine schedule; learning_rate, warmup, floor
    (shares of all steps and of the peak), weight_decay, clip_norm. steps: 0 means `epochs` passes over the
    corpus. View: layers and twins (None for all), rank (None for full twins), rank_scale (what low-rank parts
    are multiplied by; None for 1, or what init_view has), mask ("auto", "trained" or a token id), repair_rank
    (of a repair head; None for none, or what init_view has), init_view (a view folder to start from), license
    (that the view is given under, for its card). train: the whole view, or only the repair head of a frozen
    one. Every evaluate_every steps evaluate_prompts held-out prompts are really decoded (0: never). sharding:
    how several processes hold the model. trackers: where figures go (None: TensorBoard where it is
    installed). attention: how blocks attend; auto is flex on CUDA, dense elsewhere.
    """

    base: str = "default"
    corpus: tuple[str, ...] = ("corpus",)
    output: str = "runs/view"
    init_view: str | None = None
    block_size: int = 8
    num_anchors: int = 64
    row_length: int = 512
    drop_long: bool = False
    num_clean: int = 1
    first_target: int = 0
    clean_share: float = 1.0
    reveal: float = 0.0
    layers: tuple[int, ...] | None = None
    twins: tuple[str, ...] | None = None
    rank: int | None = None
    rank_scale: float | None = None
    repair_rank: int | None = None
    train: Literal["view", "repair"] = "view"
    mask: int | str = "auto"
    license: str | None = None
    loss: LossKind = "kl"
    weights: WeightKind = "dpace"
    gamma: float = 4.0
    smoothing: float = 0.5
    batch_rows: int = 4
    micro_rows: int = 1
    steps: int = 0
    epochs: float = 1.0
    learning_rate: float = 4e-4
    warmup: float = 0.05
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    attention: AttentionKind = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    save_every: int = 100
    evaluate_every: int = 200
    evaluate_prompts: int = 6
    log_every: int = 10
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    trackers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, LOSSES)
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("attention", self.attention, get_args(AttentionKind))
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("train", self.train, ("view", "repair"))
        _one_of("sharding", self.sharding, ("ddp", "fsdp2"))
        if self.trackers is not None and not (
            isinstance(self.trackers, tuple) and set(map(str, self.trackers)) <= set(TRACKERS)
        ):
            raise UserInputError(
                f"trackers must list some of {', '.join(TRACKERS)} in brackets, not {self.trackers!r}."
            )
        if not _distinct(self.corpus, str) or not all(self.corpus):
            raise UserInputError(
                f"corpus must name a folder, or list different ones, not {list(self.corpus)!r}."
            )
        for name in (
            "num_anchors",
            "row_length",
            "batch_rows",
            "micro_rows",
            "save_every",
            "evaluate_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise UserInputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 2 <= self.block_size <= self.row_length:
            raise UserInputError(f"block_size must lie between 2 and row_length, not {self.block_size}.")
        _check_blocks(self)
        _check_view(self)
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise UserInputError("learning_rate and clip_norm must be positive.")
        if (
            self.evaluate_prompts < 0
            or self.weight_decay < 0
            or not 0 <= self.warmup <= 1
            or not 0 <= self.floor <= 1
        ):
            raise UserInputError(
                "evaluate_prompts and weight_decay must not be negative; warmup and floor lie within 0 to 1."
            )
        if len(self.betas) != 2 or not all(isinstance(b, float) and 0 <= b < 1 for b in self.betas):
            raise UserInputError(f"betas must be two numbers from 0 to below 1, not {self.betas!r}.")
        if self.steps < 0 or (self.steps == 0 and self.epochs <= 0):
            raise UserInputError("give steps, or a positive number of epochs.")


def _check_blocks(config: TrainConfig) -> None:
    """What a block knows must leave something to predict."""
    size = config.block_size
    if not 1 <= config.num_clean < size:
        raise UserInputError(
            f"num_clean must lie between 1 (the anchor alone) and block_size - 1 = {size - 1}, "
            f"not {config.num_clean}."
        )
    if not 0 <= config.first_target < size - 1:
        raise UserInputError(
            f"first_target must lie between 0 and {size - 2}, the last target of blocks of {size}, "
            f"not {config.first_target}."
        )
    if not 0 <= config.clean_share <= 1:
        raise UserInputError(f"clean_share must lie between 0 and 1, not {config.clean_share}.")
    if not 0 <= config.reveal < 1:
        raise UserInputError(
            f"reveal must lie between 0 and below 1, where a block would have no mask, not {config.reveal}."
        )


def _check_view(config: TrainConfig) -> None:
    """Of the keys that may hold anything: YAML gives whatever was written there."""
    if config.layers is not None and not (
        _distinct(config.layers, int) and all(layer >= 0 for layer in config.layers)
    ):
        raise UserInputError(f"layers must list different layer numbers from 0, not {config.layers!r}.")
    if config.twins is not None and not _distinct(config.twins, str):
        raise UserInputError(
            f"twins must list different modules such as [q_proj, k_proj, v_proj], not {config.twins!r}."
        )
    for name, without in (("rank", "for full twins"), ("repair_rank", "for no repair head")):
        rank = getattr(config, name)
        if rank is not None and (type(rank) is not int or rank < 1):
            raise UserInputError(f"{name} must be a positive number, not {rank!r}; leave it out {without}.")
    scale = config.rank_scale
    if scale is not None and not (type(scale) in (int, float) and 0 < scale < math.inf):
        raise UserInputError(f"rank_scale must be a positive number, not {scale!r}; leave it out for 1.")
    if scale is not None and config.rank is None and config.init_view is None:
        raise UserInputError("rank_scale is the scale of low-rank twins; give their rank, or leave it out.")
    if config.train == "repair" and config.init_view is None:
        raise UserInputError(
            "train: repair needs init_view, the folder of the view whose drafts are to be repaired."
        )
    if config.mask not in ("auto", "trained") and (type(config.mask) is not int or config.mask < 0):
        raise UserInputError(f"mask must be auto, trained or a token id, not {config.mask!r}.")
    if config.init_view is not None and not isinstance(config.init_view, str):
        raise UserInputError(f"init_view must name a view folder, not {config.init_view!r}.")
    if config.license is not None and (not isinstance(config.license, str) or not config.license.strip()):
        raise UserInputError(f"license must name a licence such as apache-2.0, not {config.license!r}.")


def _distinct(values: object, kind: type) -> bool:
    """Whether this is a list of different values of that type, with at least one in it."""
    return (
        isinstance(values, tuple)
        and bool(values)
        and all(type(value) is kind for value in values)
        and len(set(values)) == len(values)
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserInputError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")


def load_recipe(file: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a YAML recipe; `overrides` are `key=value` strings and win.

    Raises UserInputError for unknown keys (with a suggestion), wrong types and unreadable files.
    """
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as e:
        raise UserInputError(
            f"the recipe {file} cannot be read ({type(e).__name__}); "
            "those that come with Orthrus are in recipes/."
        ) from e
    except yaml.YAMLError as e:
        raise UserInputError(
            f"{file} is not valid YAML ({e}); compare it with recipes/smoke-cpu.yaml."
        ) from e
    if not isinstance(content, dict):
        raise UserInputError(f"{file} must hold `key: value` lines; compare it with recipes/smoke-cpu.yaml.")
    for override in overrides or ():
        key, found, value = override.partition("=")
        if not found:
            raise UserInputError(f"an override must read key=value, not {override!r}.")
        try:
            content[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise UserInputError(f"the value in {override!r} is not valid YAML; put text in quotes.") from e
    return config_from(TrainConfig, content, where=str(file))


def config_from(kind: type[TrainConfig], content: dict[str, Any], *, where: str) -> TrainConfig:
    """A config from plain values; unknown keys are errors with a suggestion."""
    known = {f.name: f for f in fields(kind)}
    for key in content:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; the keys are {', '.join(known)}."
            raise UserInputError(f"{where}: unknown key {key!r}{hint}")
    values = {key: _coerced(kind, key, value) for key, value in content.items()}
    try:
        return kind(**values)
    except TypeError as e:
        raise UserInputError(f"{where}: {e}.") from e


def _coerced(kind: type[TrainConfig], key: str, value: Any) -> Any:
    """YAML writes 2e-4 as text and tuples as lists; everything else must have the default's type.

    A mask is a word or a number; what it may be is for the config itself to say.
    """
    default = getattr(kind(), key)
    if value is None and default is not None:
        raise UserInputError(f"{key} has no value; give one or leave the line out.")
    if key == "corpus":
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(value, list) and (default is None or isinstance(default, tuple)):
        return tuple(value)
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserInputError(f"{key} must be a number, not {value!r}.")
        return number
    if key != "mask" and default is not None and type(value) is not type(default):
        raise UserInputError(f"{key} must be {type(default).__name__}, not {value!r}.")
    return value


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values, for run folders and provenance."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain
