"""Chooses a request's work in the next pass, and commits the result. Nothing here runs a pass.

A cycle is one round of drafting and verifying: one or two passes, whose tokens are reported as one record. With the
floor, the draft pass decides a token too. Strategies differ only in the work that they choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from orthrus.config import DecodeConfig
from orthrus.decoding.tree import EMPTY_TREE, Candidates, accepted_rows, rejected_ids
from orthrus.engine.adaptive import adaptive_verify, adaptive_work, copied, observe, observe_copy
from orthrus.engine.choices import NO_TOKEN
from orthrus.engine.parts import block_rows, draft_tree, draft_work, may_draft, verify_work
from orthrus.engine.request import Request, Step, Work
from orthrus.errors import UnsupportedModelError
from orthrus.model.dual_view import DualView
from orthrus.types import CycleKind, TokenLogprob


@dataclass(frozen=True, slots=True)
class Plan:
    """How a cycle decodes.

    num_nodes: drafts to verify, 0 for plain decoding. branching: verify a tree, not a chain. num_blocks: diffusion
    blocks that the verify pass carries (fused strategies), 0 for none.
    """

    kind: CycleKind
    num_nodes: int = 0
    branching: bool = False
    num_blocks: int = 0


PLAIN = Plan("ar")


def fixed_plan(config: DecodeConfig, block_size: int) -> Plan:
    """The plan of a fixed strategy."""
    kind = config.strategy
    assert kind != "auto", "the policy makes the plans of auto"
    if kind == "ar":
        return PLAIN
    branching = kind in ("tree", "fused_tree")
    num_nodes = config.node_budget if branching else block_size - int(config.floor)
    num_blocks = config.block_budget if kind in ("fused", "fused_tree") else 0
    # A row has at most one block, so more blocks than rows would only take slots.
    return Plan(kind, num_nodes, branching, min(num_blocks, num_nodes + 1))


def wanted(request: Request, dual: DualView) -> Work:
    """The work of a request in the next pass, once its prompt has been fed."""
    if request.next_work is not None:
        work, request.next_work = request.next_work, None
        return work
    if request.policy is not None:
        return adaptive_work(request, dual)
    plan = fixed_plan(request.config, request.block_size)
    if plan.num_nodes and request.drafts is None:
        if may_draft(request, dual, request.config.floor):
            return draft_work(request, dual, plan.kind)
        plan = PLAIN
    return _verify(request, dual, plan)


def plain_work(request: Request, dual: DualView) -> Work:
    """Work of one row, the smallest step. The proposal is kept, and a cycle that has begun ends with this pass."""
    request.next_work = None
    return verify_work(request, dual, "ar" if request.step is None else request.step.kind, EMPTY_TREE, [])


def settle(
    request: Request,
    work: Work,
    own_ids: list[int],
    logprobs: list[TokenLogprob],
) -> tuple[int, int] | None:
    """Commit the tokens that a pass decided: the longest accepted path of drafts, and one token of the AR view.

    own_ids: the AR view's own tokens after the judged rows. logprobs: of these tokens, if asked for. Returns (the block
    that gives the next proposal, its first guess that is left), or None if no block has guesses left. Raises
    UnsupportedModelError if the AR view cannot choose a token.
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
            _check_chosen(own_ids)
            request.commit(own_ids, 0, logprobs)
            if request.copies is not None:
                request.copies.extend(own_ids)
        return None
    if work.without_floor:
        return 0, 0
    path = accepted_rows(work.tree, own_ids)
    _check_chosen([own_ids[row] for row in (0, *path)])
    token_ids = [*(work.tree.token_ids[row - 1] for row in path), own_ids[path[-1] if path else 0]]
    rows = [0, *path]
    num_taken = request.commit(token_ids, len(path), [logprobs[row] for row in rows] if logprobs else [])
    step.num_copied += sum(not work.is_view[row - 1] for row in path[:num_taken])
    observe_copy(request, work.copy, token_ids[:num_taken])
    request.slots.compact(rows[:num_taken])
    request.drafts = None if request.drafts is None else request.drafts.after(token_ids)
    request.stale = request.drafts is not None
    if request.finish is not None:
        return None
    step.rejected_ids += rejected_ids(work.tree, path)
    return _serving_block(work, rows)


def _check_chosen(token_ids: Sequence[int]) -> None:
    if NO_TOKEN in token_ids:
        raise UnsupportedModelError(
            "the model's own logits became NaN or infinite: load it in another dtype (float32, bfloat16), or check its "
            "weights."
        )


def settle_draft(request: Request, candidates: Candidates, num_known: int) -> None:
    """Store the next proposal. num_known: how many guesses of its block have been decided already."""
    request.drafts, request.stale = candidates, num_known > 0


def end_pass(request: Request, dual: DualView, work: Work) -> bool:
    """Whether the cycle ends with this pass. Otherwise this sets `next_work`, its second pass."""
    if work.kind == "prefill":
        # Feeding the text again after a preemption belongs to the next cycle.
        return len(work.part.judged) > 0
    # A draft pass is the first one of its cycle. A verification whose drafts all break a grammar looks the same.
    is_first = request.step is not None and request.step.num_passes == 1
    is_draft = is_first and not work.tree.num_nodes and bool(work.block_rows)
    if request.finish is None and is_draft and request.drafts is not None:
        if request.policy is not None:
            work_after = adaptive_verify(request, dual, copied(request), trying=True)
            if work_after is None or not any(work_after.is_view):
                # The draft pass has decided a token, but no draft is worth verifying.
                request.policy.observe([], 0, [], stale=False, left="none")
            if work_after is None:
                return True
        else:
            work_after = _verify(request, dual, fixed_plan(request.config, request.block_size))
        request.next_work = work_after
        return False
    if request.policy is not None and work.tree.num_nodes:
        observe(request, work)
    return True


def _serving_block(work: Work, rows: list[int]) -> tuple[int, int] | None:
    """(block, its decided guesses) of the block on the accepted path nearest to its end, if guesses are left."""
    on_path = [i for i, row in enumerate(work.block_rows) if row in rows]
    if not on_path:
        return None
    index = max(on_path, key=lambda i: rows.index(work.block_rows[i]))
    num_known = len(rows) - 1 - rows.index(work.block_rows[index])
    return (index, num_known) if num_known < work.num_guesses else None


def _verify(request: Request, dual: DualView, plan: Plan) -> Work:
    """Verify the current proposal in the form of the plan. Without a proposal this is a plain step."""
    drafts = draft_tree(request, plan.num_nodes, request.room - 1, branching=plan.branching)
    kind = plan.kind if drafts.num_nodes or request.step is not None else "ar"
    # After some of its guesses are accepted, a small block at the anchor has little left.
    rows = block_rows(drafts, plan.num_blocks, request.room - 3, at_root=request.block_size > 4)
    return verify_work(request, dual, kind, drafts, rows)
