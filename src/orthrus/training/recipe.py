"""A training run as one typed record: each field is a YAML key and a `key=value` of the command line."""

import json
import math
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from orthrus.base.paths import expanded
from orthrus.errors import UserInputError
from orthrus.model.view_config import LARGEST_BLOCK, LARGEST_RANK
from orthrus.training.loss_kinds import LOSSES, WEIGHTS, LossKind, WeightKind

# Limits far above what any machine can hold. A larger number is a typing error.
MOST_SEQUENCE_LENGTH = 2**20
_MOST = {
    "block_size": LARGEST_BLOCK,
    "num_anchors": 2**16,
    "sequence_length": MOST_SEQUENCE_LENGTH,
    "batch_size": 2**20,
    "micro_batch_size": 2**16,
    "rank": LARGEST_RANK,
    "repair_rank": LARGEST_RANK,
    "evaluate_prompts": 2**16,
    "epochs": 1e6,
    "steps": 2**40,
}
TRACKERS = ("tensorboard", "trackio", "wandb")
AttentionKind = Literal["auto", "dense", "flex"]
ActivationKind = Literal["none", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Settings of `orthrus train`.

    * Run: base, corpus and output are the model, the corpus folders, and the folder for the run's state and views.
      train: the whole view, or only the repair head of a frozen view. init_view: a view folder from which to start.
    * View: layers and twins (None for all); rank (None for full twins); rank_scale (the factor on low-rank parts; None
      for 1, or that of init_view); mask ("auto", "trained" or a token id); repair_rank (of a repair head; None for no
      head, or that of init_view); license (for the view's card).
    * Blocks: block_size (K); num_anchors (blocks of a sequence); sequence_length (tokens); drop_long (leave out longer
      dialogues); num_clean, first_target, clean_share, reveal and rejected_share as in `BlockLayout`.
    * Loss: loss; weights; gamma (for decay); smoothing (for dpace).
    * Batch: batch_size (sequences of a step, over all processes); micro_batch_size (sequences of one pass).
    * Optimiser: AdamW with betas, weight_decay and clip_norm, and a cosine schedule with learning_rate, warmup (share
      of all steps) and min_lr_ratio (share of the peak). steps: 0 means `epochs` passes over the corpus. ema_decay: the
      run evaluates and keeps an exponential moving average of the weights; 0 for the weights themselves.
    * Evaluation: every evaluate_every steps the run decodes evaluate_prompts held-out prompts (0: never). trackers:
      where metrics go (None: TensorBoard if it is installed).
    * Machine: dtype of the frozen base; sharding (how several processes hold the model); attention (code for the
      blocks; auto is flex on CUDA, dense elsewhere); activations (what is computed again in the backward pass instead
      of kept: nothing, or each layer from its input).
    """

    base: str = "default"
    corpus: tuple[str, ...] = ("corpus",)
    output: str = "runs/view"
    init_view: str | None = None
    block_size: int = 8
    num_anchors: int = 64
    sequence_length: int = 512
    drop_long: bool = False
    num_clean: int = 1
    first_target: int = 0
    clean_share: float = 1.0
    reveal: float = 0.0
    rejected_share: float = 0.0
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
    batch_size: int = 4
    micro_batch_size: int = 1
    steps: int = 0
    epochs: float = 1.0
    learning_rate: float = 4e-4
    warmup: float = 0.05
    min_lr_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    attention: AttentionKind = "auto"
    activations: ActivationKind = "none"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    save_every: int = 100
    evaluate_every: int = 200
    evaluate_prompts: int = 6
    log_every: int = 10
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    trackers: tuple[str, ...] | None = None

    @property
    def output_folder(self) -> Path:
        return Path(self.output).expanduser()

    def __post_init__(self) -> None:
        _one_of("loss", self.loss, LOSSES)
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("attention", self.attention, get_args(AttentionKind))
        _one_of("activations", self.activations, get_args(ActivationKind))
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("train", self.train, ("view", "repair"))
        _one_of("sharding", self.sharding, ("ddp", "fsdp2"))
        if self.trackers is not None and not (
            isinstance(self.trackers, tuple) and all(t in TRACKERS for t in self.trackers)
        ):
            raise UserInputError(
                f"trackers must list some of {', '.join(TRACKERS)} in brackets, not {shown(self.trackers)}."
            )
        if not _distinct(self.corpus, str) or not all(self.corpus):
            raise UserInputError(
                f"corpus must name a folder, or list different ones, not {shown(list(self.corpus))}."
            )
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UserInputError(f"{entry.name} must be a finite number, not {value}.")
        for name in (
            "num_anchors",
            "sequence_length",
            "batch_size",
            "micro_batch_size",
            "save_every",
            "evaluate_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise UserInputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 2 <= self.block_size <= self.sequence_length:
            raise UserInputError(f"block_size must lie between 2 and sequence_length, not {self.block_size}.")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and value > most:
                raise UserInputError(f"{name} must be at most {most:,}, not {shown(value)}.")
        for name in ("base", "output"):
            if not getattr(self, name).strip():
                raise UserInputError(f"{name} must name something, not {getattr(self, name)!r}.")
        for folder in (*self.corpus, self.output, *([self.init_view] if self.init_view else [])):
            expanded(folder if isinstance(folder, str) else "")
        if not 0 <= self.seed < 2**63:
            raise UserInputError(f"seed must lie between 0 and 2**63 - 1, not {self.seed}.")
        if self.gamma <= 0 or not 0 <= self.smoothing <= 1:
            raise UserInputError("gamma must be positive, and smoothing lie within 0 to 1.")
        _check_blocks(self)
        _check_view(self)
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise UserInputError("learning_rate and clip_norm must be positive.")
        if (
            self.evaluate_prompts < 0
            or self.weight_decay < 0
            or not 0 <= self.warmup <= 1
            or not 0 <= self.min_lr_ratio <= 1
        ):
            raise UserInputError(
                "evaluate_prompts and weight_decay must not be negative; warmup and min_lr_ratio lie within 0 to 1."
            )
        if len(self.betas) != 2 or not all(isinstance(b, float) and 0 <= b < 1 for b in self.betas):
            raise UserInputError(f"betas must be two numbers from 0 to below 1, not {shown(self.betas)}.")
        if not 0 <= self.ema_decay < 1:
            raise UserInputError(f"ema_decay must lie between 0 and below 1, not {shown(self.ema_decay)}.")
        if self.steps < 0 or (self.steps == 0 and self.epochs <= 0):
            raise UserInputError("give steps, or a positive number of epochs.")


def _check_blocks(config: TrainConfig) -> None:
    """Raises UserInputError if the known tokens of a block leave no target."""
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
    for name in ("clean_share", "rejected_share"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserInputError(f"{name} must lie between 0 and 1, not {getattr(config, name)}.")
    if not 0 <= config.reveal < 1:
        raise UserInputError(
            f"reveal must lie between 0 and below 1, where a block would have no mask, not {config.reveal}."
        )


def _check_view(config: TrainConfig) -> None:
    """Check keys whose default gives no type, so that YAML may have put any value there."""
    if config.layers is not None and not (
        _distinct(config.layers, int) and all(layer >= 0 for layer in config.layers)
    ):
        raise UserInputError(
            f"layers must list different layer numbers from 0, such as [20, 25], not {shown(config.layers)}."
        )
    if config.twins is not None and not _distinct(config.twins, str):
        raise UserInputError(
            f"twins must list different modules such as [q_proj, k_proj, v_proj], not {shown(config.twins)}."
        )
    for name, without in (("rank", "for full twins"), ("repair_rank", "for no repair head")):
        rank = getattr(config, name)
        if rank is not None and (type(rank) is not int or rank < 1):
            raise UserInputError(
                f"{name} must be a positive number, not {shown(rank)}; leave it out {without}."
            )
    scale = config.rank_scale
    if scale is not None and not (type(scale) in (int, float) and 0 < scale < math.inf):
        raise UserInputError(f"rank_scale must be a positive number, not {shown(scale)}; leave it out for 1.")
    if scale is not None and config.rank is None and config.init_view is None:
        raise UserInputError("rank_scale is the scale of low-rank twins; give their rank, or leave it out.")
    if config.train == "repair" and config.init_view is None:
        raise UserInputError(
            "train: repair needs init_view, the folder of the view whose drafts are to be repaired."
        )
    if config.mask not in ("auto", "trained") and (type(config.mask) is not int or config.mask < 0):
        raise UserInputError(f"mask must be auto, trained or a token id, not {shown(config.mask)}.")
    if config.init_view is not None and not isinstance(config.init_view, str):
        raise UserInputError(f"init_view must name a view folder, not {shown(config.init_view)}.")
    if config.license is not None and (not isinstance(config.license, str) or not config.license.strip()):
        raise UserInputError(f"license must name a licence such as apache-2.0, not {shown(config.license)}.")


def _distinct(values: object, kind: type) -> bool:
    """Whether this is a list, with at least one element, of different values of that type."""
    return (
        isinstance(values, tuple)
        and bool(values)
        and all(type(value) is kind for value in values)
        and len(set(values)) == len(values)
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserInputError(f"{name} must be one of {', '.join(allowed)}, not {shown(value)}.")


def shown(value: object, words: Callable[[object], str] = repr) -> str:
    """A value for a message, cut short, because one line of YAML can hold a value that takes pages to print."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 3, 8, 8, 4
    short.maxstring = short.maxother = 100
    try:
        text = short.repr(value) if words is repr else words(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values, for run folders and provenance."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain
