"""The traffic log: chats with their answers, one JSON line each, in the format that `synth` and `adapt` read."""

import json
import logging
import os
import queue
import stat
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orthrus.api import Orthrus
from orthrus.base.prompt import checked_messages
from orthrus.decoding.stats import summarise
from orthrus.engine.request import Request
from orthrus.errors import StorageError, UserInputError
from orthrus.server.calls import Call
from orthrus.server.figures import TextRecords
from orthrus.server.prompts import chat_turns
from orthrus.server.schemas import Message

log = logging.getLogger("orthrus.server")
MOST_WAITING = 256
"""Limit on the lines that wait to be written. Further ones are dropped."""
LAST_WORDS = 5.0
"""Time limit, in seconds, for writing the waiting lines on shutdown."""
_MODE = 0o600


@dataclass(frozen=True, slots=True)
class _Line:
    orthrus: Orthrus
    request_id: str
    messages: Sequence[Message]
    records: TextRecords


class TrafficLog:
    """Appends chats to a file from a separate thread; callers never wait.

    Raises UserInputError if the path is no file, and StorageError if the file cannot be written. A later error drops
    lines. The log reports it once, and again only after a line has been written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            handle = self._opened()
            if os.fstat(handle).st_mode & (stat.S_IRGRP | stat.S_IROTH):
                log.warning("others can read the traffic", extra={"data": {"file": str(file)}})
            os.close(handle)
        except OSError as error:
            raise StorageError(
                f"traffic cannot be logged to {file} ({_reason(error)}); name a file in a folder where you may "
                "write."
            ) from error
        self._lines: queue.Queue[_Line | None] = queue.Queue(MOST_WAITING)
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="orthrus-traffic", daemon=True)
        self._thread.start()

    def offer(self, orthrus: Orthrus, call: Call, request: Request) -> None:
        """Log an answer that has ended. Called in the event loop."""
        origin = call.origin
        if origin is None or origin.messages is None or not request.is_answer:
            return
        num_prompt_tokens, strategy = len(request.prompt_ids), request.config.strategy
        records = TextRecords(num_prompt_tokens, strategy, list(request.cycles), request.num_cached)
        line = _Line(orthrus, origin.request_id, origin.messages, records)
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._failed("too many lines wait")

    def close(self) -> None:
        """Write the waiting lines, for `LAST_WORDS` seconds at most."""
        try:
            self._lines.put(None, timeout=LAST_WORDS)
        except queue.Full:
            return
        self._thread.join(LAST_WORDS)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                content = _content(line)
                if content is not None:
                    self._append((json.dumps(content) + "\n").encode())
                    self._failing = False
            except OSError as error:
                self._failed(_reason(error))
            except Exception:
                log.exception("a line of traffic cannot be written")

    def _failed(self, reason: str) -> None:
        if not self._failing:
            self._failing = True
            log.warning("traffic is not logged", extra={"data": {"file": str(self.file), "reason": reason}})

    def _append(self, line: bytes) -> None:
        """Write the whole line or nothing. Opening the file each time creates a new one if it was moved away."""
        handle = self._opened()
        try:
            size = os.fstat(handle).st_size
            # Whatever stands there without its end would swallow the first line.
            begun = size > 0 and self._last_byte() != b"\n"
            try:
                view = memoryview(b"\n" + line if begun else line)
                while view:
                    view = view[os.write(handle, view) :]
            except OSError:
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)

    def _last_byte(self) -> bytes:
        with self.file.open("rb") as content:
            content.seek(-1, os.SEEK_END)
            return content.read(1)

    def _opened(self) -> int:
        # Without O_NONBLOCK, opening a pipe that nobody reads would block.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(self.file, flags, _MODE)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserInputError(f"{self.file} is no ordinary file; name another one for the traffic.")
        return handle


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else type(error).__name__


def _content(line: _Line) -> dict[str, Any] | None:
    """The JSON of a line; None for a dialogue with tool calls, which a line of text cannot reproduce.

    An answer that a limit or a stop string cut short is left out, so that `adapt` lets the model write a whole one.
    """
    if any(message.tool_calls or message.role == "tool" for message in line.messages):
        return None
    turns = checked_messages(chat_turns(line.orthrus, line.messages))
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    records = line.records
    stats = summarise(records.num_prompt_tokens, records.cycles, records.num_cached)
    ids = [token_id for cycle in records.cycles for token_id in cycle.token_ids]
    if records.text.strip() and ids[-1] in line.orthrus.base.eos_token_ids:
        # The request continued a last message of the assistant.
        begun = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        messages.append({"role": "assistant", "content": begun + records.text})
    elif messages[-1]["role"] == "assistant":
        messages.pop()
    return {
        "messages": messages,
        "request_id": line.request_id,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "finish_reason": records.finish,
        "strategy": records.strategy,
        "num_tokens": stats.num_tokens,
        "num_cycles": stats.num_cycles,
        "num_drafted": stats.num_drafted,
        "num_accepted": stats.num_accepted,
        "tokens_per_cycle": round(stats.tokens_per_cycle, 4),
    }
