"""`orthrus export vllm`: write a folder that another engine loads."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from orthrus.cli import options
from orthrus.cli.common import load_orthrus
from orthrus.cli.render import out, print_json


def export_vllm(
    source: Annotated[
        str,
        typer.Argument(help="A base with a shipped view, a view folder, a merged or a released checkpoint."),
    ],
    out_folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")
    ],
    view: Annotated[
        str,
        typer.Option(help="Put this view on SOURCE: 'untrained', a folder or a hub id. Default: its own."),
    ] = "default",
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16 or float16; auto writes the weights as they are stored."),
    ] = "auto",
    revision: options.Revision = None,
    quiet: options.Quiet = False,
    json: options.Json = False,
) -> None:
    """Write base and view as one folder that vLLM serves with diffusion drafting.

    Families: Llama, Qwen2, Qwen3, Mistral. The last line of the output is the command that serves the folder.
    docs/howto/vllm.md says when vLLM is the better server.
    """
    from orthrus.base.outputs import check_absent, check_writable
    from orthrus.integrations.vllm import export
    from orthrus.integrations.vllm.names import command_line

    check_absent(out_folder)
    check_writable(out_folder.parent)
    orthrus = load_orthrus(
        source, quiet=quiet, view=view, dtype=dtype, runner="eager", device="cpu", revision=revision
    )
    config = export.export_vllm(orthrus.dual, orthrus.base, out_folder)
    command = shlex.join(["vllm", "serve", str(out_folder), *command_line(config.block_size - 1)])
    if json:
        print_json({"path": str(out_folder), "block_size": config.block_size, "command": command})
    else:
        out(f"wrote {out_folder} (K = {config.block_size})\nserve it on a CPU with\n{command}\n")
