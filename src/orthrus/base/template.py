"""Chat templates are programs from a folder: they run in transformers' sandbox, and here with bounds besides.

The sandbox keeps a template from the machine, not from running for ever or asking for all memory. So values
stay below a size, checked before they are made, and a template has seconds, checked at each of its lines.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from itertools import islice
from types import FrameType
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orthrus.errors import UserInputError

SECONDS = 5.0
LARGEST = 4_000_000
"""Characters of a value; an element of a list counts as `_ELEMENT`."""
_ELEMENT = 16
WIDEST = 1_000
"""The largest number that a text method or filter takes: widths, indents, counts."""
_FILE = "<chat template>"
# Their result cannot be foreseen from their arguments alone, and no chat template needs them.
_REFUSED_METHODS = ("expandtabs", "translate")
_WIDE_FORMAT = re.compile(r"\d{4,}|%[^a-zA-Z]*\*")


class TooLargeError(TemplateError):
    """A template asked for more than it may have."""


def render(source: str, values: Mapping[str, Any]) -> str:
    """The text that a chat template makes of `values` (messages and the like).

    Raises UserInputError for whatever goes wrong inside the template, its own refusals among it, and for one
    that takes longer than `SECONDS` or builds more than `LARGEST` characters.
    """
    try:
        template = _compiled(source)
        with _deadline(SECONDS):
            return _joined(template.generate(values))
    except TemplateError as error:
        # Templates state their own rules this way, such as "roles must alternate".
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise UserInputError(f"The model's chat template refuses these messages ({reason}).") from error
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")[:200]
        raise UserInputError(
            f"The model's chat template fails on these messages ({reason}): change them, or use the text as it "
            "stands (raw)."
        ) from error


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    # Filters, globals and switches are transformers' own, whatever they are in this release. The source itself
    # is not for that environment, which works out constants while it compiles.
    theirs = _compile_jinja_template("").environment
    ours = object.__new__(_Bounded)
    ours.__dict__.update(theirs.__dict__)
    ours.cache = None
    ours.extensions = {name: extension.bind(ours) for name, extension in theirs.extensions.items()}
    ours.filters = {name: _bounded_filter(name, function) for name, function in theirs.filters.items()}
    ours.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
    ours.finalize = _weighed
    code = ours.compile(source, filename=_FILE)
    return ours.template_class.from_code(ours, code, ours.make_globals(None))


class _Generator(CodeGenerator):
    """Lets `~` ask before it joins."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802  (jinja's name)
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(environment.finalize(")
            self.visit(part, frame)
            self.write(")), ")
        self.write("))")


def _joined(parts: Iterable[str]) -> str:
    kept, total = [], 0
    for part in parts:
        total += len(part)
        _require(total)
        kept.append(part)
    return "".join(kept)


class _Bounded(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%", "+"})
    code_generator_class = _Generator
    concat = staticmethod(_joined)  # type: ignore[assignment]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sized, number = (left, right) if isinstance(left, str | list | tuple) else (right, left)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
            _require(bits * 100)
        elif operator == "*" and isinstance(sized, str | list | tuple) and isinstance(number, int):
            _require(_weight(sized) * max(number, 1))
        elif operator == "+" and isinstance(left, str | list | tuple):
            _require(_weight(left) + _weight(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, (right,))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and getattr(value, "__name__", "") in ("format", "format_map"):
            _check_format(text, ())
        return super().wrap_str_format(value)

    def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", "")
        if isinstance(owner, str) or name in ("format", "format_map"):
            _check_text(name, owner if isinstance(owner, str) else "", (*args, *kwargs.values()))
        return super().call(context, called, *args, **kwargs)


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # Some filters get the environment or the context first.
        given = args[1:] if getattr(function, "jinja_pass_arg", None) is not None else args
        if given and name == "join" and not isinstance(given[0], str | list | tuple | dict):
            given = ([*islice(given[0], LARGEST // _ELEMENT)], *given[1:])
            args = (*args[: len(args) - len(given)], *given)
        if given:
            _weighed(given[0])
            _check_text(name, given[0] if isinstance(given[0], str) else "", (*given[1:], *kwargs.values()))
        if name == "join" and given:
            between = str(given[1]) if len(given) > 1 else str(kwargs.get("d", ""))
            _require(_weight(given[0]) + len(between) * len(given[0]))
        return function(*args, **kwargs)

    return checked


def _check_text(name: str, text: str, args: tuple[Any, ...]) -> None:
    """Refuse a text method or filter whose result may be too large."""
    if name in _REFUSED_METHODS:
        raise TooLargeError(f"{name} is not allowed in a chat template")
    for value in args:
        if isinstance(value, int) and abs(value) > WIDEST and name not in ("round", "default", "d"):
            raise TooLargeError(f"{name} with {value} is too large for a chat template")
        _weighed(value)
    if name == "replace" and len(args) > 1:
        old, new = str(args[0]), str(args[1])
        _require(len(text) + text.count(old) * len(new))
    elif name == "join" and args and isinstance(args[0], list | tuple | str | dict):
        _require(_weight(args[0]) + len(text) * len(args[0]))
    elif name in ("format", "format_map"):
        _check_format(text, args)
    elif name == "indent":
        _require(len(text) + (text.count("\n") + 1) * next((v for v in args if type(v) is int), 4))


def _check_format(text: str, args: tuple[Any, ...]) -> None:
    if _WIDE_FORMAT.search(text):
        raise TooLargeError("a format as wide as this is too large for a chat template")
    _require(len(text) + len(text) // 2 * sum(_weight(value) for value in args))


def _weighed(value: Any) -> Any:
    """The value, when writing it out would not be too long."""
    _weight(value)
    return value


def _weight(value: Any) -> int:
    """About how many characters and elements a value is written with; refuses too many."""
    total, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            left += item
        total += _ELEMENT
        _require(total + _ELEMENT * len(left))
    return total


def _require(size: int) -> None:
    if size > LARGEST:
        raise TooLargeError(f"it builds more than {LARGEST:,} characters")


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """TooLargeError at a line of a template that is reached too late; only this thread is watched."""
    end = time.monotonic() + seconds

    def at_line(frame: FrameType, event: str, value: Any) -> Any:
        if time.monotonic() > end:
            raise TooLargeError(f"it takes longer than {seconds:g} seconds")
        return at_line

    def at_call(frame: FrameType, event: str, value: Any) -> Any:
        return at_line if frame.f_code.co_filename == _FILE else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(before)
