"""`orthrus synth`: a training corpus of the base's own answers."""

import signal
import sys
from pathlib import Path
from time import monotonic
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus.cli import options
from orthrus.cli.common import KILLS, Killed, handling, leaving, load_orthrus
from orthrus.cli.render import note, out, print_json
from orthrus.cli.synth_report import as_text, synth_report
from orthrus.cli.synth_sources import answering, check_sources, parse_endpoints, parse_sources

if TYPE_CHECKING:
    from collections.abc import Callable

    from orthrus.training.synth import SynthProgress

_LINE_SECONDS = 15.0


def synth(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The corpus folder, new or to be resumed.")],
    model: options.OnlyNamedModel = "default",
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:DOMAIN[:COUNT]]",
            help="JSONL with prompt, turns or messages on each line; may be repeated.",
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:DOMAIN[:COUNT]]",
            help="A data set of the hub, OWNER/NAME or OWNER/NAME/CONFIG, or a folder of parquet or JSONL "
            "files; add @SPLIT for a split other than train; may be repeated.",
        ),
    ] = None,
    self_prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DOMAIN=COUNT",
            help="Let the model write prompts itself: math, code, chat, writing, summary, translation, "
            "questions, reading or another name; may be repeated. Without any source: 200 of each of the first "
            "five.",
        ),
    ] = None,
    suffix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DOMAIN=TEXT",
            help="Add this text to the prompts of that domain; \\n is a line break; may be repeated.",
        ),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="JSONL with prompts to exclude; may be repeated. The built-in bench prompts are always "
            "excluded.",
        ),
    ] = None,
    turns: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Answers of each dialogue: the model writes the user turns that are missing. Default: one "
            "answer to each user turn of the prompts.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Maximum number of tokens in an answer.")
    ] = 256,
    greedy_share: Annotated[
        float, typer.Option(help="Share of answers decoded greedily; the rest is sampled.")
    ] = 0.5,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="Temperature of the sampled answers.")
    ] = 0.8,
    batch_size: Annotated[int, typer.Option(help="Answers decoded at the same time on this machine.")] = 64,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL[,URL...]",
            help="Request the answers from servers with an OpenAI-compatible API, which must serve the same "
            "model; may be repeated. Their key: ORTHRUS_API_KEY, otherwise OPENAI_API_KEY.",
        ),
    ] = None,
    endpoint_model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The model's name on the servers, if a server has several models."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Requests open at the same time, over all servers together.")
    ] = 64,
    shard_size: Annotated[
        int, typer.Option(help="Prompts per file; an interruption loses at most one file.")
    ] = 128,
    seed: Annotated[int, typer.Option(help="Seed of prompts, order and samples.")] = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Make a training corpus: prompts, and the base's own answers to them.

    The same command resumes where an earlier one stopped.
    """
    from orthrus.training.synth import SynthConfig

    config = SynthConfig(
        sources=parse_sources(prompts or [], dataset or [], self_prompts or [], suffix or []),
        held_out=tuple(str(file) for file in held_out or ()),
        turns=turns,
        greedy_share=greedy_share,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        shard_size=shard_size,
        seed=seed,
    )
    servers = parse_endpoints(endpoint or [], endpoint_model, concurrency)
    check_sources(config, folder)
    from orthrus.training.manifest import check_corpus_folder, corpus_folder

    check_corpus_folder(folder)
    from orthrus.base.bench_prompts import load_prompts
    from orthrus.training.synth import synthesise

    # The prompts that benchmarks and training runs are scored on.
    keep_out = [p.prompt for p in load_prompts() if isinstance(p.prompt, str)]
    orthrus = load_orthrus(model, quiet=quiet, view="untrained", dtype=dtype, device=device)
    with corpus_folder(folder):
        try:
            with SynthDisplay(quiet=quiet) as display:
                whole = WholeShards(folder, config.shard_size, display)
                with (
                    handling([signal.SIGINT, *KILLS], whole.leave),
                    answering(orthrus, config, servers) as answerer,
                ):
                    synthesise(orthrus.base, answerer, config, folder, whole, keep_out=keep_out)
        except (KeyboardInterrupt, Killed):
            note(f"stopped; whole shards are kept in {folder}, and the same command goes on from there")
            raise
        report = synth_report(folder, config)
    if json:
        print_json(report)
    else:
        out(as_text(report))


class WholeShards:
    """Hands progress on, and lets a signal wait while a shard with all its answers is being written."""

    def __init__(self, folder: Path, shard_size: int, report: "Callable[[SynthProgress], None]") -> None:
        self._folder, self._size, self._report = folder, shard_size, report
        self._ends: set[int] | None = None
        self._done = -1
        self._signal: int | None = None
        self._writing = False

    def __call__(self, p: "SynthProgress") -> None:
        if p.stage == "answers":
            if self._ends is None:
                self._ends = self._shard_ends(p)
            # Told twice of the end of a shard: with its last answer, and when it is written.
            self._writing = p.done in self._ends and p.done != self._done
            self._done = p.done
        if self._signal is not None and not self._writing:
            raise leaving(self._signal)
        self._report(p)

    def leave(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: at once, or when the shard is written; a second one never waits."""
        if self._writing and self._signal is None:
            self._signal = number
        else:
            raise leaving(number)

    def _shard_ends(self, p: "SynthProgress") -> set[int]:
        """How many prompts are answered whenever one of the shards to come is complete."""
        from orthrus.training.corpus import shard_path

        ends, done = set(), p.done
        self._done = done
        for index, first in enumerate(range(0, p.total, self._size)):
            if not shard_path(self._folder, index).is_file():
                done += min(self._size, p.total - first)
                ends.add(done)
        return ends


class SynthDisplay:
    """Progress on stderr: a bar on a terminal, elsewhere a line every quarter of a minute."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._bar, self._task = quiet, None, None
        self._begun: float | None = None
        self._said: tuple[str, int, float] = ("", -1, 0.0)
        if not quiet and sys.stderr.isatty():
            self._bar, self._task = _bar()

    def __enter__(self) -> "SynthDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, p: "SynthProgress") -> None:
        now = monotonic()
        if p.stage == "answers" and self._begun is None:
            self._begun = now
        detail = self._detail(p, now)
        if self._bar is not None:
            label = "making prompts" if p.stage == "prompts" else "answering"
            self._bar.update(self._task, description=label, completed=p.done, total=p.total, detail=detail)
        elif not self._quiet and self._due(p, now):
            self._said = (p.stage, p.done, now)
            what = "sources of prompts done" if p.stage == "prompts" else "prompts answered"
            print(
                ", ".join(filter(None, (f"{p.done} of {p.total} {what}", detail))),
                file=sys.stderr,
                flush=True,
            )

    def _due(self, p: "SynthProgress", now: float) -> bool:
        stage, done, at = self._said
        return (p.stage, p.done) != (stage, done) and (
            p.stage != stage or p.done == p.total or now - at >= _LINE_SECONDS
        )

    def _detail(self, p: "SynthProgress", now: float) -> str:
        seconds = now - self._begun if self._begun is not None else 0.0
        rate = f"{p.num_tokens / seconds:,.0f} tokens/s" if p.num_tokens and seconds > 0 else ""
        left = "" if p.seconds_left is None or p.done == p.total else f"about {duration(p.seconds_left)} left"
        return ", ".join(filter(None, (rate, left)))


def duration(seconds: float) -> str:
    """A time that is only an estimate: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _bar() -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
    return bar, bar.add_task("starting", total=None, detail="")
