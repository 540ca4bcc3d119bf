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


def accepted_on_device(tree: DraftTree, own_ids_R: Tensor) -> Tensor:
    """Whether each row, the root's included, lies on the path that is accepted: on_path_R, bool.

    As `accepted_rows`, without a look at a value: as many steps as the tree is deep.
    """
    parents_R = torch.tensor([0, *tree.parents], device=own_ids_R.device)
    ids_R = torch.tensor([-1, *tree.token_ids], device=own_ids_R.device)
    stands_R = own_ids_R[parents_R] == ids_R
    stands_R[:1] = True
    on_path_R = stands_R
    for _ in range(max(tree.depths(), default=0) - 1):
        on_path_R = stands_R & on_path_R[parents_R]
    return on_path_R


def serving_block(tree: DraftTree, block_rows: Sequence[int], own_ids_R: Tensor) -> Serving:
    """Of the blocks anchored at rows on the accepted path, the one nearest to its end; any where none is.

    own_ids_R: the AR view's choice after each row, the root's included.
    """
    device = own_ids_R.device
    on_path_R = accepted_on_device(tree, own_ids_R)
    depths_R = torch.tensor([0, *tree.depths()], device=device)
    rows_B = torch.tensor(list(block_rows), device=device)
    last_1 = (depths_R * on_path_R).argmax(0, keepdim=True)
    depths_B = depths_R[rows_B]
    index_1 = torch.where(on_path_R[rows_B], depths_B, -1).argmax(0, keepdim=True)
    return Serving(index_1, depths_R[last_1] - depths_B[index_1], own_ids_R[last_1])
