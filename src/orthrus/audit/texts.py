"""Compares length and variety of texts, which right drafting does not change."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from orthrus.audit.chances import ratio_interval

FORMULAS = {
    "tokens": "new tokens of an answer",
    "characters": "characters of an answer",
    "words": "runs of letters, digits and apostrophes in an answer, in lower case",
    "distinct_words": "different words of an answer",
    "distinct_bigrams": "different pairs of neighbouring words of an answer",
    "distinct_trigrams": "different triples of neighbouring words of an answer",
}
_WORD = re.compile(r"[\w']+")
SEEN = 1.960 + 1.645
"""Standard errors by which a true ratio must differ from 1, so that a 95 % interval excludes 1 with power 0.95."""


@dataclass(frozen=True, slots=True)
class TextRatio:
    """ratio: sum over prompts of `what` in our answers / the same in plain decoding's answers with other seeds.

    1.00 is expected. low, high: 95 % bootstrap interval over prompts. seen: how far from 1 a true ratio must be to be
    detected with power 0.95, about 3.6 standard errors.
    """

    what: str
    ratio: float
    low: float
    high: float
    seen: float


def text_counts(text: str, num_tokens: int) -> dict[str, float]:
    """The counts of one answer, as `FORMULAS` says."""
    words = _WORD.findall(text.lower())
    grams = {n: len(set(zip(*(words[i:] for i in range(n)), strict=False))) for n in (2, 3)}
    return {
        "tokens": num_tokens,
        "characters": len(text),
        "words": len(words),
        "distinct_words": len(set(words)),
        "distinct_bigrams": grams[2],
        "distinct_trigrams": grams[3],
    }


def text_ratios(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]
) -> tuple[TextRatio, ...]:
    """Our counts / theirs, where entry n of both belongs to prompt n."""
    found = []
    for what in FORMULAS:
        ratio, low, high, error = ratio_interval([c[what] for c in ours], [c[what] for c in theirs])
        found.append(TextRatio(what, ratio, low, high, SEEN * error))
    return tuple(found)
