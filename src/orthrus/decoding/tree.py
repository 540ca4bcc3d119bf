"""Draft trees: the guesses of a block that get a row of the verify pass. Plain Python, on the host.

Row 0 of a tree is the anchor, its root. Node i is row i + 1. A tree is three flat lists; parents are row numbers and
come before their children. A chain is a tree without branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate, islice
from math import exp, inf


@dataclass(frozen=True, slots=True)
class Candidates:
    """The proposal of a block: D positions after the root, with C candidates each.

    log_probs_DC: of each candidate, given that the guesses before it are accepted; at most 0. pairs_DPC comes from a
    repair head, which looks at neighbours: pairs_DPC[d][p][c] is the log prob of candidate c of position d, given that
    candidate p of position d - 1 is accepted. It replaces log_probs_DC from position 1 on. Entry 0 is never read,
    because the token before position 0 is known.
    """

    token_ids_DC: list[list[int]]
    log_probs_DC: list[list[float]]
    pairs_DPC: list[list[list[float]]] | None = None

    def __len__(self) -> int:
        return len(self.token_ids_DC)

    def log_probs(self, position: int, parent_rank: int) -> list[float]:
        """Log prob of each candidate of a position, given the accepted candidate of the position before it."""
        if position == 0 or self.pairs_DPC is None:
            return self.log_probs_DC[position]
        return self.pairs_DPC[position][parent_rank]

    def walk(self) -> list[tuple[int, float]]:
        """(rank, log prob) of the best guess of each position, given the best guess before it."""
        steps, rank = [], 0
        for position in range(len(self)):
            row = self.log_probs(position, rank)
            rank = max(range(len(row)), key=row.__getitem__)
            steps.append((rank, row[rank]))
        return steps

    def first(self, num_positions: int) -> "Candidates":
        """The first positions only."""
        pairs_DPC = None if self.pairs_DPC is None else self.pairs_DPC[:num_positions]
        return Candidates(self.token_ids_DC[:num_positions], self.log_probs_DC[:num_positions], pairs_DPC)

    def after(self, token_ids: Sequence[int]) -> "Candidates | None":
        """The positions that are left after these tokens; None unless `walk` guessed them all and goes on.

        The first position that is left becomes conditional on the last of these tokens.
        """
        num_positions, steps = len(token_ids), self.walk()
        ranks = [rank for rank, _ in steps[:num_positions]]
        foreseen = [row[rank] for row, rank in zip(self.token_ids_DC, ranks, strict=False)]
        if len(self) <= num_positions or foreseen != list(token_ids):
            return None
        first_C = self.log_probs(num_positions, ranks[-1] if ranks else 0)
        return Candidates(
            self.token_ids_DC[num_positions:],
            [first_C, *self.log_probs_DC[num_positions + 1 :]],
            None if self.pairs_DPC is None else self.pairs_DPC[num_positions:],
        )


@dataclass(frozen=True, slots=True)
class DraftTree:
    """For each node: its token, the row of its parent, and the log prob of the whole path from the root to it."""

    token_ids: list[int]
    parents: list[int]
    log_probs: list[float]

    @property
    def num_nodes(self) -> int:
        return len(self.token_ids)

    def first(self, num_nodes: int) -> "DraftTree":
        """The first nodes only. For a best-first tree, this is the best tree of that size."""
        return DraftTree(self.token_ids[:num_nodes], self.parents[:num_nodes], self.log_probs[:num_nodes])

    def depths(self) -> list[int]:
        """The depth of each node. A child of the root has depth 1."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths[1:]

    def paths(self) -> list[list[int]]:
        """For each row, the root included: the rows from the root's child down to it; none for the root."""
        paths: list[list[int]] = [[]]
        for row, parent in enumerate(self.parents, start=1):
            paths.append([*paths[parent], row])
        return paths

    def paths_of_tokens(self) -> list[list[int]]:
        """`paths`, as token ids."""
        return [[self.token_ids[row - 1] for row in path] for path in self.paths()]

    def end_probs(self) -> list[float]:
        """For each row, the root included: the proposal's probability that the accepted path ends there.

        It is the probability of reaching the row, minus that of reaching any of its children.
        """
        reach = [1.0, *(exp(log_prob) for log_prob in self.log_probs)]
        ends = reach.copy()
        for row, parent in enumerate(self.parents, start=1):
            ends[parent] -= reach[row]
        return [max(0.0, end) for end in ends]

    def children(self) -> list[dict[int, int]]:
        """For each row, the root included: {token id: row of the child with this token}."""
        children: list[dict[int, int]] = [{} for _ in range(self.num_nodes + 1)]
        for row, (token_id, parent) in enumerate(zip(self.token_ids, self.parents, strict=True), start=1):
            children[parent][token_id] = row
        return children


EMPTY_TREE = DraftTree([], [], [])
"""Only the anchor: a verify pass of one row."""


def chain_tree(candidates: Candidates, num_nodes: int) -> DraftTree:
    """A chain of the walk's first `num_nodes` guesses; fewer if the block proposes fewer."""
    steps = candidates.walk()[: max(0, num_nodes)]
    token_ids = [ids[rank] for ids, (rank, _) in zip(candidates.token_ids_DC, steps, strict=False)]
    log_probs = accumulate(log_prob for _, log_prob in steps)
    return DraftTree(token_ids, list(range(len(steps))), list(log_probs))


def best_first_tree(candidates: Candidates, budget: int) -> DraftTree:
    """The `budget` most probable prefixes, most probable first; fewer if there are no more.

    The probability of a prefix is the product of its candidates' probabilities, each given the one before it. So the
    sum over nodes is the expected number of accepted drafts, and no other tree of this size has a larger one. Among
    equals the shallower node comes first, then the earlier parent, then the better candidate. Candidates of
    probability 0 are left out. Source: best-first search as in arXiv 2604.12989.
    """
    ranked: dict[tuple[int, int], list[tuple[float, int]]] = {}

    def options(depth: int, parent_rank: int) -> list[tuple[float, int]]:
        """(cost, rank) of the candidates after a given one, cheapest first; cost = -log prob."""
        key = (depth, -1 if candidates.pairs_DPC is None else parent_rank)
        if key not in ranked:
            row = candidates.log_probs(depth, parent_rank)
            ranked[key] = sorted((-log_prob, rank) for rank, log_prob in enumerate(row) if log_prob > -inf)
        return ranked[key]

    token_ids: list[int] = []
    parents: list[int] = []
    costs, ranks = [0.0], [-1]
    # (cost of the path, depth, parent's row, place among the parent's options). Every node is reached once: from its
    # better sibling, or as a first child from its parent. Neither costs more than the node.
    heap: list[tuple[float, int, int, int]] = []

    def push(depth: int, parent: int, place: int) -> None:
        if depth < len(candidates):
            for cost, _ in islice(options(depth, ranks[parent]), place, place + 1):
                heappush(heap, (costs[parent] + cost, depth, parent, place))

    push(0, 0, 0)
    while heap and len(token_ids) < budget:
        cost, depth, parent, place = heappop(heap)
        rank = options(depth, ranks[parent])[place][1]
        token_ids.append(candidates.token_ids_DC[depth][rank])
        parents.append(parent)
        costs.append(cost)
        ranks.append(rank)
        push(depth, parent, place + 1)
        push(depth + 1, len(token_ids), 0)
    return DraftTree(token_ids, parents, [-cost for cost in costs[1:]])


def accepted_rows(tree: DraftTree, ar_ids: Sequence[int]) -> list[int]:
    """The rows of the accepted nodes, from the root's child on. Their tokens are the AR view's own choices.

    ar_ids: for each row, the root included, the AR view's choice after it.
    """
    rows, last = [], 0
    # Parents come first, so one loop over the nodes is enough.
    for row, (token_id, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True), start=1):
        if parent == last and token_id == ar_ids[last]:
            rows.append(row)
            last = row
    return rows


def rejected_ids(tree: DraftTree, rows: Sequence[int]) -> list[int]:
    """The tokens of the first branch after the accepted path: the text that the proposal would have written.

    rows: of the accepted nodes, from `accepted_rows`. In a best-first tree the first branch is the most probable one.
    """
    token_ids, last = [], rows[-1] if rows else 0
    for row, (token_id, parent) in enumerate(zip(tree.token_ids, tree.parents, strict=True), start=1):
        if parent == last:
            token_ids.append(token_id)
            last = row
    return token_ids


def with_chain(
    tree: DraftTree, token_ids: Sequence[int], log_probs: Sequence[float]
) -> tuple[DraftTree, list[bool]]:
    """A tree and a chain of another source as one best-first tree, and for each node whether it is the tree's.

    log_probs: of the chain's tokens, each given those before it. Where the chain follows a branch of the tree, no node
    is added, and the larger one of the two probabilities counts.
    """
    ids, parents, log_path = list(tree.token_ids), list(tree.parents), list(tree.log_probs)
    children, row, total = tree.children(), 0, 0.0
    for token_id, log_prob in zip(token_ids, log_probs, strict=True):
        total += log_prob
        child = children[row].get(token_id) if row < len(children) else None
        if child is None:
            ids.append(token_id)
            parents.append(row)
            log_path.append(total)
            child = len(ids)
        else:
            log_path[child - 1] = max(log_path[child - 1], total)
        row = child
    # A parent is never less probable than its children, and comes first among equals.
    order = sorted(range(len(ids)), key=lambda i: (-log_path[i], i))
    places = {0: 0} | {node + 1: place + 1 for place, node in enumerate(order)}
    merged = DraftTree(
        [ids[i] for i in order], [places[parents[i]] for i in order], [log_path[i] for i in order]
    )
    return merged, [i < tree.num_nodes for i in order]


def pruned(tree: DraftTree, keeps: Sequence[bool]) -> tuple[DraftTree, list[int]]:
    """The tree without some nodes and all that follow them, and the old indices of the remaining nodes."""
    places, left = {0: 0}, []
    for node, keep in enumerate(keeps):
        if keep and tree.parents[node] in places:
            left.append(node)
            places[node + 1] = len(left)
    return (
        DraftTree(
            [tree.token_ids[i] for i in left],
            [places[tree.parents[i]] for i in left],
            [tree.log_probs[i] for i in left],
        ),
        left,
    )
