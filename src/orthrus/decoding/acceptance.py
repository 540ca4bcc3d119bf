"""Acceptance where the choices lie: on the device, so that a draft is made before the host knows of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus.decoding.tree import DraftTree


class Serving(NamedTuple):
    """Which block of a pass the text goes on from, each (1,) int64: index_1, its number; first_1, which of
    its guesses is the first one left, not counting that of its first row; anchor_1, the token before it."""

    index_1: Tensor
    first_1: Tensor
    anchor_1: Tensor


class TreeOnDevice:
    """A draft tree, and the rows that blocks are anchored at, where the choices will lie.

    Made before the pass is launched: sending numbers to a device waits for all that it has been given to do.
    """

    def __init__(self, tree: DraftTree, block_rows: Sequence[int], device: torch.device) -> None:
        depths = [0, *tree.depths()]
        self.depth = max(depths)
        rows = [[0, *tree.parents], [-1, *tree.token_ids], depths, list(block_rows)]
        sent = torch.tensor([number for row in rows for number in row], device=device)
        self.parents_R, self.ids_R, self.depths_R, self.rows_B = sent.split([len(row) for row in rows])

    def accepted(self, own_ids_R: Tensor) -> Tensor:
        """Whether each row, the root's included, lies on the path that is accepted: on_path_R, bool.

        As `accepted_rows`, without a look at a value: as many steps as the tree is deep. own_ids_R: the AR
        view's choice after each row.
        """
        stands_R: Tensor = own_ids_R[self.parents_R] == self.ids_R
        stands_R[:1] = True
        on_path_R = stands_R
        for _ in range(self.depth - 1):
            on_path_R = stands_R & on_path_R[self.parents_R]
        return on_path_R

    def serving(self, own_ids_R: Tensor) -> Serving:
        """Of the blocks on the accepted path, the one nearest to its end; without meaning where none is."""
        on_path_R = self.accepted(own_ids_R)
        last_1 = (self.depths_R * on_path_R).argmax(0, keepdim=True)
        depths_B = self.depths_R[self.rows_B]
        index_1 = torch.where(on_path_R[self.rows_B], depths_B, -1).argmax(0, keepdim=True)
        return Serving(index_1, self.depths_R[last_1] - depths_B[index_1], own_ids_R[last_1])
