"""Drafts of a block that stands further back on the accepted path, against that block drafted by itself."""

import pytest
import torch
from tests.tiny import tiny_dual, tiny_prompt

from orthrus.config import SamplingParams
from orthrus.decoding.pairs import given_the_prefix
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.tree import EMPTY_TREE, DraftTree
from orthrus.engine.passes import Block, commit_pass, prefill_pass
from orthrus.engine.state import DecodeState
from orthrus.model.dual_view import DualView
from orthrus.model.passes import draft_block

SIZE = 6


def state_after(dual: DualView, prompt: list[int]) -> DecodeState:
    sampling = SamplingParams(temperature=0.0)
    state = DecodeState(
        dual=dual,
        cache=dual.new_cache(96),
        sampling=sampling,
        seed=0,
        rules=LogitRules(sampling, 64, dual.device),
        block_size=SIZE,
        floor=True,
        context_length=96,
    )
    prefill_pass(state, prompt, last=True)
    return state


def the_models_own(num_tokens: int) -> list[int]:
    """What the AR view writes after the prompt, one token a pass."""
    state = state_after(tiny_dual("llama", disturb=0.3), tiny_prompt(9))
    token_ids = [state.anchor_id]
    while len(token_ids) < num_tokens:
        token_ids += commit_pass(state, EMPTY_TREE).token_ids
    return token_ids


@pytest.mark.parametrize("num_accepted", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("block_row", [0, 1, 2])
def test_what_the_nearest_block_on_the_path_guessed_beyond_its_end(num_accepted: int, block_row: int) -> None:
    dual, prompt = tiny_dual("llama", disturb=0.3), tiny_prompt(9)
    own = the_models_own(8)
    drafts = own[1:5]
    if num_accepted < 4:
        drafts[num_accepted] = (drafts[num_accepted] + 1) % 60
    tree = DraftTree(drafts, [0, 1, 2, 3], [-0.1] * 4)
    state = state_after(dual, prompt)
    done = commit_pass(state, tree, [Block(block_row)])
    assert done.num_accepted == num_accepted
    assert done.token_ids == own[1 : num_accepted + 2]
    # Guesses 1 .. SIZE - 1 of the block, of which the pass has decided the first ones.
    num_known = num_accepted - block_row + 1
    if block_row > num_accepted or num_known >= SIZE - 1:
        assert state.drafts is None
        return
    assert state.drafts is not None
    assert len(state.drafts) == SIZE - 1 - num_known
    assert state.late == (num_known > 1)

    oracle = state_after(dual, prompt)
    for _ in range(block_row):
        commit_pass(oracle, EMPTY_TREE)
    anchor_11 = torch.tensor([[own[block_row]]])
    with torch.inference_mode():
        alone = draft_block(anchor_11, oracle.cache.lengths, SIZE, dual.mask_token_id, floor=False)
        logits_DV = dual.run(alone, oracle.cache)[0][num_known:]
    top = logits_DV.log_softmax(-1).topk(8)
    assert state.drafts.token_ids_DC == top.indices.tolist()
    expected_DC = torch.cat([top.values[:1], given_the_prefix(top.values[1:])])
    torch.testing.assert_close(torch.tensor(state.drafts.log_probs_DC), expected_DC, atol=1e-4, rtol=1e-4)


def test_of_two_blocks_on_the_path_the_nearer_one_counts() -> None:
    dual, own = tiny_dual("llama", disturb=0.3), the_models_own(8)
    tree = DraftTree([*own[1:4], 3], [0, 1, 2, 0], [-0.1] * 4)
    for blocks, num_left, late in (
        ([Block(0), Block(3), Block(4)], SIZE - 2, False),
        ([Block(0), Block(2), Block(4)], SIZE - 3, True),
        ([Block(0), Block(4)], SIZE - 5, True),
    ):
        state = state_after(dual, tiny_prompt(9))
        assert commit_pass(state, tree, blocks).num_accepted == 3
        assert state.drafts is not None
        assert (len(state.drafts), state.late) == (num_left, late)
