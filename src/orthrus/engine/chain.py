"""The two passes of a chain cycle where the host reads once: the device puts the chain into the second."""

from dataclasses import replace

import torch

from orthrus.decoding.cost_table import joint_guesses
from orthrus.decoding.tree import DraftTree
from orthrus.kernels.best import first_best
from orthrus.engine.passes import Committed, commit_path
from orthrus.engine.state import DecodeState
from orthrus.model.passes import fused, verify_tree


@torch.inference_mode()
def chain_passes(state: DecodeState, most_nodes: int) -> tuple[Committed, Committed, int]:
    """Draft from a block beside the anchor's AR row, and verify the walk through its candidates.

    The same passes, drafts and tokens as `commit_pass` twice, where `DecodeState.asks_once`; but where the
    first pass ends the text the second has been made in vain, and commits and counts nothing.
    What the device needs to know is sent before the first pass is launched, since sending waits for what
    runs there. Returns what each pass committed, and how many drafts (`most_nodes` at most) were verified.
    """
    dual, cache, length, device = state.dual, state.cache, state.length, state.dual.device
    size = min(state.block_size, state.context_length - length)
    num_guesses = dual.config.num_guesses(size)
    num_nodes = min(most_nodes, num_guesses)
    anchor_11 = torch.tensor([[state.anchor_id]], device=device)
    draft = fused(anchor_11, [], cache.lengths, [0], size, dual.mask_token_id)
    unknown_1T = torch.zeros(1, 1 + num_nodes, dtype=torch.long, device=device)
    verify = verify_tree(unknown_1T, range(num_nodes), [length + 1])

    hidden_TC = dual.hidden(draft, cache)[0]
    # What the block's first row guesses the AR row decides.
    own_1C, guesses_DC = hidden_TC[:1], hidden_TC[2 : 2 + num_guesses]
    if joint_guesses(num_guesses, own_head=dual.draft_head is not None):
        logits_RV = dual.head(torch.cat([own_1C, guesses_DC]))
        chain_T = state.choose_and_walk(logits_RV[:1], guesses_DC, logits_RV[1:])
    else:
        chain_T = state.choose_and_walk(dual.head(own_1C), guesses_DC, None)
    chain_T = chain_T[: 1 + num_nodes]
    cache.compact([length])
    own_T = first_best(dual.head(dual.hidden(replace(verify, token_ids_BT=chain_T[None]), cache)[0]))
    (first_id, *drafted), own_ids = torch.stack([chain_T, own_T]).tolist()

    state.commit([first_id])
    if first_id in state.eos_token_ids:
        return Committed([first_id], 0, draft.num_rows), Committed([], 0, verify.num_rows), 0
    chain = DraftTree(drafted, list(range(num_nodes)), [0.0] * num_nodes)
    path, token_ids = commit_path(state, chain, own_ids)
    first = Committed([first_id], 0, draft.num_rows)
    return first, Committed(token_ids, len(path), verify.num_rows), num_nodes
