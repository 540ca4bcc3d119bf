"""The settings of a server, checked when they are created."""

from dataclasses import dataclass, field
from pathlib import Path

from orthrus.errors import UserInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Limits and names of a server.

    names: names of the model in requests; the list of models shows the first. By default, the model's own name.
    any_model: accept requests for other models too. api_keys: each of them opens all paths. /health and the page at /
    need no key. Without api_keys the whole server is open. cors_origins: origins whose pages browsers may let in; none
    by default. local: the server listens on a loopback address only. Without api_keys it then refuses requests with
    another host name, against DNS rebinding. max_running, max_queue: answers that may run, and wait, at the same time.
    A request for n texts takes n places. max_tokens: length limit of an answer; None for as many as the context holds.
    max_body: bytes. timeout: seconds from a request to its end. drain: seconds that running answers get after SIGTERM.
    keepalive: seconds of silence after which a stream sends a comment. max_unread: records that a slow reader may
    leave unread before its answer is cancelled. page: serve the page at /. audit_share: share of the answers, from 0
    to 1, that plain decoding decodes again while the engine is idle. log_traffic: the file to which chats and their
    answers are appended; none by default.
    """

    names: tuple[str, ...] = ()
    any_model: bool = False
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    local: bool = False
    max_running: int = 32
    max_queue: int = 128
    max_tokens: int | None = None
    max_body: int = 8 * 2**20
    timeout: float = 600.0
    drain: float = 30.0
    keepalive: float = 10.0
    max_unread: int = 4096
    page: bool = True
    audit_share: float = 0.0
    log_traffic: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "max_body", "max_unread"):
            if getattr(self, name) < 1:
                raise UserInputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_queue < 0:
            raise UserInputError(f"max_queue must be at least 0, not {self.max_queue}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserInputError(f"max_tokens must be at least 1, not {self.max_tokens}.")
        for name in ("timeout", "keepalive"):
            if not getattr(self, name) > 0:
                raise UserInputError(f"{name} must be more than 0 seconds, not {getattr(self, name)}.")
        if not self.drain >= 0:
            raise UserInputError(f"drain must be at least 0 seconds, not {self.drain}.")
        if not 0.0 <= self.audit_share <= 1.0:
            raise UserInputError(f"audit_share must lie between 0 and 1, not {self.audit_share}.")
        for key in self.api_keys:
            if not key:
                raise UserInputError(
                    "an API key is empty; choose another one, or leave out --api-key for none."
                )
            if not key.isascii() or not key.isprintable() or key != key.strip():
                raise UserInputError(
                    "an API key must be printable ASCII without spaces around it; choose another one."
                )
        if "*" in self.cors_origins and self.api_keys == ():
            raise UserInputError(
                "--cors-origin '*' lets any web page use this server; name the origins, or set an API key."
            )

    @property
    def num_places(self) -> int:
        """Answers that may be open at once."""
        return self.max_running + self.max_queue
