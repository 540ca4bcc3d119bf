"""Token ids to text as they come, never half a character."""

from typing import Protocol


class Decoder(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str: ...


_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Emits text for each pushed id; ids whose bytes do not yet make whole characters wait for the next.

    A tokenizer may render an id differently after another one (leading spaces, merged bytes), so pieces are
    differences of two decodings that share a short left context, and their sum equals decoding all at once.
    """

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._context_start = 0
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; may be empty."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        """The rest, once nothing more will come; bytes that never made a character show as U+FFFD."""
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
