"""Faults that tests plant."""

import pytest
import torch
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.model.passes import Pass
from orthrus.model.pool import DIFFUSION, SlotPool
from orthrus.model.runner import EagerRunner


def plant_wrong_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every pass the first slot of each request is marked as a diffusion row's."""
    hidden = EagerRunner.hidden

    def corrupted(self: EagerRunner, p: Pass, pool: SlotPool) -> Tensor:
        hidden_RC = hidden(self, p, pool)
        pool.writers_S[[span.places[0] for span in p.spans]] = DIFFUSION
        return hidden_RC

    monkeypatch.setattr(EagerRunner, "hidden", corrupted)


def plant_tie(orthrus: Orthrus, token_id: int) -> int:
    """Give the next token id the same row of the head; returns it."""
    with torch.no_grad():
        head_VC = orthrus.dual.base.get_output_embeddings().weight
        head_VC[token_id + 1] = head_VC[token_id]
    return token_id + 1
