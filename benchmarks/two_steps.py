"""A draft in two denoising steps, for the study: what the paper's own ablation compares with one."""

from dataclasses import replace

from torch import Tensor

from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import RunnerAround


class TwoSteps(RunnerAround):
    """A runner whose draft passes run twice: the surer half of the first guesses fills the block's masks,
    and the second pass decides the others. Greedy, one request, strategy `chain`. All else is the runner's own.
    """

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        """Hidden states of the pass; of a draft pass, those of the step that decided each row."""
        first_RC = self._runner.hidden(p, pool)
        (span,) = p.spans
        if not span.part.block_size:
            return first_RC
        assert p.num_rows - p.num_ar_rows == span.part.block_size, "one block: no fused strategy"
        # Block row j guesses the token of row j + 1; the AR row, where there is one, decides the first of
        # them, which stays a mask in both steps.
        first = p.num_ar_rows + (1 if p.num_ar_rows else 0)
        guesses = slice(first, p.num_rows - 1)
        logits_DV = self._runner.head(first_RC[guesses])
        sure_D = logits_DV.float().softmax(-1).amax(-1)
        keep = sure_D.topk((len(sure_D) + 1) // 2).indices
        token_ids_R = p.token_ids_R.clone()
        token_ids_R[first + 1 + keep] = logits_DV[keep].argmax(-1)
        second_RC = self._runner.hidden(replace(p, token_ids_R=token_ids_R), pool).clone()
        # The AR rows are the same in both steps.
        fixed = [*range(p.num_ar_rows), *(first + keep).tolist()]
        second_RC[fixed] = first_RC[fixed]
        return second_RC
