"""A draft in two denoising steps, for the study: what the paper's own ablation compares with one."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.slot_cache import SlotCache


class TwoSteps:
    """A DualView whose draft passes run twice: the surer half of the first guesses fills the block's masks,
    and the second pass decides the others. Greedy, one stream. Everything else is the view's own.
    """

    def __init__(self, dual: DualView) -> None:
        self._dual = dual

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dual, name)

    def run(self, p: Pass, cache: SlotCache) -> Tensor:
        """Logits of the pass; of a draft pass, those of the step that decided each row."""
        first_1RV = self._dual.run(p, cache)
        # Rows whose guess has a mask row to go to: block row j guesses the token of row j + 1.
        drafts = p.logit_rows_R[(p.logit_rows_R >= p.num_ar_rows) & (p.logit_rows_R + 1 < p.num_rows)]
        if p.num_ar_rows == p.num_rows or not len(drafts):
            return first_1RV
        rows = {int(row): i for i, row in enumerate(p.logit_rows_R)}
        at_R = torch.tensor([rows[int(row)] for row in drafts])
        sure_R = first_1RV[0, at_R].float().softmax(-1).amax(-1)
        keep = sure_R.topk((len(drafts) + 1) // 2).indices
        token_ids_BT = p.token_ids_BT.clone()
        token_ids_BT[0, drafts[keep] + 1] = first_1RV[0, at_R[keep]].argmax(-1)
        second_1RV = self._dual.run(replace(p, token_ids_BT=token_ids_BT), cache).clone()
        # With a floor the first mask is filled by the AR row's token only in the next pass; both steps see
        # the same AR row, so its logits stand.
        fixed = [i for row, i in rows.items() if row < p.num_ar_rows] + at_R[keep].tolist()
        second_1RV[0, fixed] = first_1RV[0, fixed]
        return second_1RV
