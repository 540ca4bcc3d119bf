"""`orthrus bench`: the stock model against the strategies, on the same prompts."""

from pathlib import Path
from typing import Annotated

import typer

from orthrus.cli import options
from orthrus.cli.common import check_decode, check_strategies, load_orthrus, time_passes
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.report import check_output, show_report
from orthrus.config import STRATEGIES, DecodeConfig
from orthrus.errors import UserInputError

DEFAULTS = DecodeConfig()


def bench(
    model: options.Model = None,
    named_model: options.NamedModel = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="Compare two results that --output wrote; no model is loaded.", metavar="A.json B.json"
        ),
    ] = None,
    prompts: options.Prompts = None,
    domain: options.Domain = None,
    limit: options.Limit = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(STRATEGIES)}; may be repeated. Left out: {DEFAULTS.strategy}.",
            metavar="NAME",
        ),
    ] = None,
    strategies: Annotated[bool, typer.Option("--strategies", help="All strategies, side by side.")] = False,
    max_new_tokens: options.MaxNewTokens = 128,
    block_size: options.BlockSize = None,
    node_budget: options.NodeBudget = DEFAULTS.node_budget,
    block_budget: options.BlockBudget = DEFAULTS.block_budget,
    temperature: Annotated[
        list[float] | None,
        typer.Option(
            "--temperature",
            "-t",
            metavar="NUMBER",
            help="0 is greedy; higher samples. May be repeated, for a table each. Left out: 0.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first repeat, when sampling.")] = 0,
    repeats: Annotated[int, typer.Option(help="Timed runs of each prompt.", min=1)] = 3,
    warmup: Annotated[int, typer.Option(help="Runs before the timed ones.", min=0)] = 1,
    view: options.View = "default",
    dtype: options.Dtype = None,
    draft_dtype: options.DraftDtype = None,
    draft_vocab: options.DraftVocab = None,
    runner: options.Runner = None,
    device: options.Device = None,
    format_: options.FormatOption = "table",
    json: options.FormatJson = False,
    output: options.OutputFile = None,
) -> None:
    """Measure time, passes and acceptance against the stock model.

    The stock model's own generate and our plain decoding always run beside the strategies, taking turns.
    """
    if compare is not None:
        from orthrus.bench import compare_reports

        if format_ == "csv":
            raise UserInputError("a comparison has no csv form; choose table, md or json.")
        check_output(output)
        show_report(compare_reports(*compare), "json" if json else format_, output)
        return
    if strategies and strategy:
        raise UserInputError("--strategies means all of them; give it or --strategy, not both.")
    chosen_strategies = STRATEGIES if strategies else check_strategies(strategy or [DEFAULTS.strategy])
    temperatures = tuple(dict.fromkeys(temperature or [0.0]))
    for value in temperatures:
        check_decode(
            {
                "max_new_tokens": max_new_tokens,
                "block_size": block_size,
                "node_budget": node_budget,
                "block_budget": block_budget,
                "temperature": value,
                "seed": seed,
            }
        )
    from orthrus.base.bench_prompts import load_prompts
    from orthrus.bench import BenchOptions, run_bench

    check_output(output)
    chosen = load_prompts(prompts, tuple(domain or ()), limit)
    orthrus = load_orthrus(
        options.one_model(model, named_model),
        view=view,
        dtype=dtype,
        draft_dtype=draft_dtype,
        draft_vocab=draft_vocab,
        runner=runner,
        device=device,
    )
    time_passes(orthrus, chosen_strategies, temperatures)
    settings = BenchOptions(
        prompts=chosen,
        strategies=chosen_strategies,
        max_new_tokens=max_new_tokens,
        block_size=block_size,
        node_budget=node_budget,
        block_budget=block_budget,
        temperatures=temperatures,
        seed=seed,
        repeats=repeats,
        warmup=warmup,
    )
    with ProgressDisplay(unit="runs") as on_progress:
        report = run_bench(orthrus, settings, on_progress)
    show_report(report, "json" if json else format_, output)
