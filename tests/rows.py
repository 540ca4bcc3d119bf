"""One request's passes by hand: a runner, a pool and slots, for tests of what stands below the engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthrus.model.dual_view import DualView
from orthrus.model.passes import Part, causal, join
from orthrus.model.pool import SlotPool, Slots, pages_for
from orthrus.model.runner import EagerRunner, Runner


def slot_by_slot(store: Tensor) -> Tensor:
    """A store of a pool as (1, H, S, D), the numbers of a slot side by side: itself, or a copy of transposed keys."""
    return store.mT.flatten(2, 3) if store.ndim == 5 else store


class Rows:
    """A history that grows, and what parts after it compute. Another history may share the pool."""

    def __init__(
        self, model: DualView | Runner, num_slots: int = 256, *, pool: SlotPool | None = None
    ) -> None:
        self.runner: Runner = EagerRunner(model) if isinstance(model, DualView) else model
        self.pool = pool or self.runner.new_pool(pages_for(num_slots))
        self.slots = Slots(self.pool)
        assert self.slots.reserve(num_slots)

    @property
    def length(self) -> int:
        return self.slots.length

    @torch.inference_mode()
    def hidden(self, part: Part) -> Tensor:
        """Final hidden states (I, C) of the part's rows, nothing committed."""
        return self.runner.hidden(join([(part, self.slots)], self.runner.dual.device), self.pool)

    @torch.inference_mode()
    def logits(self, part: Part) -> Tensor:
        """Logits (I, V) of all rows of the part."""
        return self.runner.head(self.hidden(part))

    def feed(self, token_ids: Sequence[int]) -> Tensor:
        """Commit tokens; returns the logits (T, V) of their rows."""
        logits_TV = self.logits(causal(token_ids))
        self.slots.commit(len(token_ids))
        return logits_TV

    def stored(self, num_slots: int | None = None) -> list[Tensor]:
        """Keys and values (H, S, D) of each layer, in the order of positions."""
        places = torch.from_numpy(self.slots.places(torch.arange(num_slots or self.length).numpy()))
        return [slot_by_slot(store)[0, :, places].clone() for store in (*self.pool.keys, *self.pool.values)]
