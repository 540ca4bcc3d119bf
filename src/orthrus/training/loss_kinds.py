"""The losses and weights that a recipe can name; apart from `losses`, so that a recipe is read without torch."""

from typing import Literal, get_args

LossKind = Literal["kl", "ce", "tv", "lk"]
WeightKind = Literal["uniform", "decay", "dpace"]
LOSSES: tuple[LossKind, ...] = get_args(LossKind)
WEIGHTS: tuple[WeightKind, ...] = get_args(WeightKind)
