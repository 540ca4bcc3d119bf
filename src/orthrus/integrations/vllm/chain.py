"""From the logits of guessing rows to one chain of drafts a request.

Shapes: D guessing rows of all requests, N requests, M candidates of a row, C hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

WIDTH = 16
"""Candidates of a row that a repair head looks at, as in our own engine."""

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden_NC, parent_ids_N, child_ids_NM) -> what each row's parent adds to the logits of its candidates."""


def walk(
    hidden_DC: Tensor,
    logits_DV: Tensor,
    num_guesses: Sequence[int],
    parent_ids_N: Tensor,
    change: Change | None = None,
) -> list[list[int]]:
    """The best guess of each row, given the guess before it, as token ids by request.

    num_guesses: rows of each request, in order. parent_ids_N: the token before each request's first row.
    change: a repair head's; without one rows guess independently of each other.
    """
    most = max(num_guesses, default=0)
    if most == 0:
        return [[] for _ in num_guesses]
    width = 1 if change is None else min(WIDTH, logits_DV.shape[-1])
    best_DM, ids_DM = logits_DV.float().topk(width, dim=-1)
    firsts = [0, *accumulate(num_guesses)][:-1]
    chosen_NT = torch.zeros(len(num_guesses), most, dtype=torch.long, device=logits_DV.device)
    parents_N = parent_ids_N.clone()
    for step in range(most):
        live = [i for i, num in enumerate(num_guesses) if num > step]
        rows = torch.tensor([firsts[i] + step for i in live], device=logits_DV.device)
        live_L = torch.tensor(live, device=logits_DV.device)
        scores_LM, ids_LM = best_DM[rows], ids_DM[rows]
        if change is not None:
            scores_LM = scores_LM + change(hidden_DC[rows], parents_N[live_L], ids_LM)
        ids_L = ids_LM.gather(-1, scores_LM.argmax(-1, keepdim=True))[:, 0]
        parents_N[live_L] = ids_L
        chosen_NT[live_L, step] = ids_L
    return [row[:num] for row, num in zip(chosen_NT.tolist(), num_guesses, strict=True)]
