"""The arms of the study: what each changes of the recipe that all share."""

from dataclasses import dataclass, field
from typing import Any

RECIPE = "recipes/study-cpu.yaml"


@dataclass(frozen=True, slots=True)
class Arm:
    """name: its key in the result file. question: the table that it belongs to. overrides: recipe keys.
    denoising_steps: passes of a draft that it is scored with."""

    name: str
    question: str
    label: str
    overrides: dict[str, Any] = field(default_factory=dict)
    denoising_steps: tuple[int, ...] = (1,)


BASE = "base"
ARMS = (
    Arm(BASE, "", "KL, D-PACE weights, K = 8, all layers, q k v o, full rank", {}, (1, 2)),
    Arm("seed-1", "Noise: the same recipe with other seeds", "seed 1", {"seed": 1}),
    Arm("seed-2", "Noise: the same recipe with other seeds", "seed 2", {"seed": 2}),
    Arm("ce", "Loss", "cross-entropy on the corpus token", {"loss": "ce"}),
    Arm("tv", "Loss", "total variation", {"loss": "tv"}),
    Arm("lk", "Loss", "LK mixture of KL and TV", {"loss": "lk"}),
    Arm("uniform", "Position weights", "uniform (with KL: the paper's loss)", {"weights": "uniform"}),
    Arm("decay", "Position weights", "exponential decay, gamma 4", {"weights": "decay"}),
    # About as many targets a sequence for each K, so that the AR pass is shared by as many.
    Arm("k4", "Block size", "K = 4", {"block_size": 4, "num_anchors": 224}),
    Arm("k16", "Block size", "K = 16", {"block_size": 16, "num_anchors": 45}),
    Arm("k32", "Block size", "K = 32", {"block_size": 32, "num_anchors": 22}),
    Arm("reveal", "Denoising steps", "trained with half of the block revealed", {"reveal": 0.5}, (1, 2)),
    Arm("no-o", "Twins", "q k v, without o", {"twins": ["q_proj", "k_proj", "v_proj"]}),
    Arm("rank-16", "Rank", "rank 16", {"rank": 16}),
    Arm("rank-64", "Rank", "rank 64", {"rank": 64}),
    Arm("upper-half", "Layers", "the upper 15 of 30", {"layers": list(range(15, 30))}),
    Arm("lower-half", "Layers", "the lower 15 of 30", {"layers": list(range(15))}),
    Arm("every-other", "Layers", "every other one, 15 of 30", {"layers": list(range(0, 30, 2))}),
    Arm("mask-token", "Mask", "fixed to an unused token", {"mask": 6}),
)
