"""Drafts of a block that stands further back on the accepted path, against that block drafted by itself."""

import pytest
import torch
from tests.engines import decode, engine_for
from tests.rows import Rows
from tests.tiny import tiny_dual, tiny_prompt

from orthrus.config import DecodeConfig
from orthrus.decoding.pairs import given_the_prefix
from orthrus.decoding.tree import DraftTree
from orthrus.engine.choices import Guessed, rank
from orthrus.engine.request import Request, Work
from orthrus.model.dual_view import DualView
from orthrus.model.passes import block, tree
from orthrus.model.quantise import quantise_drafts

SIZE = 6
PROMPT = tiny_prompt(9)


def view(kind: str, trained: int = SIZE) -> DualView:
    """Plain; with a repair head, which reads the hidden states too; with a head of its own for drafts."""
    repair_rank = 4 if kind == "repair" else None
    dual = tiny_dual("llama", disturb=0.3, block_size=trained, repair_rank=repair_rank)
    if dual.repair is not None:
        with torch.no_grad():
            dual.repair.out.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    if kind == "own head":
        quantise_drafts(dual, "int8")
    return dual


def verified(dual: DualView, drafts: DraftTree, block_rows: list[int]) -> Request:
    """A request whose first pass after the prompt verifies these drafts, beside these blocks."""
    engine = engine_for(dual)
    config = DecodeConfig(strategy="fused_tree", block_size=SIZE)
    request = engine.submit(PROMPT, config, eos_token_ids=frozenset())
    engine.step()
    ids = [request.anchor_id, *drafts.token_ids]
    part = tree(ids, drafts.parents, block_rows, SIZE, dual.mask_token_id)
    request.next_work = Work(
        "fused_tree",
        part,
        drafts,
        tuple(block_rows),
        SIZE,
        dual.config.num_guesses(SIZE),
        is_view=(True,) * drafts.num_nodes,
    )
    engine.step()
    return request


def the_models_own(num_tokens: int) -> list[int]:
    """What the AR view writes after the prompt, one token a pass."""
    config = DecodeConfig(max_new_tokens=num_tokens, strategy="ar")
    return list(decode(tiny_dual("llama", disturb=0.3), PROMPT, config).token_ids)


@pytest.mark.parametrize("kind", ["plain", "repair", "own head"])
@pytest.mark.parametrize("num_accepted", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("block_row", [0, 1, 2])
@pytest.mark.parametrize("trained", [SIZE, SIZE + 2], ids=["whole", "shorter"])
def test_what_the_nearest_block_on_the_path_guessed_beyond_its_end(
    kind: str, num_accepted: int, block_row: int, trained: int
) -> None:
    dual = view(kind, trained)
    own = the_models_own(8)
    drafts = own[1:5]
    if num_accepted < 4:
        drafts[num_accepted] = (drafts[num_accepted] + 1) % 60
    # The last node, with a block of its own, is on no path that is accepted.
    nodes = DraftTree([*drafts, (own[1] + 2) % 60], [0, 1, 2, 3, 0], [-0.1] * 5)
    request = verified(dual, nodes, [block_row, 5])
    done = request.cycles[-1]
    assert done.num_accepted == num_accepted
    assert list(done.token_ids) == own[1 : num_accepted + 2]
    # Of the block's guesses the pass has decided the first ones; the last row of a whole block has none.
    num_rows = SIZE if trained > SIZE else SIZE - 1
    num_known = num_accepted - block_row + 1
    if block_row > num_accepted or num_known >= num_rows:
        assert request.drafts is None
        return
    assert request.drafts is not None
    assert len(request.drafts) == num_rows - num_known
    assert request.stale == (num_known > 1)

    oracle = Rows(dual)
    oracle.feed(PROMPT + own[:block_row])
    with torch.inference_mode():
        alone = block(own[block_row], SIZE, dual.mask_token_id)
        rows_DC = oracle.hidden(alone)[num_known:num_rows]
        logits_DV = dual.head(rows_DC, drafts=True)
        guessed = [Guessed(request, slice(0, len(rows_DC)), 0)]
        (expected,) = rank(oracle.runner, rows_DC, logits_DV, guessed)
        top = logits_DV.log_softmax(-1).topk(8)
    if kind != "repair":
        assert expected.token_ids_DC == top.indices.tolist()
    # Rounding to int8 hangs on the last bits, which another shape of pass changes.
    tolerance = 0.1 if kind == "own head" else 1e-4
    ours, theirs = (torch.tensor(drafts.log_probs_DC) for drafts in (request.drafts, expected))
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    if kind != "own head":
        assert request.drafts.token_ids_DC == expected.token_ids_DC
    if kind == "plain":
        expected_DC = torch.cat([top.values[:1], given_the_prefix(top.values[1:])])
        torch.testing.assert_close(ours, expected_DC, atol=1e-4, rtol=1e-4)
    if kind == "repair" and len(rows_DC) > 1:
        pairs = (torch.tensor((drafts.pairs_DPC or [])[1:]) for drafts in (request.drafts, expected))
        torch.testing.assert_close(*pairs, atol=1e-4, rtol=1e-4)


def test_of_two_blocks_on_the_path_the_nearer_one_counts() -> None:
    dual, own = view("plain"), the_models_own(8)
    nodes = DraftTree([*own[1:4], 3], [0, 1, 2, 0], [-0.1] * 4)
    for blocks, num_left, stale in (
        ([0, 3, 4], SIZE - 2, False),
        ([0, 2, 4], SIZE - 3, True),
        ([0, 4], SIZE - 5, True),
    ):
        request = verified(dual, nodes, blocks)
        assert request.cycles[-1].num_accepted == 3
        assert request.drafts is not None
        assert (len(request.drafts), request.stale) == (num_left, stale)
