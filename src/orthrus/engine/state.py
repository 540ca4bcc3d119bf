"""What one running request carries from cycle to cycle."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.config import SamplingParams
from orthrus.decoding.sampling import draw, filtered_probs, greedy_tokens
from orthrus.model.dual_view import DualView
from orthrus.model.slot_cache import SlotCache
from orthrus.types import CycleKind


@dataclass(slots=True)
class DecodeState:
    """One stream. anchor_11: the last committed token (1, 1), on the device, not yet in the cache."""

    dual: DualView
    cache: SlotCache
    sampling: SamplingParams
    generator: torch.Generator
    block_size: int
    floor: bool
    context_length: int
    anchor_11: Tensor

    def choose(self, logits_RV: Tensor) -> tuple[Tensor, Tensor | None]:
        """A token per row, and the law it was drawn from (None when greedy): ids_R, probs_RV float32."""
        if self.sampling.greedy:
            return greedy_tokens(logits_RV), None
        probs_RV = filtered_probs(logits_RV, self.sampling)
        return draw(probs_RV, self.generator), probs_RV


class Step(NamedTuple):
    """What a cycle committed, on the host. `is_draft` marks tokens that the diffusion view proposed."""

    kind: CycleKind
    token_ids: list[int]
    is_draft: list[bool]
    num_drafted: int
    num_passes: int
