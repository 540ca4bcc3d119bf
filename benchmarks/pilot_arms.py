"""The arms of the pilots: what each changes of the recipe that all share."""

from dataclasses import dataclass, field
from typing import Any

RECIPE = "recipes/pilots-cpu.yaml"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Views that are made anew: they have no shipped view to go on from, and learn faster at first.
FRESH = {"init_view": None, "learning_rate": 8e-4}


@dataclass(frozen=True, slots=True)
class Arm:
    """name: of its result file. base: the arm that it is held against. overrides: recipe keys."""

    name: str
    label: str
    base: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


ARMS = (
    Arm("warm", "from the shipped view: KL, D-PACE weights, K = 8"),
    Arm("warm-rejected", "half of the blocks at rejected drafts", "warm", {"rejected_share": 0.5}),
    Arm("warm-tv", "total variation", "warm", {"loss": "tv"}),
    Arm("warm-lk", "LK mixture of KL and TV", "warm", {"loss": "lk"}),
    # About as many targets a sequence for each K, so that the AR pass is shared by as many.
    Arm("warm-k12", "K = 12", "warm", {"block_size": 12, "num_anchors": 61}),
    Arm("warm-k16", "K = 16", "warm", {"block_size": 16, "num_anchors": 45}),
    Arm("fresh", "anew: full q k v o", None, FRESH),
    Arm("fresh-rank-64", "rank 64, scale 1", "fresh", FRESH | {"rank": 64}),
    Arm("fresh-rank-64-scale-8", "rank 64, scale 8", "fresh", FRESH | {"rank": 64, "rank_scale": 8}),
    Arm("fresh-rank-64-scale-64", "rank 64, scale 64", "fresh", FRESH | {"rank": 64, "rank_scale": 64}),
    Arm(
        "fresh-seven-rank-64-scale-8",
        "all seven projections, rank 64, scale 8",
        "fresh",
        FRESH | {"rank": 64, "rank_scale": 8, "twins": SEVEN},
    ),
)
