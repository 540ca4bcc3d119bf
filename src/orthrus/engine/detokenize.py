"""Converts token ids to text one by one, in whole characters."""

from typing import Protocol

from orthrus.decoding.stopping import StopStrings
from orthrus.errors import UserInputError


class Decoder(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Emits text for each pushed id. Ids whose bytes do not make whole characters yet wait for the next id.

    A tokenizer may render an id differently after another one (leading spaces, merged bytes). So a piece is the
    difference of two decodings with the same short left context. All pieces together equal the text decoded at once.
    Special tokens that are skipped leave no trace, so however many of them follow each other cost no time.
    """

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._context_start = 0
        self._emitted = 0
        self._skipped = (
            frozenset(getattr(tokenizer, "all_special_ids", ())) if skip_special_tokens else frozenset()
        )

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; may be empty."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        """The rest of the text, after the last id. Bytes that make no character become U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        known = self._decode(self._ids[self._context_start : self._emitted])
        text = self._decode(self._ids[self._context_start :])
        if len(text) <= len(known) or (text.endswith(_REPLACEMENT) and not final):
            return ""
        self._context_start, self._emitted = self._emitted, len(self._ids)
        return text[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)


class AnswerText:
    """The text of an answer, with stop strings, token by token, so that a stop string ends the list of ids too.

    Special tokens are not part of the text, but stop strings that hold their names are found.
    Raises UserInputError for stop strings without a tokenizer.
    """

    def __init__(self, tokenizer: Decoder | None, stop: tuple[str, ...]) -> None:
        if tokenizer is None and stop:
            raise UserInputError("stop strings need a tokenizer; pass tokenizer=... or drop them.")
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._special = special_tokens(tokenizer) if stop else {}
        self._stop = StopStrings(stop)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text."""
        return self._stop.matched

    def push(self, token_id: int, *, may_end: bool = True) -> tuple[str, bool]:
        """(text that may be shown now, whether this token completes a stop string). may_end: stop strings count."""
        if self._detokenizer is None:
            return "", False
        shown, complete = self._stop.push(self._detokenizer.push(token_id), may_end=may_end)
        name = self._special.get(token_id)
        if name is None or complete:
            return shown, complete
        more, complete = self._stop.push(name, hidden=True, may_end=may_end)
        return shown + more, complete

    def flush(self) -> tuple[str, bool]:
        """(text that was held back, whether it completes a stop string), after the last token."""
        if self._detokenizer is None:
            return "", False
        piece, complete = self._stop.push(self._detokenizer.flush())
        return (piece, True) if complete else (piece + self._stop.flush(), False)


def special_tokens(tokenizer: Decoder | None) -> dict[int, str]:
    """The names of the special tokens, which decoding leaves out, by id."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {token_id: token.content for token_id, token in added.items() if token.special}
