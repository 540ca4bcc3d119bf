"""An answer's text as it grows: whole characters, and stop strings that may begin and end in any token."""

from orthrus.decoding.stopping import StopStrings
from orthrus.engine.detokenize import Decoder, Detokenizer
from orthrus.errors import UserInputError


class Text:
    """Detokenising and stop strings, token by token, so that a stop string cuts the ids too.

    Without a tokenizer there is no text; UserInputError where there are stop strings all the same.
    """

    def __init__(self, tokenizer: Decoder | None, stop: tuple[str, ...]) -> None:
        if tokenizer is None and stop:
            raise UserInputError("stop strings need a tokenizer; pass tokenizer=... or drop them.")
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = StopStrings(stop)

    def push(self, token_id: int) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string is complete."""
        if self._detokenizer is None:
            return "", False
        return self._stop.push(self._detokenizer.push(token_id))

    def flush(self) -> tuple[str, bool]:
        """What was held back, once nothing more will come, and whether it completes a stop string."""
        if self._detokenizer is None:
            return "", False
        shown, complete = self._stop.push(self._detokenizer.flush())
        return (shown, True) if complete else (shown + self._stop.flush(), False)
