"""`orthrus bench serve`: a running server under load."""

import os
from typing import Annotated

import typer

from orthrus.cli import options
from orthrus.cli.common import UNEXPECTED, check_strategies, need_serve
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.report import held_output, show_report
from orthrus.config import STRATEGIES

_SERVER, _LOAD, _REQUESTS = "Server", "Load", "Requests"
DEFAULT_CONCURRENCY = (1, 8)


def bench_serve(
    url: Annotated[
        str, typer.Option(help="Address of a server with an OpenAI-compatible API.", rich_help_panel=_SERVER)
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="The server's name for its model. Default: the first one that it lists.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help=f"The server's key. Default: {options.KEY_VARIABLE}.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds to wait for an answer.", rich_help_panel=_SERVER)
    ] = 600.0,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Closed loop: N requests open at a time; may be repeated. Default, without --rate: "
            f"{' and '.join(map(str, DEFAULT_CONCURRENCY))}.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(
            metavar="R",
            help="Random arrivals (Poisson), R per second on average; may be repeated.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    requests: Annotated[
        int,
        typer.Option(
            min=1, help="Number of requests in a run; they use the prompts in turn.", rich_help_panel=_LOAD
        ),
    ] = 32,
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs of each strategy at each load.", rich_help_panel=_LOAD)
    ] = 1,
    warmup: Annotated[
        int,
        typer.Option(
            min=0, help="Warm-up requests for each strategy before the runs.", rich_help_panel=_LOAD
        ),
    ] = 2,
    ttft_limit: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="MS",
            help="Limit on the time to first token in milliseconds; adds goodput to the result.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    tpot_limit: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="MS",
            help="Limit on the time per output token in milliseconds; adds goodput to the result.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    prompts: options.Prompts = None,
    domain: options.Domain = None,
    limit: options.Limit = None,
    max_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Maximum number of tokens in an answer; may be repeated, then requests use the values in turn. "
            "Default: 64.",
            rich_help_panel=_REQUESTS,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos",
            help="Ask for exactly --max-tokens tokens, past the end of the text. Not every server supports this.",
            rich_help_panel=_REQUESTS,
        ),
    ] = False,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "-t", min=0.0, help="0: greedy decoding.", rich_help_panel=_REQUESTS),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the first request, and of the arrivals.", rich_help_panel=_REQUESTS
        ),
    ] = 0,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"For `orthrus serve`: one of {', '.join(STRATEGIES)}; may be repeated, to compare. Default: "
            "the server's own choice.",
            rich_help_panel=_REQUESTS,
        ),
    ] = None,
    salt: Annotated[
        bool,
        typer.Option(
            "--salt/--no-salt",
            help="Start the prompts of each run with a unique name, so that the server's cache holds none of "
            "them.",
            rich_help_panel=_REQUESTS,
        ),
    ] = True,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Afterwards send each request again alone, with plain decoding, and compare the answers.",
            rich_help_panel=_REQUESTS,
        ),
    ] = True,
    format_: options.FormatOption = "table",
    json: options.FormatJson = False,
    output: options.OutputFile = None,
) -> None:
    """Put a running server under load: latencies, throughput, and whether load changed any answer.

    Works with any server with an OpenAI-compatible API. The output has the format of `vllm bench serve`. Needs
    `pip install "orthrus-lm[serve]"`. Exit status 1 means that an answer differs from the same request alone, or that
    no measured request was answered.
    """
    need_serve("the load test", "httpx")
    arms = check_strategies(strategy) if strategy else (None,)
    from orthrus.base.bench_prompts import load_prompts
    from orthrus.bench.load import LoadOptions, run_load
    from orthrus.bench.load_client import asks_of
    from orthrus.bench.load_runs import Level

    with held_output(output):
        if concurrency is None and rate is None:
            concurrency = list(DEFAULT_CONCURRENCY)
        settings = LoadOptions(
            url=url,
            model=model,
            api_key=api_key or os.environ.get(options.KEY_VARIABLE) or None,
            timeout=timeout,
            asks=asks_of(load_prompts(prompts, tuple(domain or ()), limit), requests, max_tokens or [64]),
            levels=[*(Level(concurrency=n) for n in concurrency or ()), *(Level(rate=r) for r in rate or ())],
            strategies=arms,
            temperature=temperature,
            seed=seed,
            repeats=repeats,
            warmup=warmup,
            ignore_eos=ignore_eos,
            salt=salt,
            check=check,
            ttft_limit_ms=ttft_limit,
            tpot_limit_ms=tpot_limit,
        )
        with ProgressDisplay(unit="requests") as on_progress:
            report = run_load(settings, on_progress)
        show_report(report, "json" if json else format_, output)
        if report.num_different or not report.num_ok:
            raise typer.Exit(UNEXPECTED)
