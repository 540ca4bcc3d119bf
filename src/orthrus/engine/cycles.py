"""A cycle: what commits tokens once. A plan says how it drafts; the passes do the rest."""

from dataclasses import dataclass
from math import inf

from orthrus.config import DecodeConfig
from orthrus.decoding.policy import Left, Policy
from orthrus.decoding.tree import EMPTY_TREE, DraftTree, best_first_tree, chain_tree
from orthrus.engine.chain import chain_passes
from orthrus.engine.passes import Block, Committed, commit_pass, draft_pass
from orthrus.engine.state import DecodeState, Step
from orthrus.types import CycleKind


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
    # A row carries one block: more of them would only take slots of the cache.
    return Plan(kind, num_nodes, branching, min(num_blocks, num_nodes + 1))


def decode_cycle(state: DecodeState, plan: Plan, room: int) -> Step:
    """Draft where no draft is at hand, verify, keep the longest correct path and one token more.

    `room` is the number of tokens that may still be committed: no draft beyond it is verified. With
    `state.floor` the draft pass decides a token too, so every pass commits at least one.
    """
    step = Step(plan.kind, [], [], 0, 0, 0)
    if plan.num_nodes and state.drafts is None:
        if not _may_draft(state, room, state.floor):
            plan = PLAIN
        elif state.floor and plan.kind == "chain" and state.asks_once:
            most_nodes = min(plan.num_nodes, max(0, _deepest(state, room - 2, state.length + 1)))
            first, second, num_nodes = chain_passes(state, most_nodes)
            return _add(_add(step, first, 0), second, num_nodes)
        elif state.floor:
            step = _after(step, state, EMPTY_TREE, [Block(0)])
            if step.token_ids[-1] in state.eos_token_ids or state.drafts is None:
                return step
        else:
            step = step._replace(num_passes=1, num_rows=draft_pass(state))
    room -= len(step.token_ids)
    tree = draft_tree(state, plan, room - 1)
    if not tree.num_nodes:
        step = step._replace(kind="ar" if not step.num_passes else step.kind)
    # A small block at the anchor leaves little once some of its guesses stand.
    blocks = choose_blocks(tree, plan.num_blocks, room - 3, at_root=state.block_size > 4)
    return _after(step, state, tree, blocks)


def auto_cycle(state: DecodeState, policy: Policy, room: int) -> Step:
    """As `decode_cycle`, with whatever the policy finds worth its time."""
    step = Step("ar", [], [], 0, 0, 0)
    wanted = state.drafts is None or (state.late and not policy.keeps_late())
    if wanted and _may_draft(state, room, floor=True) and policy.wants_draft():
        state.drafts = None
        state.block_size = policy.block_size
        step = _after(step._replace(kind="tree"), state, EMPTY_TREE, [Block(0)])
        if step.token_ids[-1] in state.eos_token_ids:
            return step
    room -= len(step.token_ids)
    tree = draft_tree(state, Plan("tree", policy.max_nodes, branching=True), room - 1)
    num_guesses = 0 if state.drafts is None else len(state.drafts)
    trying = step.num_passes > 0
    num_nodes = policy.num_nodes(tree.log_probs, tree.depths(), num_guesses, late=state.late, trying=trying)
    tree = tree.first(num_nodes)
    if not tree.num_nodes:
        if step.num_passes:
            # The draft pass has decided a token already; without a draft worth verifying, that is all.
            policy.observe([], 0, [], late=False, left="none")
            return step
        return _after(step, state, EMPTY_TREE, [])
    ends = tree.end_probs()
    num_blocks = policy.num_blocks(tree.num_nodes, ends)
    blocks = choose_blocks(tree, num_blocks, room - 3, at_root=policy.keeps_late())
    num_before, late = len(step.token_ids), state.late
    state.block_size = policy.block_size
    step = _after(step._replace(kind="fused_tree" if blocks else "tree"), state, tree, blocks)
    num_accepted = len(step.token_ids) - num_before - 1
    left: Left = "none" if state.drafts is None else "late" if state.late else "fresh"
    policy.observe(tree.log_probs, num_accepted, [ends[b.row] for b in blocks], late=late, left=left)
    return step


def draft_tree(state: DecodeState, plan: Plan, max_depth: int) -> DraftTree:
    """The drafts to be verified, none deeper than `max_depth`."""
    room = _deepest(state, max_depth, state.length)
    if state.drafts is None or not plan.num_nodes or room < 1:
        return EMPTY_TREE
    drafts = state.drafts.first(room)
    return best_first_tree(drafts, plan.num_nodes) if plan.branching else chain_tree(drafts, plan.num_nodes)


def choose_blocks(tree: DraftTree, num_blocks: int, max_depth: int, *, at_root: bool) -> list[Block]:
    """Blocks at the rows where the path is most likely to end, by the draft's own reckoning.

    at_root: the first at the root, which every path goes through, so that a draft is left whatever stands.
    Rows deeper than `max_depth` get none: a path that ends there leaves no room for another draft.
    """
    ends = tree.end_probs()
    if at_root:
        ends[0] = inf
    rows = [row for row, depth in enumerate([0, *tree.depths()]) if depth <= max_depth]
    rows = sorted(rows, key=lambda row: -ends[row])[:num_blocks]
    return [Block(row) for row in sorted(rows)]


def _may_draft(state: DecodeState, room: int, floor: bool) -> bool:
    """Whether a draft pass, with an AR row or without, can be followed by a draft worth verifying."""
    num_ar = int(floor)
    size = min(state.block_size, state.context_length - state.length)
    return min(1 + state.dual.config.num_guesses(size), room - 1) - num_ar >= 1


def _deepest(state: DecodeState, max_depth: int, length: int) -> int:
    """How deep drafts may be, after so many committed tokens, for a path and its last token to fit."""
    return min(max_depth, state.context_length - length - 2)


def _after(step: Step, state: DecodeState, tree: DraftTree, blocks: list[Block]) -> Step:
    return _add(step, commit_pass(state, tree, blocks), tree.num_nodes)


def _add(step: Step, done: Committed, num_drafted: int) -> Step:
    num_own = len(done.token_ids) - done.num_accepted
    return step._replace(
        token_ids=step.token_ids + done.token_ids,
        is_draft=step.is_draft + [True] * done.num_accepted + [False] * num_own,
        num_drafted=step.num_drafted + num_drafted,
        num_passes=step.num_passes + 1,
        num_rows=step.num_rows + done.num_rows,
    )
