"""`orthrus serve`: serves a model over HTTP, with OpenAI's and Anthropic's APIs."""

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orthrus.cli import options
from orthrus.cli.common import load_orthrus, need_serve, time_passes
from orthrus.cli.render import note
from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from orthrus.api import Orthrus

_SERVER, _LIMITS = "Server", "Limits"

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    model: options.Model = None,
    named_model: options.NamedModel = None,
    view: options.View = "default",
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 allows access from other machines.",
            rich_help_panel=_SERVER,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on.", min=1, max=65535, rich_help_panel=_SERVER)
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="A key that clients must send; may be repeated. Other users of the machine can see a command's "
            f"arguments; {options.KEY_VARIABLE} in the environment does the same.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Name of the model in requests; may be repeated, the first is listed. Default: its own name.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    any_model: Annotated[
        bool,
        typer.Option(
            "--any-model",
            help="Answer requests for other models too, with this one.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Allow access from web pages of this origin; may be repeated. Default: none.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    page: Annotated[
        bool,
        typer.Option("--page/--no-page", help="Serve a page for browsers at /.", rich_help_panel=_SERVER),
    ] = True,
    audit_share: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Decode this share of the answers again with plain decoding while no request waits, and count "
            "differences: see /audit and /metrics.",
            rich_help_panel=_SERVER,
        ),
    ] = 0.0,
    log_traffic: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Append chats and their answers to this file, as JSONL for `orthrus adapt`. Default: no text "
            "is kept.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    max_running: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of answers that are written at the same time.",
            rich_help_panel=_LIMITS,
        ),
    ] = 32,
    max_queue: Annotated[
        int,
        typer.Option(
            min=0,
            help="Maximum number of waiting requests; further ones are refused with 429.",
            rich_help_panel=_LIMITS,
        ),
    ] = 128,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens in an answer. Default: as many as fit.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_slots: Annotated[
        int | None,
        typer.Option(
            min=256,
            help="Memory for prompts and answers, in tokens. Default: a fifth of the free memory.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_body: Annotated[
        int, typer.Option(min=1024, help="The largest request, in bytes.", rich_help_panel=_LIMITS)
    ] = 8 * 2**20,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Maximum total time of a request, in seconds.", rich_help_panel=_LIMITS),
    ] = 600.0,
    drain: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Seconds that running requests get to finish after SIGTERM.",
            rich_help_panel=_LIMITS,
        ),
    ] = 30.0,
    dtype: options.Dtype = None,
    draft_dtype: options.DraftDtype = None,
    draft_vocab: options.DraftVocab = None,
    runner: options.Runner = None,
    device: options.Device = None,
    revision: options.Revision = None,
    quiet: options.Quiet = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's and Anthropic's APIs.

    Needs `pip install "orthrus-lm[serve]"`. See docs/serving.md.
    """
    chosen = options.one_model(model, named_model)
    need_serve("the server", "fastapi", "prometheus_client", "uvicorn")
    from orthrus.engine.engine import EngineConfig
    from orthrus.server.run import address
    from orthrus.server.run import serve as run
    from orthrus.server.settings import ServeConfig

    keys = tuple(api_key or ()) or tuple(filter(None, [os.environ.get(options.KEY_VARIABLE)]))
    config = ServeConfig(
        names=tuple(name or ()),
        any_model=any_model,
        api_keys=keys,
        cors_origins=tuple(cors_origin or ()),
        max_running=max_running,
        max_queue=max_queue,
        max_tokens=max_tokens,
        max_body=max_body,
        timeout=timeout,
        drain=drain,
        page=page,
        audit_share=audit_share,
        log_traffic=log_traffic,
        local=host in _LOOPBACK,
    )
    if not host.strip():
        raise UserInputError("--host is empty; give an address, such as 127.0.0.1.")
    if not keys and host not in _LOOPBACK:
        print(f"warning: anybody who reaches {host} can use this server; set --api-key.", file=sys.stderr)

    if log_traffic is not None:
        note(f"the texts of prompts and answers are appended to {log_traffic}")

    def load() -> "Orthrus":
        orthrus = load_orthrus(
            chosen,
            quiet=quiet,
            view=view,
            dtype=dtype,
            draft_dtype=draft_dtype,
            draft_vocab=draft_vocab,
            runner=runner,
            device=device,
            revision=revision,
            engine=EngineConfig(max_slots=max_slots, max_running=max_running, add_round=False),
        )
        time_passes(orthrus, ["auto"], quiet=quiet)
        orthrus.warm_up()
        # The objects that exist now stay for good. Freezing them spares each full collection 0.2 s, in which it would
        # stop every thread.
        gc.collect()
        gc.freeze()
        if not quiet:
            where = f"http://{address(host, port)}"
            print(
                f"Orthrus answers at {where}/v1{f'; its page is {where}/' if page else ''}", file=sys.stderr
            )
        return orthrus

    run(load, config, host, port)
