"""`orthrus chat`: turns in a terminal, or one turn per line of a pipe."""

import os
import sys
from collections.abc import Callable
from secrets import randbits
from typing import Annotated, Any

import typer

from orthrus.base.text import printable
from orthrus.cli import options
from orthrus.cli.chat_commands import ChatState, Leave, run_slash_command
from orthrus.cli.chat_partner import LocalPartner, Messages, Partner
from orthrus.cli.chat_server import ServerPartner
from orthrus.cli.common import cancel_on_interrupt, check_decode, parse_logit_bias, say_error, stdin_lines
from orthrus.cli.render import counted, footer, note, print_stream
from orthrus.errors import OrthrusError, UserInputError
from orthrus.types import GenerationResult

QUOTES = '"""'
_SERVER = "Server"


def chat(
    model: options.Model = None,
    named_model: options.NamedModel = None,
    view: options.View = "default",
    max_new_tokens: options.MaxNewTokens = 512,
    strategy: options.DecodeStrategy = "auto",
    block_size: options.BlockSize = None,
    node_budget: options.NodeBudget = 24,
    block_budget: options.BlockBudget = 3,
    floor: options.Floor = True,
    copies: options.Copies = True,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    logit_bias: options.LogitBias = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    system: options.System = None,
    dtype: options.Dtype = None,
    draft_dtype: options.DraftDtype = None,
    draft_vocab: options.DraftVocab = None,
    runner: options.Runner = None,
    device: options.Device = None,
    revision: options.Revision = None,
    attn: options.Attention = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Talk to a running server, ours or any with an OpenAI-compatible API, such as "
            "http://127.0.0.1:8000. MODEL is then the server's name for the model.",
            rich_help_panel=_SERVER,
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="The server's key. Other users of the machine can see a command's arguments; "
            f"{options.KEY_VARIABLE} in the environment does the same.",
            rich_help_panel=_SERVER,
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Also answer with plain decoding; show both times and any difference."
        ),
    ] = False,
    color: options.Color = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk with a model; it remembers the turns.

    Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. If stdin is not a terminal, each of its lines
    is a turn.
    """
    decode: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "strategy": strategy,
        "block_size": block_size,
        "node_budget": node_budget,
        "block_budget": block_budget,
        "floor": floor,
        "copies": copies,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "logit_bias": parse_logit_bias(logit_bias or ()),
        "seed": seed,
        "stop": options.stop_texts(stop),
        "ignore_eos": False,
    }
    check_decode(decode)
    load = {
        "view": view,
        "dtype": dtype,
        "draft_dtype": draft_dtype,
        "draft_vocab": draft_vocab,
        "runner": runner,
        "device": device,
        "revision": revision,
        "attn_implementation": attn,
    }
    chosen = None if model is None and named_model is None else options.one_model(model, named_model)
    partner: Partner
    if url is None:
        if api_key is not None:
            raise UserInputError("--api-key is a server's; give its --url too, or drop it.")
        partner = LocalPartner.load(chosen or "default", decode, quiet=quiet, **load)
    else:
        if given := [n for n, value in load.items() if value not in (None, "default")]:
            name = given[0].replace("_", "-").removesuffix("-implementation")
            raise UserInputError(f"--{name} is the server's to choose; drop it, or --url.")
        partner = ServerPartner(url, api_key or os.environ.get(options.KEY_VARIABLE), chosen)
    if compare:
        partner.check_compare()
    if color:
        partner.marker()
    state = ChatState(partner, system, decode=decode, color=color, compare=compare, quiet=quiet)
    if not quiet:
        _header(partner)
    if sys.stdin.isatty():
        _terminal(state)
    else:
        _lines(state)


def _lines(state: ChatState) -> None:
    """A chat through a pipe. The first error ends it, as scripts expect."""
    for text in stdin_lines():
        if not text.strip():
            continue
        try:
            _turn(state, text)
        except Leave:
            return


def _terminal(state: ChatState) -> None:
    """A chat in a terminal. It prints errors and continues."""
    ask = _editor()
    while True:
        try:
            text = _read_turn(ask)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if not text.strip():
            continue
        try:
            _turn(state, text)
        except Leave:
            return
        except OrthrusError as error:
            say_error(str(error))


def _editor() -> Callable[[str], str]:
    """A line editor that writes to stderr, with the history of earlier chats."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    from orthrus.base.storage import cache_dir

    history: History
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        history_file = cache_dir() / "chat_history"
        history_file.touch(mode=0o600)
        history = FileHistory(str(history_file))
    except OSError:
        # Without a writable cache folder the chat has no history.
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession(history=history)
    return session.prompt


def _read_turn(ask: Callable[[str], str]) -> str:
    """One line, or all lines between triple quotes."""
    line = ask(">>> ")
    if not line.lstrip().startswith(QUOTES):
        return line
    text = line.lstrip().removeprefix(QUOTES)
    while QUOTES not in text:
        text += "\n" + ask("... ")
    return text.split(QUOTES, 1)[0].strip("\n")


def _turn(state: ChatState, text: str) -> None:
    if text.startswith("/"):
        run_slash_command(state, text)
        return
    asked = [*state.messages, {"role": "user", "content": text}]
    decode = state.decode
    if state.compare and decode["seed"] is None:
        # Both answers must draw with the same noise.
        decode = decode | {"seed": randbits(53)}
    marker = state.partner.marker() if state.color else None
    answering = state.partner.answer(asked, decode)
    with cancel_on_interrupt(answering) as interrupt:
        print_stream(answering, marker)
    result = answering.result
    state.messages = [*asked, {"role": "assistant", "content": result.text}]
    state.results.append(result)
    if not state.quiet:
        note(footer(result.stats, result.finish_reason))
    if state.compare and not interrupt.happened:
        _compare(state, asked, decode, result)


def _compare(state: ChatState, asked: Messages, decode: dict[str, Any], answer: GenerationResult) -> None:
    """Decode the same turn plainly, without showing its text."""
    answering = state.partner.answer(asked, decode | {"strategy": "ar"})
    with cancel_on_interrupt(answering) as interrupt:
        for _ in answering:
            pass
    plain = answering.result
    if interrupt.happened:
        return
    ours_s, plain_s = (r.stats.seconds for r in (answer, plain))
    is_same = (plain.token_ids, plain.text) == (answer.token_ids, answer.text)
    what = "tokens" if answer.token_ids else "text"
    note(
        f"plain decoding: {plain_s:.2f} s for {counted(plain.stats.num_tokens, 'token')} in "
        f"{counted(plain.stats.num_passes, 'pass')}, {'the same' if is_same else 'DIFFERENT'} {what}; "
        f"{decode['strategy']}: {ours_s:.2f} s for {answer.stats.num_tokens} in "
        f"{counted(answer.stats.num_passes, 'pass')}"
    )


def _header(partner: Partner) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    rows = [*partner.header(), ("keys", "Ctrl-C stops an answer, Ctrl-D leaves, /help lists commands")]
    body = Text(printable("\n".join(f"{name:<11}{value}" for name, value in rows)))
    Console(stderr=True).print(Panel(body, title="orthrus chat", expand=False))
