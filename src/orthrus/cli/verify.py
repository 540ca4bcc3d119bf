"""`orthrus verify`: decodes an answer again from its receipt, with plain decoding."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus.base.json_text import parse_json
from orthrus.base.text import printable
from orthrus.cli import options
from orthrus.cli.common import UNEXPECTED, load_orthrus
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.render import counted, out, print_json
from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from orthrus.api import Orthrus
    from orthrus.audit.receipts import Checked, Receipt

MOST_BYTES = 2**28
_AS_ON_RECEIPT = "Default: as on the receipt."


def verify(
    receipt: Annotated[
        Path, typer.Argument(metavar="FILE", help="A receipt, or an answer that holds one, as JSON.")
    ],
    model: Annotated[
        str | None, typer.Argument(help=f"{options.MODEL_HELP} {_AS_ON_RECEIPT}", show_default=False)
    ] = None,
    named_model: options.NamedModel = None,
    view: options.View = "default",
    runner: Annotated[
        str | None,
        typer.Option(
            help=f"{options.RUNNER_HELP} {_AS_ON_RECEIPT}",
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help=f"{options.DEVICE_HELP} {_AS_ON_RECEIPT}", rich_help_panel=options.MODEL_PANEL),
    ] = None,
    any_version: Annotated[
        bool,
        typer.Option("--any-version", help="Accept other versions of packages than those on the receipt."),
    ] = False,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Decode an answer of a server again from its receipt, with plain decoding, and compare the tokens.

    Ask the server for a receipt with "orthrus": {"receipt": true}. MODEL, runner and device are the receipt's unless
    you give them. The dtype is always the receipt's. If the file holds the whole answer, its text is compared too.
    Exit status 1 means that something differs.
    """
    content = _read(receipt)
    from orthrus.audit.receipts import check_model, check_versions, find_receipt, read_receipt
    from orthrus.audit.receipts import verify as run

    try:
        found = read_receipt(find_receipt(content))
    except UserInputError as error:
        raise UserInputError(f"{receipt}: {error}") from error
    if not any_version:
        check_versions(found)
    orthrus = load_orthrus(
        _model_of(found, model, named_model),
        quiet=quiet,
        view=view,
        dtype=found.model["dtype"],
        runner=runner or found.model["runner"],
        device=device or found.model["device"],
        revision=found.model.get("revision") if model is None and named_model is None else None,
    )
    check_model(orthrus, found)
    with ProgressDisplay(quiet=quiet, unit="texts") as on_progress:
        checked = run(orthrus, found, lambda done, total: on_progress("decoding again", done, total))
    shown = _text_differs(orthrus, content, found, [each.text for each in checked])
    passed = all(each.position is None for each in checked) and not any(shown)
    if json:
        print_json(_report(found, checked, shown, passed))
    else:
        for number, (each, differs) in enumerate(zip(checked, shown, strict=True), start=1):
            out(f"text {number} of {len(checked)}: {_line(orthrus, each, differs)}\n")
    if not passed:
        raise typer.Exit(UNEXPECTED)


def _read(file: Path) -> Any:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise UserInputError(f"{file} is too large for a receipt; give the JSON of one answer.")
        return parse_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserInputError(f"cannot read {file} ({error.strerror}); give the file of a receipt.") from error
    except ValueError as error:
        raise UserInputError(f"{file} is no JSON; give a receipt, or an answer that holds one.") from error


def _model_of(receipt: "Receipt", model: str | None, named_model: str | None) -> str:
    """The model to load. Raises UserInputError if the receipt does not name it."""
    if model is not None or named_model is not None:
        return options.one_model(model, named_model)
    load = receipt.model.get("load")
    if not isinstance(load, str):
        raise UserInputError(
            f"the answer was made by {receipt.model['name']}, a folder or file of the server's; name your own with "
            "`orthrus verify FILE MODEL`."
        )
    return load


def _text_differs(
    orthrus: "Orthrus", content: dict[str, Any], receipt: "Receipt", texts: list[str]
) -> list[bool | None]:
    """For each text, whether the one in the answer is another; None if the answer does not hold it unchanged.

    Raises UserInputError for an answer with another number of texts than its receipt.
    """
    from orthrus.audit.receipts import shown_texts

    shown = shown_texts(content)
    if not shown:
        return [None] * len(texts)
    if len(shown) != len(texts):
        raise UserInputError(
            f"the answer holds {counted(len(shown), 'text')}, but its receipt is of {len(texts)}; give the whole "
            "answer to one request."
        )
    found: list[bool | None] = []
    for each, answered, text in zip(shown, receipt.texts, texts, strict=True):
        if each is None or each == text:
            found.append(None if each is None else False)
            continue
        # A completion with `echo` has its prompt before the text.
        echo = each.removesuffix(text) if "text" in str(content.get("object")) and each.endswith(text) else ""
        found.append(not (echo and _is_prompt(orthrus, echo, answered.prompt_ids)))
    return found


def _is_prompt(orthrus: "Orthrus", text: str, prompt_ids: Sequence[int]) -> bool:
    try:
        return orthrus.base.encode_prompt(text, raw=True) == list(prompt_ids)
    except UserInputError:
        return False


def _line(orthrus: "Orthrus", checked: "Checked", differs: bool | None) -> str:
    if checked.position is None:
        shown = {None: "", False: ", and its text is the same", True: ", but the text shown is ANOTHER one"}[
            differs
        ]
        return f"the {checked.num_tokens} tokens are IDENTICAL to those of plain decoding{shown}"
    plain, ours = (_named(orthrus, token) for token in (checked.plain_token, checked.our_token))
    return (
        f"DIFFERENT from token {checked.position + 1} of {checked.num_tokens} on: plain decoding gives {plain}, "
        f"the answer has {ours} ({checked.verdict}: {checked.reason})"
    )


def _named(orthrus: "Orthrus", token_id: int | None) -> str:
    if token_id is None:
        return "its end"
    known = token_id < orthrus.dual.vocab_size
    text = str(orthrus.base.tokenizer.decode([token_id])) if known else ""
    return printable(f"{text!r} ({token_id})")


def _report(
    receipt: "Receipt", checked: "list[Checked]", shown: list[bool | None], passed: bool
) -> dict[str, Any]:
    texts = [
        {
            "num_tokens": each.num_tokens,
            "identical": each.position is None,
            "position": each.position,
            "plain_token": each.plain_token,
            "our_token": each.our_token,
            "verdict": each.verdict,
            "reason": each.reason,
            "text_differs": differs,
        }
        for each, differs in zip(checked, shown, strict=True)
    ]
    return {"kind": "orthrus-verified", "passed": passed, "model": receipt.model, "texts": texts}
