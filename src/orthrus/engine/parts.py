"""Builds the work of a request in a pass: a chunk of its prompt, a draft pass, a verification."""

from math import inf

from orthrus.decoding.copies import NO_COPY, Copy
from orthrus.decoding.tree import EMPTY_TREE, DraftTree, best_first_tree, chain_tree, pruned
from orthrus.engine.request import Request, Work
from orthrus.model.dual_view import DualView
from orthrus.model.passes import block, causal, tree
from orthrus.types import CycleKind


def prompt_work(request: Request, num_tokens: int) -> Work:
    """At most so many next tokens of the prompt, or after a preemption, of all known tokens."""
    length = request.slots.length
    end = min(length + num_tokens, length + request.num_to_feed)
    is_last = end == length + request.num_to_feed
    decides = is_last and not request.token_ids
    num_rows = end - length
    part = causal(request.known(length, end), judged=range(num_rows - 1, num_rows) if decides else range(0))
    masks_QV = request.grammar.mask()[None] if decides and request.grammar is not None else None
    return Work("prefill", part, EMPTY_TREE, masks_QV=masks_QV, is_last=is_last)


def draft_work(request: Request, dual: DualView, kind: CycleKind, copy: Copy = NO_COPY) -> Work:
    """A draft pass: a block at the anchor. With the floor, the anchor is also an AR row."""
    request.drafts = None
    if request.config.floor or request.policy is not None:
        return verify_work(request, dual, kind, EMPTY_TREE, [0], copy=copy)
    size = min(request.block_size, request.context_length - request.slots.length)
    part = block(request.anchor_id, size, dual.mask_token_id)
    num_guesses = 1 + dual.config.num_guesses(size)
    return Work(kind, part, EMPTY_TREE, (0,), size, num_guesses, without_floor=True)


def verify_work(
    request: Request,
    dual: DualView,
    kind: CycleKind,
    drafts: DraftTree,
    rows: list[int],
    *,
    is_view: list[bool] | None = None,
    copy: Copy = NO_COPY,
) -> Work:
    """The anchor and a tree of drafts as AR rows, and diffusion blocks at some of them.

    is_view: for each node, whether the diffusion view proposed it; by default all of them.
    """
    deepest = max(drafts.depths(), default=0)
    size = min(request.block_size, request.context_length - request.slots.length - deepest)
    num_guesses = dual.config.num_guesses(size)
    rows = rows if num_guesses > 0 else []
    ids = [request.anchor_id, *drafts.token_ids]
    part = tree(ids, drafts.parents, rows, size, dual.mask_token_id)
    masks_QV = None
    if request.grammar is not None:
        masks_QV, _ = request.grammar.masks_for_paths(drafts.parents, drafts.token_ids)
    return Work(
        kind,
        part,
        drafts,
        tuple(rows),
        size,
        num_guesses,
        stale=request.stale and request.drafts is not None,
        is_view=tuple([True] * drafts.num_nodes if is_view is None else is_view),
        copy=copy,
        masks_QV=masks_QV,
    )


def draft_tree(request: Request, num_nodes: int, max_depth: int, *, branching: bool) -> DraftTree:
    """The view's drafts to verify. None is deeper than `max_depth`, and none breaks the grammar."""
    deepest = min(max_depth, deepest_draft(request))
    if request.drafts is None or not num_nodes or deepest < 1:
        return EMPTY_TREE
    drafts = request.drafts.first(deepest)
    found = best_first_tree(drafts, num_nodes) if branching else chain_tree(drafts, num_nodes)
    if request.grammar is None:
        return found
    _, allowed = request.grammar.masks_for_paths(found.parents, found.token_ids)
    return pruned(found, allowed)[0]


def deepest_draft(request: Request) -> int:
    """The largest depth of drafts at which a path and the token after it fit into the answer and the context."""
    return min(request.room - 1, request.context_length - request.slots.length - 2)


def block_rows(drafts: DraftTree, num_blocks: int, max_depth: int, *, at_root: bool) -> list[int]:
    """AR rows that get blocks: those where the path most probably ends, by the proposal's own probabilities.

    at_root: the first block is at the root, which is on every path, so that a proposal is left whichever drafts are
    accepted. Rows deeper than `max_depth` get none, because a path that ends there leaves no room for more drafts.
    """
    if num_blocks < 1:
        return []
    ends = drafts.end_probs()
    if at_root:
        ends[0] = inf
    rows = [row for row, depth in enumerate([0, *drafts.depths()]) if depth <= max_depth]
    return sorted(sorted(rows, key=lambda row: -ends[row])[:num_blocks])


def may_draft(request: Request, dual: DualView, floor: bool) -> bool:
    """Whether a draft pass, with or without the floor, can leave a draft to verify."""
    num_ar = int(floor)
    size = min(request.block_size, request.context_length - request.slots.length)
    return min(1 + dual.config.num_guesses(size), request.room - 1) - num_ar >= 1
