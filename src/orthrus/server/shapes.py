"""Bodies of answers, whole and in chunks, as OpenAI's interface has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orthrus.server.figures import Told, finish_reason
from orthrus.server.tokens import TokenBytes
from orthrus.types import Cycle, TokenLogprob


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of an answer repeat."""

    id: str
    created: int
    model: str
    fingerprint: str | None

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class ChatShape:
    """Choices of /v1/chat/completions."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, token_bytes: TokenBytes, *, token_ids: bool) -> None:
        self._bytes, self._token_ids = token_bytes, token_ids

    def first(self, index: int) -> dict[str, Any] | None:
        """What a choice begins with."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunk(self, index: int, cycle: Cycle) -> dict[str, Any] | None:
        """What a record adds to a choice; None where it adds nothing."""
        if not cycle.text and not cycle.logprobs and not (self._token_ids and cycle.token_ids):
            return None
        logprobs = None if cycle.logprobs is None else {"content": self._content(cycle.logprobs)}
        chunk = self._chunk(index, {"content": cycle.text}, logprobs, None)
        if self._token_ids:
            chunk["token_ids"] = list(cycle.token_ids)
        return chunk

    def last(self, index: int, finish: str | None) -> dict[str, Any]:
        """The end of a choice."""
        return self._chunk(index, {}, None, finish_reason(finish))

    def whole(self, index: int, told: Told) -> dict[str, Any]:
        """A choice in one piece."""
        found = [c.logprobs for c in told.cycles if c.logprobs is not None]
        choice: dict[str, Any] = {
            "index": index,
            "message": {
                "role": "assistant",
                "content": "".join(c.text for c in told.cycles),
                "refusal": None,
            },
            "logprobs": {"content": self._content([lp for some in found for lp in some])} if found else None,
            "finish_reason": finish_reason(told.finish),
        }
        if self._token_ids:
            choice["token_ids"] = [i for c in told.cycles for i in c.token_ids]
        return choice

    @staticmethod
    def _chunk(index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _content(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        return [
            self._entry(lp.token_id, lp.logprob)
            | {"top_logprobs": [self._entry(token_id, value) for token_id, value in lp.top]}
            for lp in logprobs
        ]

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._bytes.text(token_id),
            "logprob": logprob,
            "bytes": list(self._bytes(token_id)),
        }


class TextShape:
    """Choices of /v1/completions. echoes: by choice, what is shown before its text, and the prompt's ids."""

    whole_kind = chunk_kind = "text_completion"

    def __init__(
        self, token_bytes: TokenBytes, echoes: Sequence[str], prompts: Sequence[list[int]], *, token_ids: bool
    ) -> None:
        self._bytes, self._token_ids = token_bytes, token_ids
        self._echoes, self._prompts = echoes, prompts
        self._offsets = [0] * len(echoes)

    def first(self, index: int) -> dict[str, Any] | None:
        """The prompt where it is echoed."""
        return self._choice(index, self._echoes[index], None, None) if self._echoes[index] else None

    def chunk(self, index: int, cycle: Cycle) -> dict[str, Any] | None:
        """What a record adds to a choice; None where it adds nothing."""
        if not cycle.text and not cycle.logprobs and not (self._token_ids and cycle.token_ids):
            return None
        logprobs = None if cycle.logprobs is None else self._lists(index, cycle.logprobs)
        chunk = self._choice(index, cycle.text, logprobs, None)
        if self._token_ids:
            chunk["token_ids"] = list(cycle.token_ids)
        return chunk

    def last(self, index: int, finish: str | None) -> dict[str, Any]:
        """The end of a choice."""
        return self._choice(index, "", None, finish_reason(finish))

    def whole(self, index: int, told: Told) -> dict[str, Any]:
        """A choice in one piece."""
        found = [c.logprobs for c in told.cycles if c.logprobs is not None]
        text = self._echoes[index] + "".join(c.text for c in told.cycles)
        logprobs = self._lists(index, [lp for some in found for lp in some]) if found else None
        choice = self._choice(index, text, logprobs, finish_reason(told.finish))
        if self._token_ids:
            choice["token_ids"] = [i for c in told.cycles for i in c.token_ids]
            choice["prompt_token_ids"] = self._prompts[index]
        return choice

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _lists(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [self._bytes.text(lp.token_id) for lp in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        tops: list[dict[str, float]] = []
        for lp in logprobs:
            # Tokens of half a character look alike: the most probable one stands for them.
            top: dict[str, float] = {}
            for token_id, value in (*lp.top, (lp.token_id, lp.logprob)):
                top.setdefault(self._bytes.text(token_id), value)
            tops.append(top)
        return {
            "tokens": tokens,
            "token_logprobs": [lp.logprob for lp in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
