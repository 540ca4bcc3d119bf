"""Why two outputs differ: a near-tie that rounding decides, or a broken rule.

A pass over a block and a pass over one row sum up in different orders, so rounding changes their logits. Where the best
two tokens are closer than that change, either may come out. The size of the change is the rounding spread. It is
measured with the baseline alone. If logits of our drafting were part of it, a corrupt cache would excuse itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from orthrus.api import Orthrus
from orthrus.audit.place import Place
from orthrus.audit.replay import replay_ours
from orthrus.audit.shapes import AS_DECODED, ONE_ROW, baseline_logits
from orthrus.config import Baseline, DecodeConfig

Verdict = Literal["near-tie", "broken rule"]
NUM_CANDIDATES = 32
MARGIN = 2.0
"""Each of the two logits may move by the rounding spread. If the baseline picks our token in another shape, the gap is
at most twice the spread. So the rule never fails a token that the baseline picks too."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on a difference. Numbers are scores (see `place.scores`); None if the outputs differ in length only.

    gap: score of the baseline's token minus score of ours, in the one-row shape. rounding_spread: the largest change
    of a top candidate's score between the baseline's shapes. Two numbers are for information. drift: the change from
    the baseline's one-row shape to our scores. residue: the change from its "as decoded" shape to our scores; it is 0
    where the baseline, with as many rows, gives our bits.
    """

    verdict: Verdict
    reason: str
    gap: float | None = None
    rounding_spread: float | None = None
    drift: float | None = None
    residue: float | None = None
    spread_by_shape: dict[str, float] = field(default_factory=dict)


def first_difference(baseline_ids: Sequence[int], our_ids: Sequence[int]) -> int:
    """The first index where they differ; the length of the shorter one if it is a prefix of the other."""
    pairs = zip(baseline_ids, our_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def explain(
    orthrus: Orthrus,
    against: Baseline,
    prompt_ids: list[int],
    config: DecodeConfig,
    baseline_ids: tuple[int, ...],
    our_ids: tuple[int, ...],
    position: int,
) -> Judgement:
    """Judge the first difference of two outputs, at new token number `position` (from 0)."""
    if position >= min(len(baseline_ids), len(our_ids)):
        ended = "ours" if len(our_ids) < len(baseline_ids) else "the baseline's"
        return Judgement("broken rule", f"equal so far, but {ended} ended here and the other went on")
    ours = replay_ours(orthrus, prompt_ids, config, our_ids, position)
    new_ids = list(our_ids[:position])
    shapes = baseline_logits(orthrus, against, config, prompt_ids, new_ids, ours.chunks)
    place = Place(orthrus, prompt_ids, new_ids, config)
    could_take = place.could_take if place.has_filters else None
    shapes = {name: place.scores(logits_V) for name, logits_V in shapes.items()}
    pair = baseline_ids[position], our_ids[position]
    if ours.token != our_ids[position] or ours.logits_V is None:
        return _unrepeatable(judge(shapes, None, *pair, could_take))
    return judge(shapes, place.scores(ours.logits_V, filtered=True), *pair, could_take)


def judge(
    shapes: dict[str, Tensor],
    our_scores_V: Tensor | None,
    baseline_token: int,
    our_token: int,
    could_take: Callable[[Tensor, int, float], bool] | None = None,
) -> Judgement:
    """Apply the rule. shapes: scores_V of the baseline by shape, "one row" and "as decoded" among them.

    The rule is broken if our token is not the best by the AR view's own scores, or if the gap is above
    MARGIN x rounding spread. With filters the gap alone does not decide, because rounding also moves their edges. Then
    `could_take` decides, see `Place.could_take`.
    """
    reference_V = shapes[ONE_ROW]
    top_N = reference_V.topk(min(NUM_CANDIDATES, reference_V.numel())).indices
    candidates_N = torch.cat([top_N, top_N.new_tensor([baseline_token, our_token])])
    changes = {
        name: _largest_change(scores_V, reference_V, candidates_N)
        for name, scores_V in shapes.items()
        if name != ONE_ROW
    }
    spread = max(changes.values(), default=0.0)
    gap = abs(float(reference_V[baseline_token] - reference_V[our_token]))
    if could_take is None:
        is_tie = gap <= MARGIN * spread
        reason = f"the gap is {'within' if is_tie else 'above'} {MARGIN:g} x the rounding spread"
    else:
        is_tie = could_take(reference_V, our_token, MARGIN * spread)
        reason = (
            f"within {MARGIN:g} x the rounding spread the filters {'may' if is_tie else 'cannot'} "
            "let our token win"
        )
    verdict: Verdict = "near-tie" if is_tie else "broken rule"
    drift = residue = None
    if our_scores_V is not None:
        drift = _largest_change(our_scores_V, reference_V, candidates_N)
        residue = _largest_change(our_scores_V, shapes[AS_DECODED], candidates_N)
        if our_scores_V[our_token] < our_scores_V.max():
            verdict = "broken rule"
            reason = (
                f"our own scores are highest for token {int(our_scores_V.argmax())}, which was not committed"
            )
    return Judgement(verdict, reason, gap, spread, drift, residue, changes)


def _largest_change(scores_V: Tensor, reference_V: Tensor, candidates_N: Tensor) -> float:
    """The largest change of a candidate's score, over tokens that both allow."""
    changes_N = (scores_V - reference_V)[candidates_N].abs()
    changes_N = changes_N[changes_N.isfinite()]
    return float(changes_N.max()) if len(changes_N) else 0.0


def _unrepeatable(found: Judgement) -> Judgement:
    """Adds that the replay gave another token.

    Rounding may decide a tie differently in passes shared with other requests, or on devices whose sums vary.
    """
    return replace(found, reason=f"{found.reason}; decoding again, alone, gave another token")
