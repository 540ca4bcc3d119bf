"""A draft in two denoising steps, for the study: what the paper's own ablation compares with one."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.slot_cache import SlotCache


class TwoSteps:
    """A DualView whose draft passes run twice: the surer half of the first guesses fills the block's masks,
    and the second pass decides the others. Greedy, one stream, strategy `chain`. All else is the view's own.
    """

    def __init__(self, dual: DualView) -> None:
        self._dual = dual

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dual, name)

    def run(self, p: Pass, cache: SlotCache) -> Tensor:
        """Logits of the pass; of a draft pass, those of the step that decided each row."""
        return self._dual.head(self.hidden(p, cache)[:, p.logit_rows_R])

    def hidden(self, p: Pass, cache: SlotCache) -> Tensor:
        """Hidden states of the pass; of a draft pass, those of the step that decided each row."""
        first_1TC = self._dual.hidden(p, cache)
        if not p.block_size:
            return first_1TC
        assert p.num_rows - p.num_ar_rows == p.block_size, "one block: no fused strategy"
        # Block row j guesses the token of row j + 1; the AR row, where there is one, decides the first of
        # them, which stays a mask in both steps.
        first = p.num_ar_rows + (1 if p.num_ar_rows else 0)
        guesses = slice(first, p.num_rows - 1)
        logits_DV = self._dual.head(first_1TC[0, guesses])
        sure_D = logits_DV.float().softmax(-1).amax(-1)
        keep = sure_D.topk((len(sure_D) + 1) // 2).indices
        token_ids_BT = p.token_ids_BT.clone()
        token_ids_BT[0, first + 1 + keep] = logits_DV[keep].argmax(-1)
        second_1TC = self._dual.hidden(replace(p, token_ids_BT=token_ids_BT), cache).clone()
        # The AR rows are the same in both steps.
        fixed = [*range(p.num_ar_rows), *(first + keep).tolist()]
        second_1TC[0, fixed] = first_1TC[0, fixed]
        return second_1TC
