"""The quick nucleus of top-p against its definition."""

import pytest
import torch
from torch import Tensor

from orthrus.decoding.sampling import nucleus


def slow_nucleus(probs_RV: Tensor, top_p: float) -> Tensor:
    """Token by token: kept where the strictly more probable ones hold less than top_p."""
    rows = []
    for probs_V in probs_RV.double():
        above_V = torch.stack([probs_V[probs_V > p].sum() for p in probs_V])
        rows.append((above_V < top_p) | (probs_V == probs_V.max()))
    return torch.stack(rows)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("num_first", [1, 8, 64, 300])
def test_the_quick_nucleus_is_the_defined_one(top_p: float, num_first: int) -> None:
    generator = torch.Generator().manual_seed(num_first)
    # Rows from nearly one-hot to nearly flat, so that some nuclei fit the first tokens and others do not.
    sharpness_R1 = torch.tensor([[20.0], [6.0], [2.0], [0.3]])
    logits_RV = sharpness_R1 * torch.randn(4, 300, generator=generator)
    probs_RV = logits_RV.softmax(-1)
    kept_RV = nucleus(probs_RV, top_p, num_first)
    assert torch.equal(kept_RV, slow_nucleus(probs_RV, top_p))
    assert len(set(kept_RV.sum(-1).tolist())) > 1 or top_p == 0.01


def test_masked_tokens_stay_out_and_one_token_always_stays() -> None:
    probs_RV = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.5, 0.3]])
    assert nucleus(probs_RV, 1e-9).tolist() == [[False, True, False], [False, True, False]]
