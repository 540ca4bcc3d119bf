"""`orthrus generate`: one prompt, one answer; or a file of prompts, see `generate_file`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from orthrus.base.prompt import check_text
from orthrus.base.resolve import resolve
from orthrus.cli import forms, options
from orthrus.cli.common import (
    INTERRUPTED,
    cancel_on_interrupt,
    check_decode,
    load_orthrus,
    parse_logit_bias,
    plain_settings,
    read_stdin,
    time_passes,
)
from orthrus.cli.generate_file import generate_file
from orthrus.cli.render import DraftMarker, footer, note, print_json, print_result, print_stream
from orthrus.errors import OrthrusError, UserInputError


def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="A single argument is the prompt for the default model. - or no argument reads the prompt from "
            "stdin.",
            show_default=False,
        ),
    ] = None,
    named_model: options.NamedModel = None,
    view: options.View = "default",
    max_new_tokens: options.MaxNewTokens = 256,
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
    ignore_eos: options.IgnoreEos = False,
    json_schema: forms.JsonSchema = None,
    regex: forms.Regex = None,
    grammar: forms.LarkGrammar = None,
    compact_json: forms.CompactJson = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without chat template.")
    ] = False,
    system: options.System = None,
    dtype: options.Dtype = None,
    draft_dtype: options.DraftDtype = None,
    draft_vocab: options.DraftVocab = None,
    runner: options.Runner = None,
    device: options.Device = None,
    revision: options.Revision = None,
    attn: options.Attention = None,
    stream: Annotated[
        bool, typer.Option(help="Show the text while it is written.", rich_help_panel="Output")
    ] = True,
    color: options.Color = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Answer the prompts of a JSONL file with prompt, messages or turns (of which the first is asked) on "
            "each line. Resumes where an earlier run of the same command ended. With --seed, each line has its own "
            "seed.",
            rich_help_panel="A file of prompts",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT.jsonl",
            help="File for the answers to --prompts, one per line, in the order of the prompts.",
            rich_help_panel="A file of prompts",
        ),
    ] = None,
    concurrency: Annotated[
        int,
        typer.Option(min=1, help="Prompts that are answered together.", rich_help_panel="A file of prompts"),
    ] = 1,
) -> None:
    """Answer a prompt, or a file of prompts.

    The text goes to stdout while it is written, statistics go to stderr.
    """
    if prompts is None:
        if output is not None:
            raise UserInputError("--output is for the answers to a file of prompts; give --prompts too.")
        model, text = _model_and_prompt(words or [], named_model)
    else:
        model, text = _model_for_file(words or [], named_model, output, json or color), ""
    check_text(system or "", "The system prompt")
    if raw and system is not None:
        raise UserInputError(
            "--raw takes the text as it stands, so there is no place for --system; drop one."
        )
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
        "ignore_eos": ignore_eos,
        "grammar": forms.grammar_of(json_schema, regex, grammar, compact=compact_json),
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
    if prompts is not None and output is not None:
        generate_file(
            prompts,
            output,
            model=model,
            decode=decode,
            load=load,
            raw=raw,
            system=system,
            concurrency=concurrency,
            quiet=quiet,
        )
        return
    orthrus = load_orthrus(model, quiet=quiet, **load)
    time_passes(orthrus, [strategy], quiet=quiet)
    tokens = orthrus.stream(text if system is None else _messages(system, text), raw=raw, **decode)
    marker = DraftMarker(orthrus.base.tokenizer) if color and not json else None
    if marker is not None and not quiet:
        print(marker.legend, file=sys.stderr)
    with cancel_on_interrupt(tokens) as interrupt:
        if stream and not json:
            print_stream(tokens, marker)
        else:
            tokens.drain()
    result = tokens.result
    if json:
        print_json(
            {
                "text": result.text,
                "token_ids": list(result.token_ids),
                "finish_reason": result.finish_reason,
                "stats": result.stats.to_dict(),
                "decode": plain_settings(decode),
                "model": orthrus.describe(),
            }
        )
    elif not stream:
        print_result(result, marker)
    if not quiet:
        note(footer(result.stats, result.finish_reason))
    if interrupt.happened:
        raise typer.Exit(INTERRUPTED)


def _model_and_prompt(words: list[str], named_model: str | None) -> tuple[str, str]:
    """What the positional arguments mean; UserInputError when they mean nothing."""
    if len(words) > (2 if named_model is None else 1):
        raise UserInputError(
            f"{len(words)} arguments were given where {'[MODEL] PROMPT are' if named_model is None else 'a PROMPT is'} "
            "expected; put the prompt in quotes."
        )
    if not words and sys.stdin.isatty():
        raise UserInputError(
            'there is no prompt; give one in quotes, as in: orthrus generate "Why is the sky blue?"'
        )
    model = options.one_model(words[0] if len(words) == 2 else None, named_model)
    text = words[-1] if words else "-"
    if len(words) == 1 and named_model is None and _is_model(text):
        raise UserInputError(
            f"{text} is a model, and there is no prompt; give one behind it, in quotes, or - to read it from stdin."
        )
    if text == "-":
        # The line break that every shell pipe ends with is not part of the prompt.
        text = read_stdin().removesuffix("\n")
    if not text.strip():
        raise UserInputError("the prompt is empty; give some text to answer or continue.")
    check_text(text, "The prompt")
    return model, text


def _is_model(word: str) -> bool:
    """Whether it names a model's file or folder here; a prompt may look like a hub id."""
    try:
        return resolve(word).kind in ("folder", "gguf")
    except OrthrusError:
        return False


def _model_for_file(words: list[str], named_model: str | None, output: Path | None, one_answer: bool) -> str:
    """The model that answers a file; UserInputError for what only goes with one prompt."""
    if output is None:
        raise UserInputError("--prompts needs a file for the answers: give --output OUT.jsonl.")
    if len(words) > 1:
        raise UserInputError("--prompts brings the prompts: give no other, only MODEL before it.")
    if one_answer:
        raise UserInputError("--json and --color show one answer; drop them, or --prompts.")
    return options.one_model(words[0] if words else None, named_model)


def _messages(system: str, text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]
