"""What `auto` wants of the next pass: whatever the policy finds worth its time.

Drafts come from several sources: the view's blocks, fresh and stale; copies of what followed the last tokens
where they stood before; tokens that a grammar forces. Copies and forced tokens cost no draft pass.
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
"""Match length of tokens that a grammar forces: they stand for certain."""
MOST_COPIED = 12
"""Tokens that are copied ahead at most."""


def adaptive_work(request: Request, dual: DualView) -> Work:
    """The first pass of a cycle."""
    policy = request.policy
    assert policy is not None
    copy = copied(request)
    request.block_size = policy.block_size
    chain = _likely_chain(request, policy, copy)
    is_due = request.drafts is None or (request.stale and not policy.keeps_stale())
    # A copy that makes more of its time than a draft would spares the draft pass.
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
    """A draft pass where one can be made and the policy wants it; else the policy counts a pass without."""
    policy = request.policy
    assert policy is not None
    if may_draft(request, dual, floor=True) and policy.wants_draft():
        return draft_work(request, dual, "tree", copy)
    return None


def _copy_work(request: Request, dual: DualView, copy: Copy, chain: DraftTree) -> Work:
    """A verification of the first tokens of a copy, which are in `chain`; of none of them a plain pass."""
    kind: CycleKind = "tree" if chain.num_nodes or request.step is not None else "ar"
    return verify_work(request, dual, kind, chain, [], is_view=[False] * chain.num_nodes, copy=copy)


def compete(chosen: list[tuple[Request, Work]], dual: DualView) -> list[tuple[Request, Work]]:
    """The same, but of copies that nothing else rides on only as many tokens as their rows are worth beside all others.

    Each request has offered what might pay; what a row costs only the whole pass tells.
    """
    copies = [i for i, (_, work) in enumerate(chosen) if work.is_copy]
    if not copies:
        return chosen
    # A request whose prompt is being fed has not been told its company.
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
    """Less of a copy. Where nothing is left of it, a draft has its turn, which the copy would have spared."""
    if not num_nodes and work.spares_draft:
        draft = _wanted_draft(request, dual, work.copy)
        if draft is not None and request.slots.reserve(request.slots.length + draft.part.num_rows):
            return draft
    return _copy_work(request, dual, work.copy, work.tree.first(num_nodes))


def adaptive_verify(request: Request, dual: DualView, copy: Copy, *, trying: bool) -> Work | None:
    """Of the drafts at hand, those that are worth their rows, with blocks; None where none is.

    trying: a draft pass was made for them, maybe as a chance only.
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
    """Let the policy learn from a verification: how the view's drafts fared, and where the path ended."""
    policy, step = request.policy, request.step
    assert policy is not None and step is not None
    if not any(work.is_view):
        return
    ends = work.tree.end_probs()
    left: Left = "none" if request.drafts is None else "stale" if request.stale else "fresh"
    log_probs = [p for p, is_view in zip(work.tree.log_probs, work.is_view, strict=True) if is_view]
    num_stood = sum(step.is_draft) - step.num_copied
    policy.observe(log_probs, num_stood, [ends[row] for row in work.block_rows], stale=work.stale, left=left)


def copied(request: Request) -> Copy:
    """What the grammar forces next, or else what followed the last tokens where they stood before."""
    deepest = deepest_draft(request)
    if deepest < 1:
        return NO_COPY
    if request.grammar is not None and (forced := request.grammar.forced(deepest)):
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
    """Take note of how a copy fared against the tokens that were committed in its place, verified or not."""
    if copy.token_ids and copy.match_length != FORCED:
        pairs = zip(copy.token_ids, token_ids, strict=False)
        num_stood = next(
            (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs),
            min(len(copy.token_ids), len(token_ids)),
        )
        num_judged = min(len(copy.token_ids), len(token_ids))
        request.copy_promise.observe(copy.match_length, num_stood, num_judged)
    if request.copies is not None:
        request.copies.extend(token_ids)


def _likely_chain(request: Request, policy: Policy, copy: Copy) -> DraftTree:
    """A copy as a chain of drafts; empty where it cannot be worth its rows, as in most passes of many requests."""
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
