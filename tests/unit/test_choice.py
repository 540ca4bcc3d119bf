"""The quick argmax and the race against their definitions."""

import pytest
import torch
from torch import Tensor

from orthrus.decoding.sampling import coupled_log_scores, draw_with_noise, greedy_tokens


def slow_argmax(scores_RV: Tensor) -> list[int]:
    return [row.index(max(row)) for row in scores_RV.float().tolist()]


# Whole chunks, chunks of another size, none that divides; one chunk alone.
@pytest.mark.parametrize("vocab_size", [1024, 4848, 1021, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_id(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    # Few values, so that nearly every row has several largest ones, in one chunk and in several.
    coarse_RV = torch.randint(0, 40, (40, vocab_size), generator=generator).to(dtype)
    fine_RV = torch.randn(40, vocab_size, generator=generator).to(dtype)
    banned_RV = fine_RV.masked_fill(torch.rand(40, vocab_size, generator=generator) < 0.9, -torch.inf)
    for scores_RV in (coarse_RV, fine_RV, banned_RV):
        assert greedy_tokens(scores_RV).tolist() == slow_argmax(scores_RV)
    largest_R1 = coarse_RV.amax(-1, keepdim=True)
    assert ((coarse_RV == largest_R1).sum(-1) > 1).any()


def test_a_row_of_nothing_but_minus_infinity() -> None:
    assert greedy_tokens(torch.full((2, 512), -torch.inf)).tolist() == [0, 0]


def test_rows_of_noise_draw_as_one_tensor_of_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    probs_RV = torch.rand(6, 500, generator=generator)
    noise_UV = torch.rand(2, 500, generator=generator) + 1e-6
    of_row = [0, 1, 1, 0, 1, 0]
    rows = [noise_UV[i] for i in of_row]
    assert torch.equal(draw_with_noise(probs_RV, rows), (probs_RV / noise_UV[of_row]).argmax(-1))
    assert torch.equal(coupled_log_scores(probs_RV, rows), (probs_RV / noise_UV[of_row]).log())
