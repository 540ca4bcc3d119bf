"""The cycles: each runs its passes, commits tokens to the cache, and copies to the host once."""

import torch

from orthrus.decoding.sampling import filtered_probs, greedy_tokens
from orthrus.decoding.verify import verify_greedy, verify_rejection
from orthrus.engine.state import DecodeState, Step
from orthrus.model.passes import ar_step, draft_block, prefill, verify_chain


@torch.inference_mode()
def prefill_chunk(state: DecodeState, token_ids: list[int], *, last: bool) -> Step:
    """Feed a chunk of the prompt; the last one decides the first token."""
    ids_1T = torch.tensor([token_ids], device=state.dual.device)
    logits_1RV = state.dual.run(prefill(ids_1T, state.cache.lengths, last=last), state.cache)
    state.cache.commit(len(token_ids))
    if not last:
        return Step("prefill", [], [], 0, 1)
    ids_1, _ = state.choose(logits_1RV[0])
    state.anchor_11 = ids_1[None]
    return Step("prefill", ids_1.tolist(), [False], 0, 1)


@torch.inference_mode()
def ar_cycle(state: DecodeState) -> Step:
    """Plain decoding: one pass, one token."""
    logits_1RV = state.dual.run(ar_step(state.anchor_11, state.cache.lengths), state.cache)
    state.cache.commit(1)
    ids_1, _ = state.choose(logits_1RV[0])
    state.anchor_11 = ids_1[None]
    return Step("ar", ids_1.tolist(), [False], 0, 1)


def chain_cycle(state: DecodeState, room: int) -> Step:
    """Draft a block, verify it, keep the longest correct prefix and one token of the AR view's own.

    `room` is the number of tokens that may still be committed: drafts beyond it are not verified, and where
    none would be left the cycle is an `ar` one. With `state.floor` the draft pass decides
    the next token by an AR row. Source: arXiv 2605.12825, section 3.
    """
    num_ar = int(state.floor)
    length = state.cache.lengths[0]
    block_size = min(state.block_size, state.context_length - length)
    num_drafts = min(block_size - 1 - num_ar, room - 1 - num_ar)
    if num_drafts < 1:
        return ar_cycle(state)
    return _chain_cycle(state, block_size, num_drafts)


@torch.inference_mode()
def _chain_cycle(state: DecodeState, block_size: int, num_drafts: int) -> Step:
    dual, cache, num_ar = state.dual, state.cache, int(state.floor)
    draft = draft_block(
        state.anchor_11,
        cache.lengths,
        block_size,
        dual.mask_token_id,
        floor=state.floor,
        num_drafts=num_drafts,
    )
    logits_RV = dual.run(draft, cache)[0]
    head_ids_1 = state.anchor_11[0]
    if state.floor:
        cache.commit(1)
        head_ids_1, _ = state.choose(logits_RV[:1])
    draft_ids_K, draft_probs_KV = state.choose(logits_RV[num_ar:])

    rows_1T = torch.cat([head_ids_1, draft_ids_K])[None]
    logits_RV = dual.run(verify_chain(rows_1T, cache.lengths), cache)[0]
    if draft_probs_KV is None:
        verdict = verify_greedy(draft_ids_K, greedy_tokens(logits_RV))
    else:
        ar_probs_RV = filtered_probs(logits_RV, state.sampling)
        verdict = verify_rejection(draft_ids_K, draft_probs_KV, ar_probs_RV, state.generator)

    state.anchor_11 = verdict.next_token[None, None]
    # The one host copy of the cycle.
    num_accepted, next_token, head_id, *draft_ids = torch.cat(
        [verdict.num_accepted[None], verdict.next_token[None], head_ids_1, draft_ids_K]
    ).tolist()
    cache.commit(1 + num_accepted)
    return Step(
        "chain",
        [head_id] * num_ar + draft_ids[:num_accepted] + [next_token],
        [False] * num_ar + [True] * num_accepted + [False],
        num_drafted=num_drafts,
        num_passes=2,
    )
