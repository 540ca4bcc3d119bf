"""Faults that tests plant."""

import pytest
import torch
from torch import Tensor

from orthrus.api import Orthrus
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


def plant_tie(orthrus: Orthrus, token_id: int) -> int:
    """Give the next token id the same row of the head; returns it."""
    with torch.no_grad():
        head_VC = orthrus.dual.base.get_output_embeddings().weight
        head_VC[token_id + 1] = head_VC[token_id]
    return token_id + 1
