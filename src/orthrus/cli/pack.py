"""`orthrus pack`: a corpus into sequences in memory-mapped files, once, for every process that trains on it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthrus.base.paths import expanded
from orthrus.cli import options
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.render import out, print_json
from orthrus.errors import UserInputError
from orthrus.training.recipe import MOST_SEQUENCE_LENGTH

if TYPE_CHECKING:
    from orthrus.training.packs import Pack


def pack(
    folder: Annotated[Path, typer.Argument(help="A corpus that `orthrus synth` made, or a packed one.")],
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=MOST_SEQUENCE_LENGTH,
            help="Tokens of a sequence, as in the recipe.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A new folder to write to. Default: inside the corpus folder, where train looks.",
        ),
    ] = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Pack a corpus into sequences for training, or check a packed one.

    `orthrus train` packs automatically what is not packed yet. If FOLDER is already packed, this command reads all
    its files and compares them with the digests in the index.
    """
    from orthrus.base.outputs import atomic_folder
    from orthrus.training.pack_index import INDEX
    from orthrus.training.pack_writer import pack_corpus
    from orthrus.training.packs import check_files, open_pack, packed

    folder = expanded(folder)
    if (folder / INDEX).is_file():
        if sequence_length is not None or output is not None:
            raise UserInputError(
                f"{folder} is packed already; leave out --sequence-length and --output to check it."
            )
        found = open_pack(folder)
        check_files(found)
    elif not folder.is_dir():
        raise UserInputError(f"{folder} is not a folder; give a corpus that `orthrus synth` made.")
    elif sequence_length is None:
        raise UserInputError(
            "give --sequence-length, the sequence_length of the recipe that will train on this."
        )
    else:
        with ProgressDisplay(quiet=quiet) as on_progress:
            if output is None:
                found = packed(folder, sequence_length, on_progress)
            else:
                with atomic_folder(output) as scratch:
                    pack_corpus(folder, scratch, sequence_length, on_progress)
                found = open_pack(output)
    report = _report(found)
    if json:
        print_json(report)
    else:
        _print(report)


def _report(pack: "Pack") -> dict[str, Any]:
    index = pack.about
    return {
        "path": str(pack.folder),
        "sequence_length": index.sequence_length,
        "sequences": index.num_sequences,
        "dialogues": index.dialogues,
        "too_long": index.num_long,
        "longest": index.longest,
        "tokens": index.tokens,
        "answer_tokens": index.answer_tokens,
        "domains": dict(sorted(index.domains.items())),
        "files": len(index.shard_digests),
        "digest": index.digest,
    }


def _print(report: dict[str, Any]) -> None:
    lines = [
        f"{report['sequences']:,} sequences of {report['sequence_length']:,} tokens in {report['path']}: "
        f"{report['dialogues']:,} dialogues, {report['tokens']:,} tokens, {report['answer_tokens']:,} of them answers",
        f"digest {report['digest']}",
    ]
    if report["too_long"]:
        lines.insert(
            1,
            f"{report['too_long']:,} dialogues are longer than a sequence and not in it (the longest has "
            f"{report['longest']:,} tokens): train wants drop_long for that",
        )
    out("\n".join(lines) + "\n")
