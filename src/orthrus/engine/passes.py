"""The passes of a running request: each commits what the AR view decides, and may leave a draft behind."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from orthrus.decoding.acceptance import TreeOnDevice
from orthrus.decoding.cost_table import joint_guesses
from orthrus.decoding.tree import EMPTY_TREE, Candidates, DraftTree, accepted_rows
from orthrus.engine.state import DecodeState
from orthrus.model.passes import draft_block, fused, prefill, verify_tree


class Block(NamedTuple):
    """A diffusion block to be drafted beside the verification, anchored at a row (0: the anchor, i: node
    i - 1)."""

    row: int


class Committed(NamedTuple):
    """Tokens that a pass decided: accepted drafts, then one of the AR view's own; and the rows it took."""

    token_ids: list[int]
    num_accepted: int
    num_rows: int


@torch.inference_mode()
def prefill_pass(state: DecodeState, token_ids: list[int], *, last: bool) -> Committed:
    """Feed a chunk of the prompt; the last one decides the first token."""
    state.rules.see_prompt(token_ids)
    ids_1T = torch.tensor([token_ids], device=state.dual.device)
    logits_1RV = state.dual.run(prefill(ids_1T, state.cache.lengths, last=last), state.cache)
    state.cache.commit(len(token_ids))
    if not last:
        return Committed([], 0, len(token_ids))
    chosen = state.choose(logits_1RV[0], [state.length], [()])
    state.commit(chosen)
    return Committed(chosen, 0, len(token_ids))


@torch.inference_mode()
def commit_pass(state: DecodeState, tree: DraftTree = EMPTY_TREE, blocks: Sequence[Block] = ()) -> Committed:
    """The anchor and a tree of drafts as AR rows, and diffusion blocks beside them: one pass.

    Commits the longest path that the AR view would have written, and its own token after it. Of the blocks
    on that path, the one nearest to its end becomes `state.drafts`: what it guessed for tokens that the AR
    view has just decided is dropped, at least its first guess. Few guesses (`joint_guesses`) share the
    product with the head that the AR rows need; many wait until it is known which block serves. Where the
    host should read once only (`DecodeState.asks_once`), the device knows it first.
    """
    length, num_ar = state.length, 1 + tree.num_nodes
    ids_1T = torch.tensor([[state.anchor_id, *tree.token_ids]], device=state.dual.device)
    depths = [0, *tree.depths()]
    size = min(state.block_size, state.context_length - length - max(depths))
    num_guesses = state.dual.config.num_guesses(size)
    blocks = blocks if num_guesses > 0 else ()
    rows = [block.row for block in blocks]
    sent = TreeOnDevice(tree, rows, state.dual.device) if blocks and state.asks_once else None
    if blocks:
        p = fused(ids_1T, tree.parents, state.cache.lengths, rows, size, state.dual.mask_token_id)
    else:
        p = verify_tree(ids_1T, tree.parents, state.cache.lengths)
    # What a block's first row guesses the AR view decides.
    guesses = [num_ar + i * size + j for i in range(len(blocks)) for j in range(1, 1 + num_guesses)]
    joint = joint_guesses(len(guesses), own_head=state.dual.draft_head is not None) > 0
    if joint:
        rows_R = torch.tensor([*range(num_ar), *guesses], device=state.dual.device)
        p = replace(p, logit_rows_R=rows_R)
    hidden_TC = state.dual.hidden(p, state.cache)[0]

    logits_RV = state.dual.head(hidden_TC[p.logit_rows_R] if joint else hidden_TC[:num_ar])
    ahead: Candidates | None = None
    if sent is not None:
        shape = len(blocks), num_guesses
        hidden_BDC = hidden_TC[num_ar:].unflatten(0, (-1, size))[:, 1 : 1 + num_guesses]
        logits_BDV = logits_RV[num_ar:].unflatten(0, shape) if joint else None
        own_ids, ahead = state.choose_and_propose(logits_RV[:num_ar], sent, hidden_BDC, logits_BDV)
    else:
        own_ids = state.choose(logits_RV[:num_ar], [length + d + 1 for d in depths], tree.paths_of_tokens())
    path, token_ids = commit_path(state, tree, own_ids)
    last = path[-1] if path else 0
    state.drafts = None if state.drafts is None else state.drafts.after(token_ids)
    state.late = state.drafts is not None
    on_path = [index for index, block in enumerate(blocks) if block.row in (0, *path)]
    if on_path:
        index = max(on_path, key=lambda i: depths[blocks[i].row])
        num_known = depths[last] - depths[blocks[index].row] + 1
        if num_known <= num_guesses:
            if ahead is None:
                first, end = index * num_guesses + num_known - 1, (index + 1) * num_guesses
                hidden_DC = hidden_TC[guesses[first] : guesses[end - 1] + 1]
                logits_DV = logits_RV[num_ar + first : num_ar + end] if joint else None
                ahead = state.propose(hidden_DC, state.length + 1, logits_DV)
            state.drafts, state.late = ahead, num_known > 1
    return Committed(token_ids, len(path), p.num_rows)


def commit_path(state: DecodeState, tree: DraftTree, own_ids: list[int]) -> tuple[list[int], list[int]]:
    """Commit the longest path of a tree that the AR view's own choices agree with, and one token after it.

    own_ids: after each row, the anchor's included. Returns the path's rows, and the tokens.
    """
    path = accepted_rows(tree, own_ids)
    token_ids = [*(tree.token_ids[row - 1] for row in path), own_ids[path[-1] if path else 0]]
    length = state.length
    state.cache.compact([length + row for row in (0, *path)])
    state.commit(token_ids)
    return path, token_ids


@torch.inference_mode()
def draft_pass(state: DecodeState) -> int:
    """The paper's draft: a block and no AR row, so nothing is committed. Returns the rows it took."""
    size = min(state.block_size, state.context_length - state.length)
    anchor_11 = torch.tensor([[state.anchor_id]], device=state.dual.device)
    num_drafts = 1 + state.dual.config.num_guesses(size)
    mask_token_id = state.dual.mask_token_id
    p = draft_block(anchor_11, state.cache.lengths, size, mask_token_id, floor=False, num_drafts=num_drafts)
    hidden_TC = state.dual.hidden(p, state.cache)[0]
    state.drafts, state.late = state.propose(hidden_TC[p.logit_rows_R], state.length + 1), False
    return p.num_rows
