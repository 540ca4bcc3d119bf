"""`orthrus demo`: three prompts, three decoders, to see that the tokens are the same and what they cost."""

import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from orthrus.cli import options
from orthrus.cli.common import (
    INTERRUPTED,
    UNEXPECTED,
    cancel_on_interrupt,
    check_decode,
    load_orthrus,
    time_passes,
)
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.render import DraftMarker, counted, out, print_json, print_stream
from orthrus.types import DecodeStats, GenerationResult

if TYPE_CHECKING:
    from rich.table import Table

    from orthrus.api import Orthrus
    from orthrus.config import Strategy

PROMPTS = (
    (
        "math",
        "A baker makes 24 rolls and sells 3 bags of 5 rolls each. How many rolls are left? Show each step.",
    ),
    ("code", "Write a Python function that returns the n-th Fibonacci number."),
    ("chat", "Why is the sky blue? Answer in three sentences."),
)
EXPLANATION = (
    "The same model answers each prompt three times: by `generate` of the transformers library, by our plain\n"
    "decoding, and by Orthrus, which drafts blocks of tokens and keeps only what the model itself would write.\n"
    "All three must give the same tokens. You see the text of Orthrus as it comes."
)
UNTRAINED = (
    "The view is not trained yet: lossless already, but about one token per pass. Training makes it fast."
)
STOCK, PLAIN, OURS = "transformers", "plain", "Orthrus"


@dataclass(frozen=True)
class Answer:
    """What one decoder wrote. seconds: the time to the first token included."""

    token_ids: tuple[int, ...]
    num_passes: int
    seconds: float

    def first_difference(self, other: "Answer") -> int | None:
        """Index of the first token that differs; None when all are the same."""
        from orthrus.audit.explain import first_difference

        a, b = self.token_ids, other.token_ids
        return None if a == b else first_difference(a, b)

    def to_dict(self) -> dict[str, Any]:
        return {"token_ids": list(self.token_ids), "num_passes": self.num_passes, "seconds": self.seconds}


@dataclass(frozen=True)
class Answers:
    """One prompt, answered by all three."""

    domain: str
    prompt: str
    text: str
    by: dict[str, Answer]
    stats: dict[str, DecodeStats]

    @property
    def differs(self) -> dict[str, int]:
        """Decoder -> index of its first token that is not Orthrus's; empty when all are the same."""
        found = {name: self.by[name].first_difference(self.by[OURS]) for name in (STOCK, PLAIN)}
        return {name: index for name, index in found.items() if index is not None}

    def to_dict(self) -> dict[str, Any]:
        return {
            "domain": self.domain,
            "prompt": self.prompt,
            "same_tokens": not self.differs,
            "first_differences": self.differs,
            "text": self.text,
            "speed_up_over_plain": speed_up([self], PLAIN),
            "speed_up_over_stock": speed_up([self], STOCK),
            "stock": self.by[STOCK].to_dict(),
            "ar": {"token_ids": list(self.by[PLAIN].token_ids), **self.stats[PLAIN].to_dict()},
            "auto": {"token_ids": list(self.by[OURS].token_ids), **self.stats[OURS].to_dict()},
        }


def demo(
    model: options.OnlyNamedModel = "default",
    view: options.View = "default",
    device: options.Device = None,
    max_new_tokens: options.MaxNewTokens = 96,
    color: options.Color = False,
    json: options.Json = False,
) -> None:
    """Answer three prompts with transformers, plain decoding and Orthrus; compare tokens, passes and time.

    Exit status 1 means that a token differed. Runs in float32, where equal means equal. Saves nothing.
    """
    check_decode({"max_new_tokens": max_new_tokens})
    orthrus = load_orthrus(model, view=view, dtype="float32", device=device)
    trained = orthrus.dual.config.trained
    if not json:
        _introduce(orthrus, trained)
    time_passes(orthrus, ["auto"], quiet=json)
    from orthrus.bench.cycles import without_reuse

    # Orthrus answers last, and must not find the prompt in the cache.
    orthrus = without_reuse(orthrus)
    _warm_up(orthrus)
    answers: list[Answers] = []
    for domain, prompt in PROMPTS:
        if not json:
            typer.secho(f"\n{len(answers) + 1}/{len(PROMPTS)} {domain}: {prompt}\n", bold=True)
        answers.append(_answers(orthrus, domain, prompt, max_new_tokens, show=not json, color=color))
        if not json:
            _verdict(answers[-1])
    same = not any(each.differs for each in answers)
    if json:
        content = {"same_tokens": same, "view_trained": trained, "model": orthrus.describe()}
        print_json(content | {"prompts": [each.to_dict() for each in answers]})
    else:
        _summarise(answers, same, trained)
        out(_next_commands(model))
    if not same:
        raise typer.Exit(UNEXPECTED)


def speed_up(answers: list[Answers], over: str) -> float:
    """Wall time of another decoder / wall time of Orthrus, prefill included."""
    return sum(each.by[over].seconds for each in answers) / sum(each.by[OURS].seconds for each in answers)


def _warm_up(orthrus: "Orthrus") -> None:
    """Nobody's first answer pays for lazy initialisation."""
    orthrus.warm_up()
    _stock(orthrus, orthrus.base.encode_prompt(PROMPTS[0][1]), 4)


def _answers(
    orthrus: "Orthrus", domain: str, prompt: str, max_new_tokens: int, *, show: bool, color: bool
) -> Answers:
    # A model without chat template continues the prompt as plain text.
    prompt_ids = orthrus.base.encode_prompt(prompt)
    with ProgressDisplay(quiet=not show) as on_progress:
        on_progress.spin(f"{STOCK} answers")
        stock = _stock(orthrus, prompt_ids, max_new_tokens)
        on_progress.spin(f"{PLAIN} decoding answers")
        plain = _decode(orthrus, prompt_ids, "ar", max_new_tokens)
    marker = DraftMarker(orthrus.base.tokenizer) if color else None
    ours = _decode(orthrus, prompt_ids, "auto", max_new_tokens, show=show, marker=marker)
    return Answers(
        domain,
        prompt,
        ours.text,
        {STOCK: stock, PLAIN: _answer(plain), OURS: _answer(ours)},
        {PLAIN: plain.stats, OURS: ours.stats},
    )


def _stock(orthrus: "Orthrus", prompt_ids: list[int], max_new_tokens: int) -> Answer:
    """The stock model's own `generate`; its passes are counted, not assumed."""
    from orthrus.engine.stock import stock_generate

    model, num_passes = orthrus.stock(), 0

    def count(*_: Any) -> None:
        nonlocal num_passes
        num_passes += 1

    counting = model.register_forward_pre_hook(count)
    try:
        run = stock_generate(
            model,
            prompt_ids,
            max_new_tokens=min(max_new_tokens, orthrus.base.context_length - len(prompt_ids)),
            eos_token_ids=orthrus.base.eos_token_ids,
        )
    finally:
        counting.remove()
    return Answer(run.token_ids, num_passes, (run.ttft_ms + run.decode_ms) / 1e3)


def _decode(
    orthrus: "Orthrus",
    prompt_ids: list[int],
    strategy: "Strategy",
    max_new_tokens: int,
    *,
    show: bool = False,
    marker: DraftMarker | None = None,
) -> GenerationResult:
    from orthrus.api import decode_config

    tokens = orthrus.stream_ids(prompt_ids, decode_config(strategy=strategy, max_new_tokens=max_new_tokens))
    with cancel_on_interrupt(tokens) as interrupt:
        if show:
            print_stream(tokens, marker)
        else:
            tokens.drain()
    if interrupt.happened:
        raise typer.Exit(INTERRUPTED)
    return tokens.result


def _answer(result: GenerationResult) -> Answer:
    return Answer(result.token_ids, result.stats.num_passes, result.stats.seconds)


def _introduce(orthrus: "Orthrus", trained: bool) -> None:
    about = orthrus.describe()
    typer.echo(EXPLANATION)
    typer.secho(
        f"model {about['model']} · view {about['view']} · K = {about['block_size']} · "
        f"{about['dtype']} on {about['device']}",
        dim=True,
    )
    if not trained:
        typer.secho(UNTRAINED, fg="yellow")


def _verdict(answers: Answers) -> None:
    out("\n")
    for name, answer in answers.by.items():
        cost = f"{counted(answer.num_passes, 'pass'):>12} {answer.seconds:8.2f} s"
        typer.echo(f"{name:<14}{counted(len(answer.token_ids), 'token'):>12}{cost}")
    if not answers.differs:
        typer.secho(f"SAME TOKENS: all {len(answers.by[OURS].token_ids)} are equal", fg="green", bold=True)
    for name, index in answers.differs.items():
        typer.secho(f"DIFFERENT TOKENS: {name} differs from number {index + 1} on", fg="red", bold=True)


def _summarise(answers: list[Answers], same: bool, trained: bool) -> None:
    from rich.console import Console

    console = Console()
    console.print()
    console.print(_table(answers))
    if same:
        console.print("LOSSLESS: all three decoders give the same tokens.", style="bold green")
    elif any(PLAIN in each.differs for each in answers):
        console.print("NOT LOSSLESS: please report this, with the output of `orthrus env`.", style="bold red")
    else:
        console.print(
            "Our decoders agree, and transformers gives other tokens: `orthrus audit` distinguishes a near-tie from a "
            "broken rule.",
            style="bold red",
        )
    if not trained:
        console.print(UNTRAINED, style="yellow", highlight=False, soft_wrap=True)
    console.print(
        "passes: forwards of the model, the prompt's included; seconds: the whole answer, in this same program.\n"
        "`orthrus bench` measures with repeats, and gives the spread.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _table(answers: list[Answers]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="transformers → plain decoding → Orthrus",
        title_justify="left",
        box=SIMPLE_HEAD,
        # Fits a terminal of 80 columns.
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("prompt", no_wrap=True)
    for name in (
        "same\ntokens",
        "passes",
        "seconds",
        "speed-up over\ntransformers",
        "speed-up\nover plain",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for each in answers:
        table.add_row(*_line(each.domain, [each]), end_section=each is answers[-1])
    table.add_row(*_line("all", answers))
    return table


def _line(name: str, answers: list[Answers]) -> list[str]:
    """Sums over `answers`; ratios are ratios of the sums."""
    names = (STOCK, PLAIN, OURS)
    return [
        name,
        "NO" if any(each.differs for each in answers) else "yes",
        " → ".join(str(sum(each.by[n].num_passes for each in answers)) for n in names),
        " → ".join(_brief(sum(each.by[n].seconds for each in answers)) for n in names),
        f"{speed_up(answers, STOCK):.2f}×",
        f"{speed_up(answers, PLAIN):.2f}×",
    ]


def _brief(seconds: float) -> str:
    """Narrow enough for three of them in 80 columns."""
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def _next_commands(model: str) -> str:
    """Three commands to try next, as they can be typed here."""
    # In a checkout the command lies in a virtual environment that need not be active.
    program = "orthrus" if shutil.which("orthrus") or not Path(sys.argv[0]).is_file() else sys.argv[0]
    name = "" if model == "default" else f" {model}"
    page = "OpenAI's interface, and a page that races on your prompt"
    if find_spec("fastapi") is None:
        page += ' (first run `pip install "orthrus-lm[serve]"`)'
    commands = {
        f"{program} chat{name} --color": "talk with the model; drafted tokens are underlined",
        f"{program} bench{name}": "measure on this machine, and see the spread",
        f"{program} serve{name}": page,
    }
    width = max(map(len, commands))
    lines = [f"  {command:<{width}}   {what}" for command, what in commands.items()]
    return "\n".join(["", "Try next:", *lines, ""])
