"""Log probabilities of pairs of candidates, by our own kernel if it is loaded; see `pairs.cpp`."""

import torch
from torch import Tensor

from orthrus.decoding.pairs import pair_log_probs
from orthrus.kernels.build import kernels_loaded
from orthrus.model.drafting import RepairTables, pair_changes
from orthrus.model.dual_view import DualView


def repaired_pairs(
    dual: DualView,
    tables: RepairTables | None,
    hidden_DC: Tensor,
    parent_ids_DP: Tensor,
    child_ids_DM: Tensor,
    scores_DM: Tensor,
    totals_D1: Tensor,
    temperature: float,
) -> Tensor:
    """log_probs_DPM of each candidate of a draft row, given each candidate of the row before; float32.

    As `pair_log_probs` of `pair_changes`. tables: the runner's, if it has any. temperature: that the scores
    have been divided by.
    """
    known = tables is not None and tables.parents_Vr.dtype in (torch.float32, torch.bfloat16)
    if tables is None or not known or hidden_DC.device.type != "cpu" or not kernels_loaded():
        changes_DPM = pair_changes(dual, tables, hidden_DC, parent_ids_DP, child_ids_DM) / temperature
        return pair_log_probs(scores_DM, totals_D1, changes_DPM)
    assert dual.repair is not None
    rows_Dr = dual.repair.before(hidden_DC, dual.repair.hidden).float()
    log_probs_DPM: Tensor = torch.ops.orthrus.pair_log_probs(
        rows_Dr, *tables, parent_ids_DP, child_ids_DM, scores_DM, totals_D1, temperature
    )
    return log_probs_DPM
