"""`orthrus demo`: the same answers twice, to see that they are the same and what they cost."""

from dataclasses import dataclass
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
from orthrus.cli.render import DraftMarker, print_json, print_stream
from orthrus.types import GenerationResult

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
    "Each prompt is answered twice by the same model: token by token, then by drafting blocks of tokens\n"
    "through the diffusion view and keeping only what the model itself would have said. Both must be equal."
)
UNTRAINED = (
    "The view is not trained yet: lossless already, but about one token per pass; training makes it fast."
)


@dataclass(frozen=True)
class Pair:
    """One prompt, answered plainly and with Orthrus."""

    domain: str
    prompt: str
    plain: GenerationResult
    ours: GenerationResult

    @property
    def first_difference(self) -> int | None:
        """Index of the first token that differs, None when all are the same."""
        a, b = self.plain.token_ids, self.ours.token_ids
        if a == b:
            return None
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "domain": self.domain,
            "prompt": self.prompt,
            "same_tokens": self.first_difference is None,
            "first_difference": self.first_difference,
            "text": self.ours.text,
            "speed_up_over_plain": speed_up([self]),
            "ar": {"token_ids": list(self.plain.token_ids), **self.plain.stats.to_dict()},
            "auto": {"token_ids": list(self.ours.token_ids), **self.ours.stats.to_dict()},
        }


def demo(
    model: options.OnlyNamedModel = "default",
    view: options.View = "default",
    device: options.Device = None,
    max_new_tokens: options.MaxNewTokens = 96,
    color: options.Color = False,
    json: options.Json = False,
) -> None:
    """Answer three prompts plainly and with Orthrus, and compare tokens, passes and time.

    Exit status 1 means that a token differed. Runs in float32, where equal means equal. Saves nothing.
    """
    check_decode({"max_new_tokens": max_new_tokens})
    orthrus = load_orthrus(model, view=view, dtype="float32", device=device)
    trained = orthrus.dual.config.trained
    if not json:
        _introduce(orthrus, trained)
    time_passes(orthrus, ["auto"], quiet=json)
    orthrus.warm_up()
    pairs: list[Pair] = []
    for domain, prompt in PROMPTS:
        if not json:
            typer.secho(f"\n{len(pairs) + 1}/{len(PROMPTS)} {domain}: {prompt}", bold=True)
        plain = _answer(orthrus, prompt, "ar", max_new_tokens, show=not json)
        ours = _answer(orthrus, prompt, "auto", max_new_tokens, show=not json, color=color)
        pairs.append(Pair(domain, prompt, plain, ours))
        if not json:
            _verdict(pairs[-1])
    same = all(pair.first_difference is None for pair in pairs)
    if json:
        content = {"same_tokens": same, "view_trained": trained, "model": orthrus.describe()}
        print_json(content | {"prompts": [pair.to_dict() for pair in pairs]})
    else:
        _summarise(pairs, same, trained)
    if not same:
        raise typer.Exit(UNEXPECTED)


def speed_up(pairs: list[Pair]) -> float:
    """Wall time of plain decoding / wall time of Orthrus, prefill included."""
    return sum(_ms(p.plain) for p in pairs) / sum(_ms(p.ours) for p in pairs)


def _ms(result: GenerationResult) -> float:
    return result.stats.ttft_ms + result.stats.decode_ms


def _answer(
    orthrus: "Orthrus",
    prompt: str,
    strategy: "Strategy",
    max_new_tokens: int,
    *,
    show: bool,
    color: bool = False,
) -> GenerationResult:
    # A model without chat template continues the prompt as plain text.
    tokens = orthrus.stream(prompt, strategy=strategy, max_new_tokens=max_new_tokens)
    with cancel_on_interrupt(tokens) as interrupt:
        if show:
            typer.secho("\nplain decoding" if strategy == "ar" else "\nOrthrus", fg="cyan")
            print_stream(tokens, DraftMarker(orthrus.base.tokenizer) if color else None)
        else:
            tokens.drain()
    if interrupt.happened:
        raise typer.Exit(INTERRUPTED)
    return tokens.result


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


def _verdict(pair: Pair) -> None:
    plain, ours = pair.plain, pair.ours
    if pair.first_difference is None:
        typer.secho(f"\nSAME TOKENS: all {ours.stats.num_tokens} are equal", fg="green", bold=True)
    else:
        typer.secho(f"\nDIFFERENT TOKENS from number {pair.first_difference + 1} on", fg="red", bold=True)
    typer.echo(
        f"plain {plain.stats.num_passes} passes, {_ms(plain) / 1e3:.2f} s; "
        f"Orthrus {ours.stats.num_passes} passes, {_ms(ours) / 1e3:.2f} s, "
        f"{ours.stats.tokens_per_forward:.2f} tokens per forward"
    )


def _summarise(pairs: list[Pair], same: bool, trained: bool) -> None:
    from rich.console import Console

    console = Console()
    console.print()
    console.print(_table(pairs))
    if same:
        console.print("LOSSLESS: every token is the one that plain decoding gives.", style="bold green")
    else:
        console.print("NOT LOSSLESS: please report this, with the output of `orthrus env`.", style="bold red")
    if not trained:
        console.print(UNTRAINED, style="yellow", highlight=False, soft_wrap=True)
    console.print(
        "tokens per forward = tokens / passes, prefill and draft passes included; speed-up = time of plain\n"
        "decoding in this same program / time of Orthrus. `orthrus bench` measures against the stock model.",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _table(pairs: list[Pair]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="plain decoding → Orthrus",
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
        "tokens per\nforward",
        "acceptance\nrate",
        "seconds",
        "speed-up\nover plain",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        table.add_row(*_row(pair.domain, [pair]), end_section=pair is pairs[-1])
    table.add_row(*_row("all", pairs))
    return table


def _row(name: str, pairs: list[Pair]) -> list[str]:
    """Sums over `pairs`; ratios are ratios of the sums."""
    sides = [[p.plain.stats for p in pairs], [p.ours.stats for p in pairs]]
    num_tokens = [sum(s.num_tokens for s in side) for side in sides]
    num_passes = [sum(s.num_passes for s in side) for side in sides]
    seconds = [sum(s.ttft_ms + s.decode_ms for s in side) / 1e3 for side in sides]
    num_drafted = sum(s.num_drafted for s in sides[1])
    num_accepted = sum(s.num_accepted for s in sides[1])
    return [
        name,
        "yes" if all(p.first_difference is None for p in pairs) else "NO",
        f"{num_passes[0]} → {num_passes[1]}",
        " → ".join(f"{t / p:.2f}" for t, p in zip(num_tokens, num_passes, strict=True)),
        f"{num_accepted / num_drafted:.0%}" if num_drafted else "-",
        f"{seconds[0]:.2f} → {seconds[1]:.2f}",
        f"{speed_up(pairs):.2f}×",
    ]
