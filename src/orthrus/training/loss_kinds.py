"""The losses and weights that a recipe can name. Not in `losses`, so that recipes are read without torch."""

from typing import Literal, get_args

LossKind = Literal["kl", "ce", "tv", "lk"]
WeightKind = Literal["uniform", "decay", "dpace"]
LOSSES: tuple[LossKind, ...] = get_args(LossKind)
WEIGHTS: tuple[WeightKind, ...] = get_args(WeightKind)
