"""Log probs against float64, one row at a time."""

import json
import math

import pytest
import torch

from orthrus.decoding.logprobs import LEAST_LOGPROB, token_logprobs
from orthrus.types import TokenLogprob


def slowly(logits: list[float], token_id: int, num_top: int) -> TokenLogprob:
    largest = max(logits)
    total = math.log(math.fsum(math.exp(x - largest) for x in logits)) + largest
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:num_top]
    return TokenLogprob(token_id, logits[token_id] - total, tuple((i, logits[i] - total) for i in order))


@pytest.mark.parametrize("num_top", [0, 1, 5, 20, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_the_softmax(num_top: int, dtype: torch.dtype) -> None:
    """Coarse logits, so that many are equal: of these the lowest ids come first."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = (torch.randint(-9, 9, (40, 33), generator=generator) / 4).to(dtype)
    token_ids = torch.randint(33, (40,), generator=generator).tolist()
    for row, token_id, found in zip(
        logits_RV, token_ids, token_logprobs(logits_RV, token_ids, num_top), strict=True
    ):
        expected = slowly(row.tolist(), token_id, num_top)
        assert found.token_id == token_id
        assert found.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [i for i, _ in found.top] == [i for i, _ in expected.top]
        assert [v for _, v in found.top] == pytest.approx([v for _, v in expected.top], abs=1e-5)
        assert dict(found.top).get(token_id, found.logprob) == found.logprob


@pytest.mark.parametrize("vocab_size", [61, 1024, 49_153])
def test_a_row_has_the_same_bits_in_any_company(vocab_size: int) -> None:
    logits_RV = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(1)) * 4
    together = token_logprobs(logits_RV, list(range(9)), 7)
    assert together == [token_logprobs(row_V[None], [i], 7)[0] for i, row_V in enumerate(logits_RV)]
    assert together[3:6] == token_logprobs(logits_RV[3:6], [3, 4, 5], 7)


def test_values_that_are_no_numbers_stay_out_of_json() -> None:
    inf, nan = math.inf, math.nan
    logits_RV = torch.tensor([[0.0, -inf, 0.0], [nan, 1.0, -inf], [-inf, -inf, -inf], [inf, 0.0, inf]])
    found = token_logprobs(logits_RV, [1, 0, 2, 0], 3)
    for entry in found:
        json.dumps([entry.logprob, entry.top], allow_nan=False)
    assert [entry.logprob for entry in found[:3]] == [LEAST_LOGPROB] * 3
    assert found[1].top == ((1, 0.0), (0, LEAST_LOGPROB), (2, LEAST_LOGPROB))
    assert [i for i, _ in found[2].top] == [0, 1, 2]
    assert found[3].logprob == pytest.approx(math.log(0.5))


def test_no_rows_and_few_tokens() -> None:
    assert token_logprobs(torch.empty(0, 5), [], 3) == []
    assert len(token_logprobs(torch.zeros(1, 2), [0], 20)[0].top) == 2
