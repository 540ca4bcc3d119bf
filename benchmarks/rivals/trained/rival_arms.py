"""The trained rivals: what each learns with, how it is built around a base, and what drafts for a request."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from block_views import CausalPass, ViewDrafts, ViewLearner
from chain import Drafts
from dflash import DFlash, DFlashDrafts, spread_layers
from drafter_parts import DrafterLearner, Lessons
from eagle3 import Eagle3, Eagle3Drafts
from equal_loop import Learner
from torch import nn

from orthrus.base.loading import Base
from orthrus.training.forward import Objective, TrainingPass
from orthrus.training.recipe import TrainConfig
from orthrus.training.start import starting_view

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What all arms share; batches, blocks and schedule as in recipes/study-cpu.yaml.
SHARED = TrainConfig(
    sequence_length=576, num_anchors=96, batch_size=1, block_size=8, min_lr_ratio=0.05, drop_long=True
)


@dataclass(frozen=True, slots=True)
class Arm:
    """kind: "view", "dflash" or "eagle3". settings: recipe keys that differ from `SHARED`. trials: settings of which
    the one that does best on held-out sequences, after a share of the small budget, is taken. causal: blocks with
    order."""

    name: str
    label: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    trials: tuple[dict[str, Any], ...] = ()
    causal: bool = False
    check_share: float = 1.0

    @property
    def num_modes(self) -> int:
        """Ways to decode: views also with the floor."""
        return 2 if self.kind == "view" else 1

    def config(self, chosen: dict[str, Any], seed: int, dtype: str) -> TrainConfig:
        return replace(SHARED, **(self.settings | chosen), seed=seed, dtype=dtype)


RATES = ({"learning_rate": 1e-3}, {"learning_rate": 2e-3})
ARMS = (
    Arm(
        "dflash",
        "DFlash: 2 layers, features of 5 layers of the base, masks",
        "dflash",
        # The last: the loss of its paper.
        trials=(*RATES, {"learning_rate": 1e-3, "loss": "ce", "weights": "decay"}),
    ),
    Arm(
        "eagle3",
        "EAGLE-3: 1 layer, features of 3 layers of the base, 7 unrolled steps",
        "eagle3",
        trials=RATES,
    ),
    Arm(
        "orthrus",
        "Orthrus: full twins of q k v o in every layer, KL",
        "view",
        # The rate of the study and the pilots; not tried again.
        trials=({"learning_rate": 8e-4},),
    ),
    Arm(
        "uno",
        "Uno's manner: rank 64, scale 8 on all seven projections, causal blocks, TV; masks, not random tokens",
        "view",
        settings={"twins": SEVEN, "rank": 64, "rank_scale": 8.0, "loss": "tv"},
        trials=({"learning_rate": 8e-4}, {"learning_rate": 2e-3}),
        causal=True,
        check_share=0.4,
    ),
)


@dataclass(frozen=True, slots=True)
class Built:
    """An arm around a base. parameters: what is trained, by name. modes: makers of drafts for one request.
    cache_numbers: that its own cache keeps for each token of context, beside those of the base."""

    learner: Learner
    parameters: dict[str, nn.Parameter]
    modes: dict[str, Callable[[], Drafts]]
    cache_numbers: int

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def load(self, values: dict[str, torch.Tensor]) -> None:
        assert values.keys() == self.parameters.keys(), "these are another arm's weights"
        for name, parameter in self.parameters.items():
            parameter.data = values[name].to(parameter.dtype)


def targets_of(num_layers: int) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Layers of the base that DFlash reads, and a low, a middle and a high one of them for EAGLE-3."""
    five = spread_layers(num_layers, min(5, num_layers - 3))
    return five, (five[0], five[len(five) // 2], five[-1])


def build(arm: Arm, base: Base, config: TrainConfig, lessons: Lessons) -> Built:
    """Parameters are float32. A view is put into the base itself, so each view needs a base of its own."""
    objective = Objective(loss=config.loss, weights=config.weights, gamma=config.gamma)
    size, sizes = config.block_size, base.model.config
    if arm.kind == "view":
        dual = starting_view(base, config)
        parameters = dual.view_parameters()
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        kind = CausalPass if arm.causal else TrainingPass
        learner = ViewLearner(kind(dual, objective, config.attention, config.activations))
        modes: dict[str, Callable[[], Drafts]] = {
            "floor and 6 drafts": lambda: ViewDrafts(dual, size, floor=True, causal=arm.causal),
            "7 drafts": lambda: ViewDrafts(dual, size, floor=False, causal=arm.causal),
        }
        return Built(learner, parameters, modes, 0)
    five, three = targets_of(sizes.num_hidden_layers)
    base.model.requires_grad_(False)
    per_layer = 2 * sizes.num_key_value_heads * sizes.head_dim
    if arm.kind == "dflash":
        flash = DFlash(base.model, five, seed=config.seed)
        modes = {"7 drafts": lambda: DFlashDrafts(flash, size)}
        return Built(
            DrafterLearner(flash, lessons, objective),
            dict(flash.named_parameters()),
            modes,
            len(flash.layers) * per_layer,
        )
    eagle = Eagle3(base.model, three, seed=config.seed)
    modes = {"7 drafts": lambda: Eagle3Drafts(eagle, size - 1)}
    return Built(DrafterLearner(eagle, lessons, objective), dict(eagle.named_parameters()), modes, per_layer)
