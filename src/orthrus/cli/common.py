"""The common parts of all commands: errors and warnings as one line each, loading with progress, Ctrl-C."""

import logging
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import typer

from orthrus.base.text import printable
from orthrus.cli.progress import ProgressDisplay
from orthrus.config import FIXED_STRATEGIES, STRATEGIES, DecodeConfig, Grammar, SamplingParams, Strategy
from orthrus.errors import MissingExtraError, OrthrusError, OrthrusWarning, UserInputError

if TYPE_CHECKING:
    from orthrus.api import Orthrus

UNEXPECTED, USAGE, INTERRUPTED = 1, 2, 130
# SIGTERM comes from batch systems and containers, SIGHUP from a terminal that closes.
KILLS: tuple[int, ...] = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n))

# Newer versions of typer contain their parser, so the base class of usage errors has no stable public name.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


@dataclass
class Session:
    """Settings of the whole invocation, from options before the command's name."""

    verbose: bool = False


session = Session()


def run_command(command: Any, args: list[str] | None = None) -> int:
    """Run a typer command and return the exit status. Every error becomes one line on stderr."""
    session.verbose = False
    args = sys.argv[1:] if args is None else args
    # A character that the terminal cannot show becomes a question mark instead of a traceback.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    with _warnings_as_lines(), handling(KILLS, _leave):
        try:
            status = command.main(args=args or ["--help"], prog_name="orthrus", standalone_mode=False)
            sys.stdout.flush()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            # The reader of stdout has gone. Without this, the flush at exit would fail with a traceback.
            sys.stdout = None
            return UNEXPECTED
        except Exception as error:
            return _report(error)
    return status if isinstance(status, int) else 0


def _report(error: Exception) -> int:
    if isinstance(error, OrthrusError | _UsageError):
        if session.verbose:
            traceback.print_exception(error)
        say_error(_usage_message(error) if isinstance(error, _UsageError) else str(error))
        return USAGE
    if session.verbose:
        traceback.print_exception(error)
        return UNEXPECTED
    what = " ".join(f"{type(error).__name__}: {error}".split())
    say_error(f"unexpected {what}; rerun as `orthrus --verbose ...` to see where, and please report it.")
    return UNEXPECTED


def _usage_message(error: Any) -> str:
    """typer's own message, with its suggestions as a question, and the command for help."""
    options = getattr(error, "possibilities", None)
    message = error.message if options else error.format_message()
    if options:
        message = f"{message.rstrip('.')}. Did you mean {' or '.join(sorted(options))}?"
    path = error.ctx.command_path if getattr(error, "ctx", None) is not None else "orthrus"
    # typer passes on the wording of the library that checks values.
    message = message.replace("Value error, ", "").rstrip(".")
    hint = ""
    if type(error).__name__ == "NoSuchOption" and path.endswith("generate"):
        hint = ' A prompt that begins with a dash goes behind --, as in: orthrus generate -- "-5 + 3 = ?"'
    return f"{message}{'' if message.endswith('?') else '.'} See `{path} --help`.{hint}"


def say_error(message: str) -> None:
    """Print `error: ...` on stderr, always in one line."""
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each OrthrusWarning once, as a line. Hide warnings of libraries, unless verbose."""
    with warnings.catch_warnings():
        shown: set[str] = set()
        in_full = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if session.verbose:
                in_full(message, category, *where, **more)
            elif issubclass(category, OrthrusWarning) and str(message) not in shown:
                shown.add(str(message))
                print(f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)

        warnings.showwarning = show
        warnings.simplefilter("always", OrthrusWarning)
        yield


def load_orthrus(model: str, *, quiet: bool = False, **options: Any) -> "Orthrus":
    """`Orthrus.load` with the same options, and with a progress display on stderr."""
    with ProgressDisplay(quiet=quiet) as on_progress:
        on_progress.spin("starting")
        from orthrus.api import Orthrus

        orthrus = Orthrus.load(model, on_progress=on_progress, **options)
    if not session.verbose:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    return orthrus


def time_passes(orthrus: "Orthrus", strategies: Iterable[str], *, quiet: bool = False) -> None:
    """Measure the costs by which `auto` decides, if needed, with a message meanwhile."""
    if "auto" in strategies:
        with ProgressDisplay(quiet=quiet, unit="rounds") as on_progress:
            orthrus.time_passes(
                partial(
                    on_progress, "timing passes for this machine, model and precision (the first starts do)"
                )
            )


def need_serve(what: str, *packages: str) -> None:
    """Raises MissingExtraError unless these packages of the extra `serve` are installed. what: needs them."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise MissingExtraError(
                f'{what} needs the package {error.name}; run `pip install "orthrus-lm[serve]"`.'
            ) from error


def quiet_libraries() -> None:
    """Silence the messages on missing kernels from libraries that transformers imports with every model."""
    for library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)


def check_decode(decode: dict[str, Any]) -> None:
    """Raises UserInputError for a wrong decoding option, before the model and torch are loaded."""
    names = {field.name for field in fields(SamplingParams)}
    sampling = {name: value for name, value in decode.items() if name in names}
    others = {name: value for name, value in decode.items() if name not in names}
    DecodeConfig(**others, sampling=SamplingParams(**sampling))


def plain_settings(decode: dict[str, Any]) -> dict[str, Any]:
    """Decoding options as JSON values."""
    return {name: asdict(value) if isinstance(value, Grammar) else value for name, value in decode.items()}


def parse_logit_bias(pairs: Iterable[str]) -> dict[int, float] | None:
    """The texts ID=VALUE as a mapping; None without texts. Raises UserInputError for a wrong one."""
    bias: dict[int, float] = {}
    for pair in pairs:
        token_id, _, value = pair.partition("=")
        try:
            key, number = int(token_id), float(value)
        except ValueError as error:
            raise UserInputError(
                f"a logit bias is a token id and a number, as in 42=-100, not '{pair}'."
            ) from error
        if key in bias:
            raise UserInputError(f"token {key} has two logit biases; give one.")
        bias[key] = number
    return bias or None


def check_strategies(names: list[str] | None) -> tuple[Strategy, ...]:
    """The requested strategies, each once; by default all fixed ones. Raises UserInputError for an unknown one."""
    for name in names or ():
        if name not in STRATEGIES:
            raise UserInputError(f"there is no strategy '{name}'; choose among {', '.join(STRATEGIES)}.")
    return tuple(s for s in STRATEGIES if s in names) if names else FIXED_STRATEGIES


def read_stdin() -> str:
    """All of stdin as text, without a byte order mark. Raises UserInputError if it is not UTF-8.

    Whatever the locale: in some, Python takes other bytes for half characters.
    """
    buffer = getattr(sys.stdin, "buffer", None)
    try:
        if buffer is None:
            return sys.stdin.read().removeprefix("\ufeff")
        text: str = buffer.read().decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserInputError(
            f"stdin is not valid text ({error.reason}); give the prompt as UTF-8."
        ) from error


def stdin_lines() -> Iterator[str]:
    """The lines of stdin as they arrive, without their ends and a byte order mark. Raises as `read_stdin`."""
    buffer = getattr(sys.stdin, "buffer", None)
    try:
        for number, line in enumerate(sys.stdin if buffer is None else buffer):
            text = line.decode("utf-8") if isinstance(line, bytes) else line
            yield (text if number else text.removeprefix("\ufeff")).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserInputError(f"stdin is not valid text ({error.reason}); give it as UTF-8.") from error


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Interrupt:
    """Whether a signal asked the program to leave, and the exit status for that signal."""

    def __init__(self) -> None:
        self.happened = False
        self.status = INTERRUPTED


@contextmanager
def cancel_on_interrupt(stream: Cancellable, *, on_kill: bool = False) -> Iterator[Interrupt]:
    """The first Ctrl-C lets the stream end after the current cycle. The second one raises at once.

    on_kill: treat SIGTERM and SIGHUP in the same way. By default they end the program at once.
    """
    interrupt = Interrupt()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interrupt.happened:
            raise leaving(number)
        interrupt.happened, interrupt.status = True, leaving(number).status
        stream.cancel()

    with handling([signal.SIGINT, *(KILLS if on_kill else ())], on_signal):
        yield interrupt


class Killed(SystemExit):
    """SIGTERM or SIGHUP asked the program to leave. `status`: the exit status, as a shell reports it."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C."""

    status = INTERRUPTED


def leaving(number: int) -> Interrupted | Killed:
    """The exception for a signal that asks the program to leave."""
    return Interrupted() if number == signal.SIGINT else Killed(number)


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` for these signals, except those that the parent process set to be ignored (as nohup does).

    Does nothing outside the main thread, because only that one gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            # None: a handler that was not set from Python, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _leave(number: int, frame: FrameType | None) -> None:
    """Leave by an exception, so that files are complete and temporary ones are removed."""
    raise leaving(number)
