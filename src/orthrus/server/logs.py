"""The log: one JSON object per line, with ids, numbers and places in the code, never a prompt or an answer."""

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from typing import Any


class JsonLines(logging.Formatter):
    """Formats a record as one line. An exception is logged by type and origin only; its message may quote a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "data", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            frames = traceback.extract_tb(error.__traceback__)
            line["error"] = type(error).__name__
            line["where"] = [f"{frame.filename}:{frame.lineno}" for frame in frames[-8:]]
        return json.dumps(line)


class BindErrors(logging.Filter):
    """Removes uvicorn's message that it cannot listen, so that we can print our own. reason: why, once known."""

    reason: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if not isinstance(record.msg, OSError):
            return True
        # asyncio adds the address to the reason, in a form that differs between versions.
        number = record.msg.errno or 0
        self.reason = os.strerror(number).lower() if number > 0 else str(record.msg)
        return False


def log_to_stderr() -> None:
    """Send the server's log to stderr."""
    logger = logging.getLogger("orthrus.server")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
