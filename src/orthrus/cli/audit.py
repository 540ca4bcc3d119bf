"""`orthrus audit`: compares every token with the stock model's, or with plain decoding's."""

from typing import Annotated, Any

import typer

from orthrus.cli import options
from orthrus.cli.common import UNEXPECTED, check_decode, check_strategies, load_orthrus
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.report import held_output, show_report


def audit(
    model: options.Model = None,
    named_model: options.NamedModel = None,
    prompts: options.Prompts = None,
    domain: options.Domain = None,
    limit: options.Limit = None,
    strategy: options.Strategies = None,
    against: options.Against = None,
    max_new_tokens: options.MaxNewTokens = 128,
    block_size: options.BlockSize = None,
    node_budget: options.NodeBudget = 24,
    block_budget: options.BlockBudget = 3,
    floor: options.Floor = True,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Prompts that our side answers together, in shared passes.")
    ] = 1,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Also test the distribution of sampled text, with a negative control (plain decoding), a positive "
            "control (a planted bias, which must be found) and the power of each test; and compare length and "
            "variety of texts.",
        ),
    ] = False,
    draws: Annotated[
        int, typer.Option(min=20, help="Number of texts that --full draws for each sample and prompt.")
    ] = 200,
    sampled_prompts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of prompts for which --full tests the distribution of sampled text, spread evenly over "
            "all prompts.",
        ),
    ] = 12,
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
    """Compare output with the stock model's or plain decoding's, token by token, and explain each difference.

    With --concurrency, prompts share the passes of the engine, as requests to a server do. With a temperature,
    sampled texts are compared: the baseline draws with the same noise. --full draws many texts for a few prompts, with
    `auto` or the strategies you name, and tests whether they follow the base's distribution. Exit status 1 means
    that the audit failed.
    """
    decode: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "block_size": block_size,
        "node_budget": node_budget,
        "block_budget": block_budget,
        "floor": floor,
        "temperature": temperature,
        "seed": 0 if seed is None else seed,
    }
    check_decode(decode)
    chosen_strategies = check_strategies(strategy)
    from orthrus.base.bench_prompts import load_prompts

    with held_output(output):
        chosen = load_prompts(prompts, tuple(domain or ()), limit)
        from orthrus.audit import AuditOptions, FullOptions, run_audit

        orthrus = load_orthrus(
            options.one_model(model, named_model),
            view=view,
            dtype=dtype,
            draft_dtype=draft_dtype,
            draft_vocab=draft_vocab,
            runner=runner,
            device=device,
        )
        sampled = FullOptions(
            draws=draws,
            num_prompts=sampled_prompts,
            temperature=temperature or 1.0,
            seed=decode["seed"],
            strategies=chosen_strategies if strategy else ("auto",),
        )
        settings = AuditOptions(
            prompts=chosen,
            against=against,
            strategies=chosen_strategies,
            concurrency=concurrency,
            full=sampled if full else None,
            **decode,
        )
        with ProgressDisplay(unit="answers") as on_progress:
            report = run_audit(orthrus, settings, on_progress)
        show_report(report, "json" if json else format_, output)
        if not report.passed:
            raise typer.Exit(UNEXPECTED)
