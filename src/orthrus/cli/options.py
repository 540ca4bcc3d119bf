"""Options that several commands have, each defined once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from orthrus.config import STRATEGIES, Baseline, Strategy
from orthrus.errors import UserInputError

_DECODING, _OUTPUT = "Decoding", "Output"

KEY_VARIABLE = "ORTHRUS_API_KEY"
"""The environment's variable for a server's key, here and there."""
MODEL_PANEL = "Model"
MODEL_HELP = "A hub id, a folder, a GGUF file, or 'default' (SmolLM2-135M-Instruct)."
RUNNER_HELP = "eager, compiled (on a CPU), or auto: compiled where that works."
DEVICE_HELP = "cpu, cuda, cuda:1 or mps."

Model = Annotated[str | None, typer.Argument(help=f"{MODEL_HELP} Default: 'default'.", show_default=False)]
NamedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Name of the model, instead of the argument MODEL.",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
]
NamedBase = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Name of the base, instead of the recipe's `base`.",
        rich_help_panel=MODEL_PANEL,
        show_default=False,
    ),
]
OnlyNamedModel = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, rich_help_panel=MODEL_PANEL)]
View = Annotated[
    str,
    typer.Option(
        help="'default' (the model's own or the shipped one), 'untrained', a folder, or a hub id.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16, float16, auto (as stored), int8 or int4 (on a CPU). Default: float32 on a CPU, "
        "otherwise auto.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DraftDtype = Annotated[
    str | None,
    typer.Option(
        help="Precision of drafts alone, on a CPU: int8 or int4. The text stays the same.",
        rich_help_panel=MODEL_PANEL,
    ),
]
DraftVocab = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Let drafts propose only the N most frequent token ids, with a smaller head. The text stays the "
        "same.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Runner = Annotated[
    str | None,
    typer.Option(
        help=f"{RUNNER_HELP} Default: ORTHRUS_RUNNER, otherwise auto.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help=f"{DEVICE_HELP} Default: the first accelerator found.", rich_help_panel=MODEL_PANEL),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=MODEL_PANEL)
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention implementation: sdpa, eager or flex_attention.", rich_help_panel=MODEL_PANEL
    ),
]

MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", "-n", help="Maximum number of tokens in an answer.", rich_help_panel=_DECODING
    ),
]
DecodeStrategy = Annotated[
    Strategy,
    typer.Option(
        "--strategy",
        help="ar: plain decoding; chain: draft a chain of tokens, then verify it; tree: the same with a tree; "
        "fused, fused_tree: draft and verify in one pass; auto: what is fastest on this machine. All give the "
        "same text.",
        rich_help_panel=_DECODING,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        "--block-size",
        "-k",
        help="Rows of a draft block; for auto, the maximum. Default: as in the training of the view.",
        rich_help_panel=_DECODING,
    ),
]
NodeBudget = Annotated[
    int,
    typer.Option(
        help="The most drafts that tree, fused_tree and auto verify at once.", rich_help_panel=_DECODING
    ),
]
BlockBudget = Annotated[
    int,
    typer.Option(
        help="The most blocks that fused, fused_tree and auto draft in a pass that verifies.",
        rich_help_panel=_DECODING,
    ),
]
Floor = Annotated[
    bool,
    typer.Option(
        help="Let a draft pass also decide a token, so that every pass commits at least one; auto always does.",
        rich_help_panel=_DECODING,
    ),
]
Copies = Annotated[
    bool,
    typer.Option(
        help="Let auto also draft copies: what followed an earlier occurrence of the last tokens in the prompt "
        "or the text.",
        rich_help_panel=_DECODING,
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", "-t", help="0: greedy decoding; above 0: sampling.", rich_help_panel=_DECODING
    ),
]
TopK = Annotated[
    int | None, typer.Option(help="Sample among the k likeliest tokens.", rich_help_panel=_DECODING)
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Sample among the likeliest tokens that together have this probability.",
        rich_help_panel=_DECODING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Sample among tokens at least this likely, relative to the likeliest.", rich_help_panel=_DECODING
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        help="Above 1: tokens of the prompt and the text so far become less likely. 1 is off.",
        rich_help_panel=_DECODING,
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=VALUE",
        help="Add VALUE to the logit of token ID, as in 42=-100; may be repeated.",
        rich_help_panel=_DECODING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Makes sampling repeatable: one text for one seed, whatever the strategy.",
        rich_help_panel=_DECODING,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Stop before this text; \\n means a line break; may be repeated.",
        rich_help_panel=_DECODING,
    ),
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos", help="Continue after the end-of-text token.", rich_help_panel=_DECODING),
]
System = Annotated[str | None, typer.Option(help="System prompt.", rich_help_panel=_DECODING)]

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No statistics and no progress on stderr.", rich_help_panel=_OUTPUT),
]
Color = Annotated[
    bool,
    typer.Option(
        "--color", help="Underline and colour the tokens that were drafted.", rich_help_panel=_OUTPUT
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.", rich_help_panel=_OUTPUT)]

# bench and audit
Prompts = Annotated[
    Path | None,
    typer.Option(help="JSONL file with prompt, messages or turns on each line. Default: built-in prompts."),
]
Domain = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Only prompts of this domain; may be repeated. Default: all."),
]
Limit = Annotated[int | None, typer.Option(help="At most this many prompts of each domain.", min=1)]
Strategies = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        help=f"One of {', '.join(STRATEGIES)}; may be repeated. Default: all but auto.",
        metavar="NAME",
    ),
]
Against = Annotated[
    Baseline | None,
    typer.Option(
        help="stock: the stock model's own generate; plain: strategy ar by the same runner. Default: plain for "
        "the compiled runner in other precisions than float32, because it rounds differently there; otherwise "
        "stock.",
    ),
]
Format = Literal["table", "md", "json", "csv"]
FormatOption = Annotated[
    Format, typer.Option("--format", help="What to print on stdout.", rich_help_panel=_OUTPUT)
]
FormatJson = Annotated[
    bool, typer.Option("--json", help="The same as --format json.", rich_help_panel=_OUTPUT)
]
OutputFile = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Also write the full result as JSON to this file.", rich_help_panel=_OUTPUT
    ),
]


def one_model(argument: str | None, named: str | None) -> str:
    """The model of the argument or of --model, "default" without either; UserInputError for both."""
    if argument is not None and named is not None:
        raise UserInputError(f"two models are given, '{argument}' and --model '{named}'; give one of them.")
    chosen = named if argument is None else argument
    return "default" if chosen is None else chosen


def stop_texts(stop: list[str] | None) -> tuple[str, ...]:
    r"""The texts of --stop, with `\n` as a line end, which a shell does not make of it."""
    return tuple(text.replace("\\n", "\n") for text in stop or ())
