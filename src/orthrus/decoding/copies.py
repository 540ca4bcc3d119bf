"""Drafts by copying (prompt lookup): the tokens that followed an earlier occurrence of the last tokens of the text.

This needs no model and no draft pass. It needs an index from the last few tokens to the end of their latest occurrence,
which is updated with each token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import log
from typing import NamedTuple


class Copy(NamedTuple):
    """The tokens that a copy proposes, and the number of equal tokens before them in both places."""

    token_ids: tuple[int, ...]
    match_length: int


NO_COPY = Copy((), 0)
MATCH_LENGTHS = (2, 3, 4, 6, 8)
"""The numbers of last tokens that are looked up."""


class CopyIndex:
    """Finds earlier occurrences of the last tokens: for the longest match among `match_lengths`, the latest place.

    Each token costs one entry per match length, however long the text is. Not for use by two threads at once.
    """

    def __init__(self, match_lengths: Sequence[int] = MATCH_LENGTHS) -> None:
        assert min(match_lengths) >= 1, "at least one token has to match"
        self._lengths = sorted(match_lengths, reverse=True)
        self._token_ids: list[int] = []
        # By match length: the place after the latest occurrence of these tokens. The end of the text does not count,
        # because nothing follows it yet.
        self._after: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in self._lengths}

    def __len__(self) -> int:
        return len(self._token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add tokens: those of the prompt, then those that are committed."""
        text = self._token_ids
        for token_id in token_ids:
            end = len(text)
            for length in self._lengths:
                if length <= end:
                    self._after[length][tuple(text[end - length :])] = end
            text.append(token_id)

    def continuation(self, num_tokens: int) -> Copy:
        """The tokens after the earlier occurrence of the last tokens: so many, or fewer at the end of the text."""
        return self.after((), num_tokens)

    def after(self, path_ids: Sequence[int], num_tokens: int) -> Copy:
        """Like `continuation`, as if the text were followed by these tokens; they are not added.

        Earlier occurrences are looked up only in the text. If one ends at the end of the text, the path itself
        follows it.
        """
        text = self._token_ids
        longest = self._lengths[0]
        num_left = longest - len(path_ids)
        tail = (*(text[-num_left:] if num_left > 0 else ()), *path_ids)[-longest:]
        for length in self._lengths:
            if length > len(tail):
                continue
            suffix = tail[len(tail) - length :]
            place = self._after[length].get(suffix)
            if path_ids and tuple(text[-length:]) == suffix and len(text) >= length:
                place = len(text)
            if place is not None:
                copied = text[place : place + num_tokens]
                copied += path_ids[: num_tokens - len(copied)] if len(copied) < num_tokens else ()
                return Copy(tuple(copied), length)
        return NO_COPY


PRIOR_CHANCES = {
    2: (0.5, 0.6, 0.7, 0.75),
    3: (0.6, 0.7, 0.7, 0.8),
    4: (0.7, 0.75, 0.75, 0.8),
    6: (0.75, 0.8, 0.8, 0.85),
    8: (0.85, 0.85, 0.9, 0.9),
}
"""By match length and depth, the first estimate of the probability that a copied token is accepted if those before it
were. The values are rounded from 500 answers of the default model in nine domains with equal weights.
"""
PRIOR_WEIGHT = 4.0
"""The number of observations that a prior counts for."""
MEMORY = 0.95
"""The factor on the weight of earlier observations, for each further observation of the same kind."""
MOST_DEPTHS = len(PRIOR_CHANCES[MATCH_LENGTHS[0]])
"""Number of depths that are distinguished; all further ones count as the last."""


@dataclass(slots=True)
class CopyPromise:
    """The acceptance probabilities of copies in one request, by match length and depth.

    Each is the probability that a copied token is accepted if all copied tokens before it were. It starts at a prior,
    which rises with match length and depth, and follows the acceptance of copies. A depth without observations uses
    those of the depth before it, because a copy that has been right for long usually stays right.
    """

    _accepted: dict[tuple[int, int], float] = field(default_factory=dict)
    _seen: dict[tuple[int, int], float] = field(default_factory=dict)

    def chance(self, match_length: int, depth: int) -> float:
        """The acceptance probability of the token at this depth (the first has depth 1), given those before it.

        match_length: one of MATCH_LENGTHS, here and below.
        """
        return self._chances(match_length, depth)[-1]

    def log_probs(self, copy: Copy) -> list[float]:
        """Log probability that each token of a copy is accepted, given that those before it are. Finite and below 0."""
        if not copy.token_ids:
            return []
        log_probs = list(map(log, self._chances(copy.match_length, len(copy.token_ids))))
        return log_probs + log_probs[-1:] * (len(copy.token_ids) - len(log_probs))

    def _chances(self, match_length: int, depth: int) -> list[float]:
        """The probabilities by depth, down to the last depth that is distinguished."""
        deviation, chances = 0.0, []
        for level, prior in enumerate(PRIOR_CHANCES[match_length][:depth], start=1):
            # The prior of this depth, shifted by as much as the depth before it deviates from its own prior.
            expected = min(max(prior + deviation, 0.01), 0.99)
            key = match_length, level
            accepted, seen = self._accepted.get(key, 0.0), self._seen.get(key, 0.0)
            chances.append((accepted + PRIOR_WEIGHT * expected) / (seen + PRIOR_WEIGHT))
            deviation = chances[-1] - prior
        return chances

    def observe(self, match_length: int, num_accepted: int, num_judged: int) -> None:
        """Record that `num_accepted` of the first `num_judged` tokens of a copy were accepted.

        Tokens after the first rejected one have no effect. They may be left out, or counted as judged.
        """
        assert 0 <= num_accepted <= num_judged, "more tokens accepted than judged"
        for depth in range(1, min(num_judged, num_accepted + 1) + 1):
            key = match_length, min(depth, MOST_DEPTHS)
            self._accepted[key] = MEMORY * self._accepted.get(key, 0.0) + (depth <= num_accepted)
            self._seen[key] = MEMORY * self._seen.get(key, 0.0) + 1.0
