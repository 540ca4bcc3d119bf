"""The quick argmax and the race against their definitions."""

from dataclasses import replace

import pytest
import torch
from tests.engines import decode, engine_for
from tests.tiny import tiny_dual, tiny_prompt
from torch import Tensor

from orthrus.config import DecodeConfig, SamplingParams
from orthrus.decoding.sampling import coupled_log_scores, draw_with_noise, greedy_tokens
from orthrus.engine.choices import NO_TOKEN, Judged, choose
from orthrus.errors import UnsupportedModelError
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import EagerRunner


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_decides_nothing_has_no_token(temperature: float) -> None:
    dual = tiny_dual()
    engine = engine_for(dual)
    config = DecodeConfig(sampling=SamplingParams(temperature=temperature, seed=1))
    request = engine.submit(tiny_prompt(4), config, eos_token_ids=frozenset())
    logits_RV = torch.zeros(3, dual.vocab_size)
    logits_RV[:, 9] = 99.0
    logits_RV[1, 5], logits_RV[2, :] = torch.inf, torch.nan
    judged = Judged(request, slice(0, 3), [4, 5, 6], [[]] * 3)
    assert choose(logits_RV, [judged]) == [[9, NO_TOKEN, NO_TOKEN]]


class RejectedOverflows(EagerRunner):
    """A model whose last draft of a pass has no finite logits, like a token that overflows."""

    num_broken = 0

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        self.is_broken = p.num_rows == p.num_ar_rows and p.num_rows == 4
        return super().hidden(p, pool)

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        logits_RV = super().head(hidden_RC, drafts=drafts)
        if self.is_broken:
            self.num_broken += 1
            logits_RV[-1] = torch.nan
        return logits_RV


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rejected_draft_that_overflows_does_not_end_the_text(temperature: float) -> None:
    dual = tiny_dual(block_size=5, disturb=1.0)
    sampling = SamplingParams(temperature=temperature, seed=1)
    config = DecodeConfig(max_new_tokens=24, strategy="chain", sampling=sampling, logprobs=1)
    runner = RejectedOverflows(dual)
    found = decode(runner, tiny_prompt(6), config)
    assert runner.num_broken > 3
    assert found.token_ids == decode(dual, tiny_prompt(6), replace(config, strategy="ar")).token_ids


def test_the_error_of_an_accepted_row_is_told() -> None:
    dual = tiny_dual(block_size=5, disturb=0.0)
    with pytest.raises(UnsupportedModelError, match="logits became NaN or infinite"):
        decode(RejectedOverflows(dual), tiny_prompt(6), DecodeConfig(max_new_tokens=24, strategy="chain"))
