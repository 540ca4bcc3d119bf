"""`orthrus bench`: the stock model against the strategies, on the same prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from orthrus.cli import options
from orthrus.cli.common import check_decode, load_orthrus, time_passes
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.render import note, print_json
from orthrus.cli.report import held_output, save_report, show_report
from orthrus.config import STRATEGIES, DecodeConfig
from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from orthrus.bench import BenchReport

DEFAULTS = DecodeConfig()
_WHAT, _ENERGY_S = "What to measure", 10.0


def bench(
    model: options.Model = None,
    named_model: options.NamedModel = None,
    suite: Annotated[
        Literal["quick", "full", "paper"] | None,
        typer.Option(
            help="A name for a set of data sets, strategies, temperatures and lengths: quick needs no files; "
            "full has the usual sets; paper is the table of arXiv 2605.12825. Other options override its "
            "settings.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="built-in, a data set by name (gsm8k, math500, humaneval, mbpp, mt_bench, spec_bench and "
            "others), or a JSONL file with prompt, messages or turns on each line; may be repeated. Default: "
            "built-in.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder in which to look for NAME.jsonl of a data set. Without it, or if the file is missing: "
            "the hub.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    domain: options.Domain = None,
    limit: options.Limit = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(STRATEGIES)}, optionally with settings: chain:floor=false, "
            f"chain:block-size=4, auto:copies=false; may be repeated. Default: {DEFAULTS.strategy}.",
            metavar="NAME[:SETTINGS]",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    strategies: Annotated[
        bool,
        typer.Option("--strategies", help="All strategies, side by side.", rich_help_panel=_WHAT),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help="Maximum number of tokens in an answer. Default: 128.",
            show_default=False,
        ),
    ] = None,
    block_size: options.BlockSize = None,
    node_budget: options.NodeBudget = DEFAULTS.node_budget,
    block_budget: options.BlockBudget = DEFAULTS.block_budget,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            "-t",
            metavar="NUMBER",
            help="0: greedy decoding; above 0: sampling. May be repeated; each gives a table. Default: 0.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first repeat, when sampling.")] = 0,
    repeats: Annotated[int | None, typer.Option(help="Timed runs of each prompt. Default: 3.", min=1)] = None,
    thinking: Annotated[
        bool | None,
        typer.Option(
            "--thinking/--no-thinking",
            help="Tell the chat template to switch thinking on or off, if it has that setting. Default: neither.",
            show_default=False,
        ),
    ] = None,
    warmup: Annotated[int, typer.Option(help="Runs before the timed ones.", min=0)] = 1,
    view: options.View = "default",
    dtype: options.Dtype = None,
    draft_dtype: options.DraftDtype = None,
    draft_vocab: options.DraftVocab = None,
    runner: options.Runner = None,
    device: options.Device = None,
    format_: Annotated[
        Literal["table", "md", "json", "csv", "vllm"],
        typer.Option(
            "--format",
            help="What to print on stdout; vllm: acceptance of each run in vLLM's schema.",
            rich_help_panel="Output",
        ),
    ] = "table",
    json: options.FormatJson = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Also write the full result as JSON to this file, updated after each prompt. The same command "
            "continues an unfinished file.",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Measure time, passes, acceptance and cost against the stock model.

    The stock model's own generate and our plain decoding always run beside the strategies, taking turns. `orthrus
    bench compare` puts two results side by side, `orthrus bench report` makes a page of them.
    """
    if strategies and strategy:
        raise UserInputError("--strategies means all of them; give it or --strategy, not both.")
    # Not through `orthrus.bench`, whose report needs torch.
    from orthrus.bench.arms import Arm
    from orthrus.bench.data_sets import read_sets
    from orthrus.bench.suites import SUITES, WITHOUT

    chosen = SUITES[suite] if suite else WITHOUT
    named: tuple[str, ...] = STRATEGIES if strategies else tuple(dict.fromkeys(strategy or ()))
    arms = named or chosen.strategies
    temperatures = tuple(dict.fromkeys(temperature or chosen.temperatures))
    new_tokens = chosen.max_new_tokens if max_new_tokens is None else max_new_tokens
    parsed = [Arm.parse(arm) for arm in arms]
    budgets = {"block_size": block_size, "node_budget": node_budget, "block_budget": block_budget}
    for value in temperatures:
        check_decode(budgets | {"max_new_tokens": new_tokens, "temperature": value, "seed": seed})
        for arm in parsed:
            arm.config(budgets, value, seed, new_tokens)
    texts = read_sets(prompts or chosen.sets, data, tuple(domain or ()), limit or chosen.limit)
    from orthrus.bench import BenchOptions, run_bench
    from orthrus.bench.machine import Energy

    with held_output(output):
        begun = _begun(output)
        orthrus = load_orthrus(
            options.one_model(model, named_model),
            view=view,
            dtype=dtype,
            draft_dtype=draft_dtype,
            draft_vocab=draft_vocab,
            runner=runner,
            device=device,
        )
        time_passes(orthrus, [arm.strategy for arm in parsed])
        settings = BenchOptions(
            prompts=texts,
            strategies=arms,
            max_new_tokens=new_tokens,
            block_size=block_size,
            node_budget=node_budget,
            block_budget=block_budget,
            temperatures=temperatures,
            seed=seed,
            repeats=repeats or chosen.repeats,
            warmup=warmup,
            thinking=chosen.thinking if thinking is None else thinking,
        )
        with ProgressDisplay(unit="runs") as on_progress:
            report = run_bench(
                orthrus,
                settings,
                on_progress,
                on_part=None if output is None else lambda part: save_report(part, output, indent=None),
                begun=begun,
                energy=Energy(idle_s=_ENERGY_S),
            )
        if format_ == "vllm" and not json:
            from orthrus.bench.vllm_form import acceptance

            if output is not None:
                save_report(report, output)
            print_json(acceptance(report))
            return
        show_report(report, "json" if json or format_ == "vllm" else format_, output)


def _begun(output: Path | None) -> "BenchReport | None":
    """What an earlier run of this command left unfinished."""
    if output is None or not output.exists():
        return None
    from orthrus.bench import read_report

    report = read_report(output)
    if report.is_complete:
        return None
    note(f"going on with {output}, which holds {len(report.runs)} runs")
    return report
