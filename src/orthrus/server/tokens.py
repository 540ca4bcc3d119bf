"""The bytes of tokens. Log probabilities report them, because a part of a character has no text."""

import json
from functools import lru_cache
from typing import Any


class TokenBytes:
    """The bytes of single tokens. tokenizer: a transformers tokenizer, or an object that decodes lists of ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = _decoder_types(tokenizer)
        self._is_byte_level = "ByteLevel" in decoder
        self._has_fallback = "ByteFallback" in decoder
        self._special = {i: str(t) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items()}

    def __call__(self, token_id: int) -> bytes:
        if token_id in self._special:
            return self._special[token_id].encode()
        if self._is_byte_level or self._has_fallback:
            piece = self._tokenizer.convert_ids_to_tokens(token_id)
            # The logits may have more entries than the tokenizer has ids.
            if piece is None:
                return b""
            if self._is_byte_level and all(char in _letters() for char in piece):
                return bytes(_letters()[char] for char in piece)
            if self._has_fallback:
                if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                    return bytes([int(piece[3:5], 16)])
                return str(piece).replace("▁", " ").encode()
        return str(self._tokenizer.decode([token_id])).encode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is one of the added tokens, such as the end of a text."""
        return token_id in self._special

    def text(self, token_id: int) -> str:
        """The token as text, with U+FFFD for invalid bytes."""
        return self(token_id).decode("utf-8", "replace")


def _decoder_types(tokenizer: Any) -> set[str]:
    """The kinds of decoders that a fast tokenizer is made of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return {part.get("type", "") for part in (decoder, *decoder.get("decoders", ()))}


@lru_cache(maxsize=1)
def _letters() -> dict[str, int]:
    """The letters with which byte-level tokenizers write bytes. Printable bytes stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
