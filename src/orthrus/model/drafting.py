"""Applies a view's repair head to draft rows.

Shapes: D draft rows, P parents of each, M children of each, C hidden size, r rank, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthrus.model.dual_view import DualView
from orthrus.model.repair import RepairHead


def repaired(dual: DualView, hidden: Tensor, parent_ids: Tensor) -> Tensor:
    """Final hidden states (..., C) for the head, corrected by the repair head for the previous tokens (...)."""
    return hidden + _change(dual, hidden, parent_ids).to(hidden.dtype)


class RepairTables(NamedTuple):
    """Precomputed products of a repair head with every token, for runners. Later changes of weights have no effect.

    parents_Vr: the term that each token adds before the nonlinearity, as a parent. children_Vr: each token's row of the
    model's head, multiplied by `out`, as a child.
    """

    parents_Vr: Tensor
    children_Vr: Tensor

    @staticmethod
    @torch.inference_mode()
    def of(dual: DualView) -> "RepairTables | None":
        """The tables of a model; None without a repair head, or if the head has no readable rows or caps its logits."""
        rows_VC = _head_rows(dual)
        if dual.repair is None or rows_VC is None or dual.logit_cap is not None:
            return None
        dtype = dual.repair.hidden.weight.dtype
        ids_V = torch.arange(dual.vocab_size, device=rows_VC.device)
        # In slices, because the embeddings of a large vocabulary would take as much memory again.
        parents = [
            dual.repair.before(dual.base.get_input_embeddings()(ids), dual.repair.parent)
            for ids in ids_V.split(4096)
        ]
        return RepairTables(torch.cat(parents), rows_VC.to(dtype) @ dual.repair.out.weight)

    def changes(self, repair: RepairHead, hidden_DC: Tensor, parent_ids: Tensor, child_ids: Tensor) -> Tensor:
        """The same as `pair_changes`, from the tables."""
        before_DPr = repair.before(hidden_DC, repair.hidden)[:, None] + self.parents_Vr[parent_ids]
        return F.silu(before_DPr).float() @ self.children_Vr[child_ids].float().mT


def pair_changes(
    dual: DualView,
    tables: RepairTables | None,
    hidden_DC: Tensor,
    parent_ids_DP: Tensor,
    child_ids_DM: Tensor,
) -> Tensor:
    """The change that each parent makes to the logits of the children, changes_DPM float32, as `dual.head` would give.

    Only the children's rows of the head are read, so a block costs D x P hidden states instead of a projection to the
    vocabulary. A quantised head has no readable rows, so it is applied as a whole. tables: the runner's, if it has any.
    """
    if dual.repair is not None and tables is not None:
        return tables.changes(dual.repair, hidden_DC, parent_ids_DP, child_ids_DM)
    weight_VC = _head_rows(dual)
    if weight_VC is None:
        moved_DPC = repaired(dual, hidden_DC[:, None], parent_ids_DP)
        changes_DPV = dual.head(moved_DPC).float() - dual.head(hidden_DC).float()[:, None]
        return changes_DPV.gather(-1, child_ids_DM[:, None].expand(-1, parent_ids_DP.shape[1], -1))
    rows_DMC = weight_VC[child_ids_DM].float()
    changes_DPM = _change(dual, hidden_DC[:, None], parent_ids_DP).float() @ rows_DMC.mT
    if (cap := dual.logit_cap) is None:
        return changes_DPM
    before_D1M = torch.einsum("dc,dmc->dm", hidden_DC.float(), rows_DMC)[:, None]
    return cap * (torch.tanh((before_D1M + changes_DPM) / cap) - torch.tanh(before_D1M / cap))


def _head_rows(dual: DualView) -> Tensor | None:
    """The head's weight (V, C); None if it is quantised."""
    # The rows of a tied head are the embeddings, even if another module has replaced the head.
    tied = getattr(dual.base.config, "tie_word_embeddings", False)
    source = dual.base.get_input_embeddings() if tied else dual.base.get_output_embeddings()
    weight_VC: Tensor | None = getattr(source, "weight", None)
    return weight_VC if type(weight_VC) is nn.Parameter and weight_VC.is_floating_point() else None


def _change(dual: DualView, hidden: Tensor, parent_ids: Tensor) -> Tensor:
    assert dual.repair is not None, "the view has no repair head"
    change: Tensor = dual.repair(hidden, dual.base.get_input_embeddings()(parent_ids))
    return change
