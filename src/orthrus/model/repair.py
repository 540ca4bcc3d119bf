"""The repair head corrects a draft row's guess, given the previous token or a candidate for it.

A block guesses its positions independently of each other. The head changes a row's final hidden state as a function of
the previous token, so that neighbouring guesses fit together. A similar idea is in arXiv 2402.05109.

Letters: D draft rows, P parents of each, M children of each, C hidden size, r rank.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RepairHead(nn.Module):
    """h + out(silu(hidden(rms(h)) + parent(rms(e)))), with e the embedding of the token before.

    `out` starts at zero, so an untrained head changes nothing. The other weights are drawn from `seed`.
    """

    def __init__(self, hidden_size: int, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_size, rank)
        self.parent = nn.Linear(hidden_size, rank, bias=False)
        self.out = nn.Linear(rank, hidden_size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in (self.hidden.weight, self.parent.weight):
                weight.copy_(torch.randn(weight.shape, generator=generator) * hidden_size**-0.5)
            self.hidden.bias.zero_()
            self.out.weight.zero_()

    def forward(self, hidden: Tensor, parent: Tensor) -> Tensor:
        """The term to add to final hidden states (..., C), given embeddings (..., C) of the tokens before them.

        The two broadcast against each other. Both are normalised, because families scale them differently.
        """
        change: Tensor = self.out(F.silu(self.before(hidden, self.hidden) + self.before(parent, self.parent)))
        return change

    def before(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """The contribution of hidden states, or of embeddings, (..., C) to the input of the nonlinearity, (..., r)."""
        out: Tensor = linear(F.rms_norm(x.to(linear.weight.dtype), x.shape[-1:]))
        return out
