"""Faults that tests plant."""

import pytest
from torch import Tensor

from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.slot_cache import SlotCache


def plant_wrong_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every pass slot 0 is marked as a diffusion row's."""
    hidden = DualView.hidden

    def corrupted(self: DualView, p: Pass, cache: SlotCache) -> Tensor:
        hidden_BTC = hidden(self, p, cache)
        cache.writers_BS[0, 0] = 2
        return hidden_BTC

    monkeypatch.setattr(DualView, "hidden", corrupted)
