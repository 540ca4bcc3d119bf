"""Stop rules, checked token by token: end-of-sequence ids, stop strings, the token limit."""

from dataclasses import dataclass

from orthrus.config import DecodeConfig
from orthrus.errors import UserInputError
from orthrus.types import FinishReason


def end_ids(config: DecodeConfig, eos_token_ids: frozenset[int], vocab_size: int) -> frozenset[int]:
    """The tokens that end a request's text: the model's own, unless they are ignored, and the request's.

    Raises UserInputError for a stop token id that the vocabulary does not have.
    """
    if beyond := [token_id for token_id in config.stop_token_ids if token_id >= vocab_size]:
        raise UserInputError(
            f"stop_token_ids names token {beyond[0]}, but the model's ids end at {vocab_size - 1}; "
            "use ids of this model's tokenizer."
        )
    return (frozenset() if config.ignore_eos else eos_token_ids).union(config.stop_token_ids)


@dataclass(frozen=True, slots=True)
class StopRules:
    """`eos_token_ids`: all tokens that end the text, from `end_ids`. `max_new_tokens`: a limit that includes these."""

    eos_token_ids: frozenset[int]
    max_new_tokens: int

    def finish_reason(self, token_id: int, num_tokens: int) -> FinishReason | None:
        """The reason why decoding ends with this token, the `num_tokens`-th new one; None if it goes on."""
        if token_id in self.eos_token_ids:
            return "stop"
        return "length" if num_tokens >= self.max_new_tokens else None


class StopStrings:
    """Finds stop strings in a growing text, and holds back text that may still become one.

    A stop string may begin in one token and end many tokens later. Text that could be its beginning is held back until
    it is known not to be. A stop string may hold special tokens, which are matched and never shown. `matched`: the stop
    string that was found, if one was.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.matched: str | None = None
        self._stop = stop
        self._held = ""
        self._num_passed = 0
        """Number of held characters in which a stop string must not end."""
        self._hidden: list[bool] = []
        """For each held character, whether it belongs to a special token."""

    def push(self, piece: str, *, hidden: bool = False, may_end: bool = True) -> tuple[str, bool]:
        """Take new text; return (what may be shown now, whether a stop string is complete).

        hidden: the piece is the name of a special token. may_end: whether a stop string that this piece completes
        counts. A stop string that does not count is text, now and later.
        """
        if not self._stop:
            return piece, False
        self._held += piece
        self._hidden += [hidden] * len(piece)
        if not may_end:
            self._num_passed = len(self._held)
        found = [(at, stop) for stop in self._stop if (at := self._find(stop)) >= 0]
        if found:
            first, self.matched = min(found)
            shown = self._release(first)
            self._release(len(self._held))
            return shown, True
        keep = max((overlap(self._held, stop) for stop in self._stop), default=0)
        return self._release(len(self._held) - keep), False

    def flush(self) -> str:
        """The text that was held back, after the last piece."""
        return self._release(len(self._held))

    def _find(self, stop: str) -> int:
        """The index in the held text of this stop string, if it may end the text; otherwise -1."""
        return self._held.find(stop, max(0, self._num_passed - len(stop) + 1))

    def _release(self, count: int) -> str:
        """Remove `count` characters from the front, and return those that are shown."""
        shown = "".join(c for c, hidden in zip(self._held[:count], self._hidden, strict=False) if not hidden)
        self._held, self._hidden = self._held[count:], self._hidden[count:]
        self._num_passed = max(0, self._num_passed - count)
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
