"""What a request wants of the next pass, and what becomes of it: both without running anything.

A cycle commits tokens once. It takes one pass, or two where a draft is made first; with the floor the draft pass
decides a token too. Strategies differ only in the parts that they want.
"""

from dataclasses import dataclass
from math import inf

from orthrus.config import DecodeConfig
from orthrus.decoding.policy import Left
from orthrus.decoding.tree import (
    EMPTY_TREE,
    Candidates,
    DraftTree,
    accepted_rows,
    best_first_tree,
    chain_tree,
)
from orthrus.engine.request import Request, Step, Work
from orthrus.model.dual_view import DualView
from orthrus.model.passes import block, causal, tree
from orthrus.types import CycleKind, TokenLogprob


@dataclass(frozen=True, slots=True)
class Plan:
    """How a cycle decodes. num_nodes: drafts that are verified, 0 for plain decoding. branching: as a tree
    rather than a chain. num_blocks: diffusion blocks that ride on the verification (fused), 0 for none."""

    kind: CycleKind
    num_nodes: int = 0
    branching: bool = False
    num_blocks: int = 0


PLAIN = Plan("ar")


def fixed_plan(config: DecodeConfig, block_size: int) -> Plan:
    """The plan of a strategy that does not adapt."""
    kind = config.strategy
    assert kind != "auto", "the policy makes the plans of auto"
    if kind == "ar":
        return PLAIN
    branching = kind in ("tree", "fused_tree")
    num_nodes = config.node_budget if branching else block_size - int(config.floor)
    num_blocks = config.block_budget if kind in ("fused", "fused_tree") else 0
    # A row carries one block: more of them would only take slots.
    return Plan(kind, num_nodes, branching, min(num_blocks, num_nodes + 1))


def prompt_work(request: Request, num_tokens: int) -> Work:
    """The next tokens of the prompt, or after a preemption of what was known; at most so many."""
    length = request.slots.length
    end = min(length + num_tokens, length + request.num_to_feed)
    is_last = end == length + request.num_to_feed
    num_rows = end - length
    judged = range(num_rows - 1, num_rows) if is_last and not request.token_ids else range(0)
    part = causal(request.known(length, end), judged=judged)
    return Work("prefill", part, EMPTY_TREE, is_last=is_last)


def wanted(request: Request, dual: DualView) -> Work:
    """The next pass of a request whose prompt has been fed."""
    if request.next_work is not None:
        work, request.next_work = request.next_work, None
        return work
    if request.policy is not None:
        return _adaptive(request, dual)
    plan = fixed_plan(request.config, request.block_size)
    if plan.num_nodes and request.drafts is None:
        if _may_draft(request, dual, request.config.floor):
            return _draft(request, dual, plan.kind)
        plan = PLAIN
    return _verify(request, dual, plan)


def settle(
    request: Request,
    work: Work,
    own_ids: list[int],
    logprobs: list[TokenLogprob],
) -> tuple[int, int] | None:
    """Commit what a pass has decided: the longest path of drafts that the AR view would have written, and one
    token of its own after it.

    own_ids: the AR view's own tokens after the judged rows; logprobs: of these tokens, where asked for. Returns
    the block whose guesses go on from there and the first of its guesses that is left, None where none is.
    """
    step = request.step = request.step or Step(work.kind)
    if work.kind != "prefill":
        step.kind = work.kind
    step.num_passes += 1
    step.num_rows += work.part.num_rows
    step.num_drafted += work.tree.num_nodes
    if work.kind == "prefill":
        request.slots.commit(work.part.num_rows)
        if own_ids:
            request.commit(own_ids, 0, logprobs)
        return None
    if work.without_floor:
        return 0, 0
    path = accepted_rows(work.tree, own_ids)
    token_ids = [*(work.tree.token_ids[row - 1] for row in path), own_ids[path[-1] if path else 0]]
    rows = [0, *path]
    num_taken = request.commit(token_ids, len(path), [logprobs[row] for row in rows] if logprobs else [])
    request.slots.compact(rows[:num_taken])
    request.drafts = None if request.drafts is None else request.drafts.after(token_ids)
    request.late = request.drafts is not None
    if request.finish is not None:
        return None
    return _serving_block(work, rows)


def settle_draft(request: Request, candidates: Candidates, num_known: int) -> None:
    """Take what the serving block guesses; num_known: of its guesses, how many had been decided already."""
    request.drafts, request.late = candidates, num_known > 0


def end_pass(request: Request, dual: DualView, work: Work) -> bool:
    """Whether the cycle ends with this pass; else its second half is `next_work`."""
    if work.kind == "prefill":
        # What is fed again after a preemption belongs to the cycle that follows.
        return len(work.part.judged) > 0
    is_draft = not work.tree.num_nodes and bool(work.block_rows)
    if request.finish is None and is_draft and request.drafts is not None:
        if request.policy is not None:
            work_after = _adaptive_verify(request, dual, trying=True)
            if work_after is None:
                # The draft pass has decided a token; without a draft worth verifying, that is all.
                request.policy.observe([], 0, [], late=False, left="none")
                return True
        else:
            work_after = _verify(request, dual, fixed_plan(request.config, request.block_size))
        request.next_work = work_after
        return False
    if request.policy is not None and work.tree.num_nodes:
        _observe(request, work)
    return True


def _observe(request: Request, work: Work) -> None:
    assert request.policy is not None and request.step is not None
    ends = work.tree.end_probs()
    left: Left = "none" if request.drafts is None else "late" if request.late else "fresh"
    num_accepted = sum(request.step.is_draft)
    block_probs = [ends[row] for row in work.block_rows]
    request.policy.observe(work.tree.log_probs, num_accepted, block_probs, late=work.late, left=left)


def _serving_block(work: Work, rows: list[int]) -> tuple[int, int] | None:
    """Of the blocks on the accepted path, the one nearest to its end, if it has guesses left."""
    on_path = [i for i, row in enumerate(work.block_rows) if row in rows]
    if not on_path:
        return None
    index = max(on_path, key=lambda i: rows.index(work.block_rows[i]))
    num_known = len(rows) - 1 - rows.index(work.block_rows[index])
    return (index, num_known) if num_known < work.num_guesses else None


def _draft(request: Request, dual: DualView, kind: CycleKind) -> Work:
    """A block at the anchor, with the anchor as an AR row beside it unless the floor is off."""
    request.drafts = None
    if request.config.floor or request.policy is not None:
        return _pass(request, dual, kind, EMPTY_TREE, [0])
    size = min(request.block_size, request.context_length - request.slots.length)
    part = block(request.anchor_id, size, dual.mask_token_id)
    num_guesses = 1 + dual.config.num_guesses(size)
    return Work(kind, part, EMPTY_TREE, (0,), size, num_guesses, without_floor=True)


def _verify(request: Request, dual: DualView, plan: Plan) -> Work:
    """The drafts at hand, in the form that the plan asks for; a plain step where there is none."""
    drafts = draft_tree(request, plan.num_nodes, request.room - 1, branching=plan.branching)
    kind = plan.kind if drafts.num_nodes or request.step is not None else "ar"
    # A small block at the anchor leaves little once some of its guesses stand.
    rows = block_rows(drafts, plan.num_blocks, request.room - 3, at_root=request.block_size > 4)
    return _pass(request, dual, kind, drafts, rows)


def _adaptive(request: Request, dual: DualView) -> Work:
    """Whatever the policy finds worth its time."""
    policy = request.policy
    assert policy is not None
    is_due = request.drafts is None or (request.late and not policy.keeps_late())
    request.block_size = policy.block_size
    if is_due and _may_draft(request, dual, floor=True) and policy.wants_draft():
        return _draft(request, dual, "tree")
    work = _adaptive_verify(request, dual, trying=False)
    return work or _pass(request, dual, "ar", EMPTY_TREE, [])


def _adaptive_verify(request: Request, dual: DualView, *, trying: bool) -> Work | None:
    """The drafts and blocks that are worth their rows; None where no draft is."""
    policy = request.policy
    assert policy is not None
    drafts = draft_tree(request, policy.max_nodes, request.room - 1, branching=True)
    num_guesses = 0 if request.drafts is None else len(request.drafts)
    num_nodes = policy.num_nodes(
        drafts.log_probs, drafts.depths(), num_guesses, late=request.late, trying=trying
    )
    drafts = drafts.first(num_nodes)
    if not drafts.num_nodes:
        return None
    num_blocks = policy.num_blocks(drafts.num_nodes, drafts.end_probs())
    rows = block_rows(drafts, num_blocks, request.room - 3, at_root=policy.keeps_late())
    request.block_size = policy.block_size
    return _pass(request, dual, "fused_tree" if rows else "tree", drafts, rows)


def _pass(request: Request, dual: DualView, kind: CycleKind, drafts: DraftTree, rows: list[int]) -> Work:
    """The anchor and a tree of drafts as AR rows, and diffusion blocks beside them."""
    deepest = max(drafts.depths(), default=0)
    size = min(request.block_size, request.context_length - request.slots.length - deepest)
    num_guesses = dual.config.num_guesses(size)
    rows = rows if num_guesses > 0 else []
    ids = [request.anchor_id, *drafts.token_ids]
    part = tree(ids, drafts.parents, rows, size, dual.mask_token_id)
    late = request.late and request.drafts is not None
    return Work(kind, part, drafts, tuple(rows), size, num_guesses, late)


def draft_tree(request: Request, num_nodes: int, max_depth: int, *, branching: bool) -> DraftTree:
    """The drafts to be verified, none deeper than `max_depth`."""
    # A path and the token after it must fit into the context.
    deepest = min(max_depth, request.context_length - request.slots.length - 2)
    if request.drafts is None or not num_nodes or deepest < 1:
        return EMPTY_TREE
    drafts = request.drafts.first(deepest)
    return best_first_tree(drafts, num_nodes) if branching else chain_tree(drafts, num_nodes)


def block_rows(drafts: DraftTree, num_blocks: int, max_depth: int, *, at_root: bool) -> list[int]:
    """Rows for blocks: where the path is most likely to end, by the draft's own reckoning.

    at_root: the first at the root, which every path goes through, so that a draft is left whatever stands.
    Rows deeper than `max_depth` get none: a path that ends there leaves no room for another draft.
    """
    if num_blocks < 1:
        return []
    ends = drafts.end_probs()
    if at_root:
        ends[0] = inf
    rows = [row for row, depth in enumerate([0, *drafts.depths()]) if depth <= max_depth]
    return sorted(sorted(rows, key=lambda row: -ends[row])[:num_blocks])


def _may_draft(request: Request, dual: DualView, floor: bool) -> bool:
    """Whether a draft pass, with an AR row or without, can be followed by a draft worth verifying."""
    num_ar = int(floor)
    size = min(request.block_size, request.context_length - request.slots.length)
    return min(1 + dual.config.num_guesses(size), request.room - 1) - num_ar >= 1
