"""Sources of prompts and of answers as `orthrus synth` takes them on the command line."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orthrus.base.paths import expanded
from orthrus.cli.options import KEY_VARIABLE
from orthrus.errors import OrthrusWarning, UserInputError

if TYPE_CHECKING:
    from orthrus.api import Orthrus
    from orthrus.training.answers import Answerer
    from orthrus.training.endpoint import EndpointConfig
    from orthrus.training.prompt_sources import PromptSource
    from orthrus.training.synth import SynthConfig

KEY_VARIABLES = (KEY_VARIABLE, "OPENAI_API_KEY")
DEFAULT_SELF_PROMPTS = ("math=200", "code=200", "chat=200", "writing=200", "summary=200")
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?")


def parse_sources(
    prompts: list[str], datasets: list[str], self_prompts: list[str], suffixes: list[str]
) -> "tuple[PromptSource, ...]":
    """The sources that the options name; UserInputError for one that cannot be read as such."""
    from dataclasses import replace

    from orthrus.training.prompt_sources import PromptSource

    if not prompts and not datasets and not self_prompts:
        self_prompts = list(DEFAULT_SELF_PROMPTS)
    sources = [_file_source(spec) for spec in prompts] + [_dataset_source(spec) for spec in datasets]
    for spec in self_prompts:
        domain, found, number = spec.partition("=")
        if not found or not domain or not number.isdecimal() or int(number) < 1:
            raise UserInputError(
                f"--self-prompts takes DOMAIN=COUNT with a count from 1, such as math=200, not '{spec}'."
            )
        _note_no_openings(domain)
        sources.append(PromptSource(domain=domain, count=int(number)))
    for spec in suffixes:
        domain, found, text = spec.partition("=")
        if not found or domain not in {source.domain for source in sources}:
            raise UserInputError(
                "--suffix takes DOMAIN=TEXT with a domain that --prompts FILE:DOMAIN, --dataset NAME:DOMAIN "
                f"or --self-prompts names, not '{spec}'."
            )
        text = text.replace("\\n", "\n")
        sources = [replace(s, suffix=s.suffix + text) if s.domain == domain else s for s in sources]
    return tuple(sources)


def _note_no_openings(domain: str) -> None:
    from orthrus.training.self_prompts import OPENINGS

    if domain not in OPENINGS:
        warnings.warn(
            f"--self-prompts knows no openings for '{domain}' (only for {', '.join(OPENINGS)}), so the model chooses "
            "the subjects itself.",
            OrthrusWarning,
            stacklevel=3,
        )


def check_sources(config: "SynthConfig", folder: Path) -> None:
    """Read all files and open all data sets before the model is loaded, so that a bad one costs nothing.

    Data sets whose prompts `folder` holds already are not opened again.
    """
    from orthrus.training.corpus import source_path
    from orthrus.training.dataset_prompts import open_dataset
    from orthrus.training.prompt_sources import read_prompts_of

    for file in (*(s.file for s in config.sources if s.file), *config.held_out):
        read_prompts_of(Path(file))
    for number, source in enumerate(config.sources):
        if source.dataset is not None and not source_path(folder, number).is_file():
            open_dataset(source.dataset, source.config, source.split)


def parse_endpoints(urls: list[str], model: str | None, concurrency: int) -> "EndpointConfig | None":
    """The servers that are to answer; None where the base does so here. UserInputError for what is no address."""
    if not urls:
        if model is not None:
            raise UserInputError("--endpoint-model names the model of a server; give --endpoint too.")
        return None
    from orthrus.training.endpoint import EndpointConfig, check_installed

    check_installed()
    every = tuple(url for group in urls for url in group.split(",") if url.strip())
    return EndpointConfig(urls=every, model=model, concurrency=concurrency)


@contextmanager
def answering(
    orthrus: "Orthrus", config: "SynthConfig", servers: "EndpointConfig | None"
) -> "Iterator[Answerer]":
    """What answers: servers, or the engine here."""
    if servers is None:
        from orthrus.training.answers import EngineAnswerer

        yield EngineAnswerer(orthrus.engine, config.batch_size, orthrus.base.eos_token_ids)
        return
    from orthrus.training.endpoint import EndpointAnswerer

    key = next((value for name in KEY_VARIABLES if (value := os.environ.get(name, "").strip())), None)
    with EndpointAnswerer(servers, orthrus.base, key) as answerer:
        yield answerer


def _file_source(spec: str) -> "PromptSource":
    from orthrus.training.prompt_sources import PromptSource

    found = _longest(spec, lambda name: expanded(name).is_file())
    if found is None:
        raise UserInputError(
            f"there is no prompt file '{spec}'; --prompts takes FILE, FILE:DOMAIN or FILE:DOMAIN:COUNT."
        )
    file, domain, number = found
    return PromptSource(
        file=str(expanded(file)), domain=domain or None, count=_count("--prompts", spec, number)
    )


def _dataset_source(spec: str) -> "PromptSource":
    from orthrus.training.prompt_sources import PromptSource

    found = _longest(spec, lambda name: _is_folder(_with_split(name)[0])) or _longest(
        spec, lambda name: ":" not in name
    )
    rest, domain, number = found or (spec, "", "")
    name, split = _with_split(rest)
    hub_id = _HUB_ID.fullmatch(name)
    if _is_folder(name):
        name, config = str(expanded(name)), None
    elif hub_id:
        name, config = hub_id[1], hub_id[2]
    else:
        raise UserInputError(
            f"there is no folder '{name}', and a data set of the hub reads OWNER/NAME[/CONFIG][@SPLIT], with "
            ":DOMAIN or :DOMAIN:COUNT behind it."
        )
    return PromptSource(
        dataset=name,
        config=config,
        split=split or "train",
        domain=domain or None,
        count=_count("--dataset", spec, number),
    )


def _with_split(name: str) -> tuple[str, str | None]:
    found = None if _is_folder(name) else re.fullmatch(r"(.+)@([\w.+-]+)", name)
    return (found[1], found[2]) if found else (name, None)


def _is_folder(name: str) -> bool:
    return bool(name) and expanded(name).is_dir()


def _longest(spec: str, exists: Callable[[str], bool]) -> tuple[str, str, str] | None:
    """(name, domain, count) of NAME[:DOMAIN[:COUNT]]: names may hold colons, so the longest wins."""
    for parts in ([spec], spec.rsplit(":", 1), spec.rsplit(":", 2)):
        if exists(parts[0]):
            name, domain, number = [*parts, "", ""][:3]
            return name, domain, number
    return None


def _count(option: str, spec: str, number: str) -> int | None:
    if number and (not number.isdecimal() or int(number) < 1):
        raise UserInputError(f"the count in {option} {spec} must be a positive number, not '{number}'.")
    return int(number) if number else None
