"""Chooses the work of `auto` in the next pass: drafts and blocks that the policy finds worth their time.

Drafts have several sources: blocks of the view (fresh and stale proposals), copies of the tokens that followed an
earlier occurrence of the last tokens, and tokens that a grammar forces. Copies and forced tokens need no draft pass.
"""

from dataclasses import replace
from itertools import accumulate
from math import exp

from orthrus.decoding.compete import num_winners
from orthrus.decoding.copies import NO_COPY, Copy
from orthrus.decoding.cost_table import joint_guesses
from orthrus.decoding.policy import Left, Policy
from orthrus.decoding.tree import EMPTY_TREE, DraftTree, with_chain
from orthrus.engine.parts import block_rows, deepest_draft, draft_tree, draft_work, may_draft, verify_work
from orthrus.engine.request import Request, Work
from orthrus.model.dual_view import DualView
from orthrus.types import CycleKind

FORCED = 1 << 20
"""Match length of tokens that a grammar forces: they are certain to be accepted."""
MOST_COPIED = 12
"""The largest number of tokens of a copy."""


def adaptive_work(request: Request, dual: DualView) -> Work:
    """The work of a cycle's first pass."""
    policy = request.policy
    assert policy is not None
    copy = copied(request)
    request.block_size = policy.block_size
    chain = _likely_chain(request, policy, copy)
    is_due = request.drafts is None or (request.stale and not policy.keeps_stale())
    # If verifying the copy yields more tokens per millisecond than drafting, no draft pass is made.
    spares = is_due and policy.chain_rate(list(accumulate(map(exp, chain.log_probs)))) > policy.rate()
    if is_due and not spares:
        draft = _wanted_draft(request, dual, copy)
        if draft is not None:
            return draft
    work = None
    if request.drafts is not None:
        work = adaptive_verify(request, dual, copy, trying=False)
    elif chain.num_nodes:
        work = _copy_work(request, dual, copy, chain.first(policy.max_nodes))
        work = replace(work, spares_draft=spares)
    return work or verify_work(request, dual, "ar", EMPTY_TREE, [], copy=copy)


def _wanted_draft(request: Request, dual: DualView, copy: Copy) -> Work | None:
    """A draft pass if it is possible and the policy wants it. Otherwise the policy counts a pass without drafting."""
    policy = request.policy
    assert policy is not None
    if may_draft(request, dual, floor=True) and policy.wants_draft():
        return draft_work(request, dual, "tree", copy)
    return None


def _copy_work(request: Request, dual: DualView, copy: Copy, chain: DraftTree) -> Work:
    """A verification of `chain`, the first tokens of a copy. Without tokens it is a plain pass."""
    kind: CycleKind = "tree" if chain.num_nodes or request.step is not None else "ar"
    return verify_work(request, dual, kind, chain, [], is_view=[False] * chain.num_nodes, copy=copy)


def compete(chosen: list[tuple[Request, Work]], dual: DualView) -> list[tuple[Request, Work]]:
    """The same work, with copies shortened.

    Of each copy that is verified alone, only the tokens remain that pay for their rows, given all other rows of the
    pass. Each request chose without knowing the others, but only the whole pass determines the cost of a row.
    """
    copies = [i for i, (_, work) in enumerate(chosen) if work.is_copy]
    if not copies:
        return chosen
    # The policy of a request whose prompt is being fed does not know its company yet.
    policies = [r.policy for r, work in chosen if r.policy is not None and work.kind != "prefill"]
    prices = policies[0].costs
    num_ar = sum(work.part.num_ar - (work.tree.num_nodes if work.is_copy else 0) for _, work in chosen)
    num_block = sum(work.part.num_rows - work.part.num_ar for _, work in chosen)
    num_guesses = sum(len(work.block_rows) * work.num_guesses for _, work in chosen)
    num_guesses = joint_guesses(num_guesses, own_head=dual.draft_head is not None)
    without_ms = prices(num_ar, num_block, num_guesses)
    won = num_winners(
        [list(map(exp, chosen[i][1].tree.log_probs)) for i in copies],
        lambda num: prices(num_ar + num, num_block, num_guesses) - without_ms,
        sum(policy.rate() for policy in policies) / len(policies),
    )
    after = list(chosen)
    for i, num_nodes in zip(copies, won, strict=True):
        request, work = chosen[i]
        if num_nodes < work.tree.num_nodes:
            after[i] = request, _cut(request, dual, work, num_nodes)
    return after


def _cut(request: Request, dual: DualView, work: Work, num_nodes: int) -> Work:
    """The first tokens of a copy. If none is left, the draft pass is made that the copy had replaced."""
    if not num_nodes and work.spares_draft:
        draft = _wanted_draft(request, dual, work.copy)
        if draft is not None and request.slots.reserve(request.slots.length + draft.part.num_rows):
            return draft
    return _copy_work(request, dual, work.copy, work.tree.first(num_nodes))


def adaptive_verify(request: Request, dual: DualView, copy: Copy, *, trying: bool) -> Work | None:
    """Verify those drafts that are worth their rows, with blocks. None if no draft is.

    trying: a draft pass was made for them, possibly as a trial.
    """
    policy = request.policy
    assert policy is not None and request.drafts is not None
    drafts = draft_tree(request, policy.max_nodes, request.room - 1, branching=True)
    num_nodes = policy.num_nodes(
        drafts.log_probs, drafts.depths(), len(request.drafts), stale=request.stale, trying=trying
    )
    drafts = drafts.first(num_nodes)
    is_view, has_view = [True] * drafts.num_nodes, drafts.num_nodes > 0
    if copy.token_ids:
        drafts, is_view = with_chain(drafts, copy.token_ids, _log_probs(request, copy))
        num_nodes = policy.worth(drafts.log_probs, is_view, stale=request.stale)
        drafts, is_view = drafts.first(num_nodes), is_view[:num_nodes]
        has_view = any(is_view)
    if not drafts.num_nodes:
        return None
    rows: list[int] = []
    if has_view:
        num_blocks = policy.num_blocks(drafts.num_nodes, drafts.end_probs())
        rows = block_rows(drafts, num_blocks, request.room - 3, at_root=policy.keeps_stale())
    request.block_size = policy.block_size
    kind = "fused_tree" if rows else "tree"
    return verify_work(request, dual, kind, drafts, rows, is_view=is_view, copy=copy)  # type: ignore[arg-type]


def observe(request: Request, work: Work) -> None:
    """Let the policy learn from a verification: the acceptance of the view's drafts, and the end of the path."""
    policy, step = request.policy, request.step
    assert policy is not None and step is not None
    if not any(work.is_view):
        return
    ends = work.tree.end_probs()
    left: Left = "none" if request.drafts is None else "stale" if request.stale else "fresh"
    log_probs = [p for p, is_view in zip(work.tree.log_probs, work.is_view, strict=True) if is_view]
    num_accepted = sum(step.is_draft) - step.num_copied
    policy.observe(
        log_probs, num_accepted, [ends[row] for row in work.block_rows], stale=work.stale, left=left
    )


def copied(request: Request) -> Copy:
    """The tokens that the grammar forces next, or else those that followed an earlier occurrence of the last tokens."""
    deepest = deepest_draft(request)
    if deepest < 1:
        return NO_COPY
    if request.grammar is not None and request.policy is not None:
        # More are never verified in a pass, and each takes time.
        forced = request.grammar.forced(min(deepest, request.policy.max_nodes))
        if forced:
            return Copy(tuple(forced), FORCED)
    if request.copies is None:
        return NO_COPY
    copy = request.copies.continuation(min(deepest, MOST_COPIED))
    if request.grammar is None or not copy.token_ids:
        return copy
    chain = range(len(copy.token_ids))
    _, allowed = request.grammar.masks_for_paths(chain, copy.token_ids)
    num_allowed = next((i for i, fits in enumerate(allowed) if not fits), len(allowed))
    return Copy(copy.token_ids[:num_allowed], copy.match_length)


def observe_copy(request: Request, copy: Copy, token_ids: list[int]) -> None:
    """Compare a copy, verified or not, with the tokens that were committed, and record how many were accepted."""
    if copy.token_ids and copy.match_length != FORCED:
        pairs = zip(copy.token_ids, token_ids, strict=False)
        num_accepted = next(
            (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs),
            min(len(copy.token_ids), len(token_ids)),
        )
        num_judged = min(len(copy.token_ids), len(token_ids))
        request.copy_promise.observe(copy.match_length, num_accepted, num_judged)
    if request.copies is not None:
        request.copies.extend(token_ids)


def _likely_chain(request: Request, policy: Policy, copy: Copy) -> DraftTree:
    """A copy as a chain of drafts. Empty if it cannot be worth its rows, as in most passes of many requests."""
    if not copy.token_ids:
        return EMPTY_TREE
    if copy.match_length != FORCED:
        chance = request.copy_promise.chance(copy.match_length, 1)
        if chance < policy.least_chance(MOST_COPIED):
            return EMPTY_TREE
    ids = list(copy.token_ids)
    return DraftTree(ids, list(range(len(ids))), list(accumulate(_log_probs(request, copy))))


def _log_probs(request: Request, copy: Copy) -> list[float]:
    if copy.match_length == FORCED:
        return [0.0] * len(copy.token_ids)
    return request.copy_promise.log_probs(copy)
