"""The slash commands of `orthrus chat`."""

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orthrus.base.paths import expanded
from orthrus.cli.chat_partner import Messages, Partner
from orthrus.cli.common import check_decode, parse_logit_bias
from orthrus.cli.render import counted, note
from orthrus.errors import UserInputError
from orthrus.types import GenerationResult


class Leave(Exception):  # noqa: N818  (no error: the user said /bye)
    """The chat is over."""


@dataclass
class ChatState:
    """What a chat's commands may look at and change; `decode` holds the keywords of each turn.

    messages: a turn is added when its answer has been read to its end, or was stopped.
    """

    partner: Partner
    system: str | None
    decode: dict[str, Any]
    color: bool = False
    compare: bool = False
    quiet: bool = False
    messages: Messages = field(default_factory=list)
    results: list[GenerationResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """All turns; the system prompt stays."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.results.clear()


def run_slash_command(state: ChatState, line: str) -> None:
    """Run one `/name arguments` line; UserInputError for an unknown or misused one, Leave for /bye."""
    name, _, rest = line[1:].strip().partition(" ")
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, n=1)
        hint = f"did you mean /{close[0]}?" if close else "/help lists the commands."
        raise UserInputError(f"there is no command /{name}; {hint}")
    _COMMANDS[name][0](state, rest.strip())


def _help(state: ChatState, rest: str) -> None:
    note("\n".join(f"{usage:<18} {what}" for _, usage, what in _COMMANDS.values()))
    note('""" begins and ends a turn of several lines')


def _clear(state: ChatState, rest: str) -> None:
    state.forget()
    note("forgot all turns")


def _set(state: ChatState, rest: str) -> None:
    name, _, value = rest.partition(" ")
    switches = {"color": state.color, "compare": state.compare}
    if not name:
        note("\n".join(f"{key} {_shown(val)}" for key, val in (state.decode | switches).items()))
        return
    name = name.replace("-", "_")
    if name not in state.decode and name not in switches:
        close = difflib.get_close_matches(name, [*state.decode, *switches], n=1)
        hint = f"did you mean {close[0]}?" if close else "/set alone lists all."
        raise UserInputError(f"there is no setting {name}; {hint}")
    if name in switches:
        is_on = _switch(name, value.strip())
        if is_on and name == "color":
            state.partner.marker()
        elif is_on:
            state.partner.check_compare()
        setattr(state, name, is_on)
    else:
        changed = state.decode | {name: _parse(name, value.strip())}
        check_decode(changed)
        state.decode = changed
    note(f"{name} {_shown(getattr(state, name) if name in switches else state.decode[name])}")


def _stats(state: ChatState, rest: str) -> None:
    stats = [r.stats for r in state.results]
    num_tokens, num_passes = sum(s.num_tokens for s in stats), sum(s.num_passes for s in stats)
    num_drafted, num_accepted = sum(s.num_drafted for s in stats), sum(s.num_accepted for s in stats)
    seconds = sum(s.seconds for s in stats)
    note(
        f"{counted(len(stats), 'turn')}, {counted(num_tokens, 'token')} in {seconds:.2f} s · "
        f"tokens per forward {_ratio(num_tokens, num_passes):.2f} = {num_tokens} / {counted(num_passes, 'pass')} · "
        f"acceptance rate {_ratio(num_accepted, num_drafted):.0%} = {num_accepted} / {counted(num_drafted, 'draft')}"
    )


def _save(state: ChatState, rest: str) -> None:
    from orthrus.base.outputs import write_text_atomic

    if not rest:
        raise UserInputError("name a file, as in: /save chat.json")
    try:
        file = expanded(rest)
        exists = file.exists()
    except (OSError, ValueError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e)
        raise UserInputError(
            f"{rest[:200]} cannot be written ({reason.rstrip('.')}); name another file."
        ) from e
    if exists:
        raise UserInputError(f"{file} exists already; name a new file.")
    content = {
        "model": state.partner.describe(),
        "decode": state.decode,
        "messages": state.messages,
        "stats": [r.stats.to_dict() for r in state.results],
    }
    write_text_atomic(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    note(f"wrote {counted(len(state.messages), 'message')} to {file}")


def _bye(state: ChatState, rest: str) -> None:
    raise Leave


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return " ".join(f"{token_id}={number:g}" for token_id, number in value.items())
    return "none" if value is None or value == () else str(value)


def _switch(name: str, value: str) -> bool:
    if value.lower() in ("on", "true", "yes", "1"):
        return True
    if value.lower() in ("off", "false", "no", "0"):
        return False
    raise UserInputError(f"{name} is on or off, not '{value}'.")


def _parse(name: str, value: str) -> Any:
    """The text of a setting as its type; UserInputError when it is none."""
    if name == "strategy":
        return value
    if name == "stop":
        return () if value in ("", "none") else (value,)
    if name == "logit_bias":
        return None if value in ("", "none") else parse_logit_bias(value.split())
    if name in ("floor", "copies", "ignore_eos"):
        return _switch(name, value)
    if value == "none" and name in ("block_size", "top_k", "top_p", "min_p", "seed"):
        return None
    kind = float if name in ("temperature", "top_p", "min_p", "repetition_penalty") else int
    try:
        return kind(value)
    except ValueError as error:
        what = "a number" if kind is float else "a whole number"
        raise UserInputError(f"{name} must be {what}, not '{value}'.") from error


_COMMANDS: dict[str, tuple[Callable[[ChatState, str], None], str, str]] = {
    "help": (_help, "/help", "list the commands"),
    "clear": (_clear, "/clear", "forget all turns; the system prompt stays"),
    "set": (_set, "/set NAME VALUE", "change a setting, such as temperature or color; /set alone lists them"),
    "stats": (_stats, "/stats", "sums over all turns since the last /clear"),
    "save": (_save, "/save FILE", "write the conversation as JSON"),
    "bye": (_bye, "/bye", "leave, as Ctrl-D does"),
}
