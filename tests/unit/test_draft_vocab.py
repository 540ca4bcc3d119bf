"""A draft vocabulary: fewer guesses to choose from, the same text."""

import pytest
import torch
from tests.tiny import VOCAB, tiny_dual, tiny_prompt
from tests.tiny_orthrus import tiny_orthrus
from tests.ways import EVERY_DRAFTING_WAY

from orthrus.api import decode_config
from orthrus.config import Strategy
from orthrus.errors import UserInputError
from orthrus.kernels.build import load_kernels
from orthrus.kernels.linear import fast_linear
from orthrus.model.draft_vocab import limit_drafts, single_characters
from orthrus.model.quantise import quantise, quantise_drafts

NUM = 30


@EVERY_DRAFTING_WAY
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_stays_and_drafts_are_of_the_vocabulary(
    strategy: Strategy, floor: bool, temperature: float
) -> None:
    config = decode_config(
        strategy=strategy, floor=floor, max_new_tokens=60, ignore_eos=True, temperature=temperature, seed=3
    )
    orthrus = tiny_orthrus()
    every = orthrus.stream_ids(tiny_prompt(9), config).drain()
    limit_drafts(orthrus.dual, NUM, frozenset({VOCAB - 2}))
    some = orthrus.stream_ids(tiny_prompt(9), config).drain()
    assert some.token_ids == every.token_ids
    accepted = {
        token_id
        for cycle in some.cycles
        for token_id, is_draft in zip(cycle.token_ids, cycle.is_draft, strict=True)
        if is_draft
    }
    assert accepted
    assert accepted <= {*range(NUM), VOCAB - 2}
    # Some of the text is of other ids, so the limit was felt.
    assert not set(some.token_ids) <= {*range(NUM), VOCAB - 2}


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
@pytest.mark.parametrize("quantised", [None, quantise, quantise_drafts], ids=["plain", "int8", "int8 drafts"])
@pytest.mark.parametrize("packed", [False, True], ids=["stock", "packed"])
@torch.inference_mode()
def test_it_is_the_head_without_the_other_ids(name: str, quantised: object, packed: bool) -> None:
    dual = tiny_dual(name)
    if callable(quantised):
        quantised(dual, "int8")
    whole_RV = dual.head(torch.ones(3, 32).cumsum(0), drafts=True)
    limit_drafts(dual, NUM, frozenset({VOCAB - 2, VOCAB + 5}))
    if packed:
        load_kernels()
        assert dual.draft_head is not None
        dual.draft_head = fast_linear([dual.draft_head])
    some_RV = dual.head(torch.ones(3, 32).cumsum(0), drafts=True)
    kept = [*range(NUM), VOCAB - 2]
    torch.testing.assert_close(some_RV[:, kept], whole_RV[:, kept], atol=1e-5, rtol=1e-5)
    left_out = sorted(set(range(VOCAB)) - set(kept))
    assert (some_RV[:, left_out] == -torch.inf).all()
    # What the AR view chooses from is whole.
    assert dual.head(torch.ones(3, 32)).isfinite().all()


@pytest.mark.parametrize("num_ids", [0, 15, VOCAB])
def test_numbers_that_make_no_sense(num_ids: int) -> None:
    with pytest.raises(UserInputError, match=f"between 16 and {VOCAB - 1}"):
        limit_drafts(tiny_dual(), num_ids)


def test_a_head_of_its_own_kind() -> None:
    dual = tiny_dual()
    dual.base.set_output_embeddings(torch.nn.Sequential(dual.base.get_output_embeddings()))
    with pytest.raises(UserInputError, match="leave out draft_vocab"):
        limit_drafts(dual, NUM)


def test_single_characters_are_found_wherever_they_stand() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"the": 0, "\u2581the": 1, "\u2581": 50, ",": 51, "\u0120a": 52, "\u4e2d": 53, "ab": 54}

    assert single_characters(Tokenizer()) == {50, 51, 52}  # type: ignore[arg-type]
