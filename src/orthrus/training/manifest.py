"""The manifest of a corpus: its settings, the sources of its prompts, and its provenance."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import SCRATCH, check_writable, write_text_atomic
from orthrus.base.owned import check_unlocked, locked_folder
from orthrus.errors import CorruptFileError, UserInputError

MANIFEST = "manifest.json"
_OURS = re.compile(r"prompts\.jsonl|source-\d+\.jsonl|answers-\d+\.jsonl")
_DOING = "makes a corpus"
_DAMAGED = (
    "{} is damaged, or no manifest of a corpus; name a new folder, or move that file away and begin again."
)


@contextmanager
def corpus_folder(folder: Path) -> Iterator[None]:
    """Lock the folder of a corpus for this process. Makes the folder if it does not exist.

    Raises as `check_corpus_folder`.
    """
    check_corpus_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder, _DOING):
        for scrap in folder.glob(f".*{SCRATCH}*"):
            name = scrap.name[1:].partition(SCRATCH)[0]
            if scrap.is_file() and (name == MANIFEST or _OURS.fullmatch(name)):
                scrap.unlink(missing_ok=True)
        yield


def check_corpus_folder(folder: Path) -> None:
    """Check, before any work, that a corpus may begin or continue in `folder`. Makes nothing.

    Raises UserInputError if files with a corpus's names are there without its manifest, or if another process makes a
    corpus there. Raises CorruptFileError for a damaged manifest, and StorageError if the folder cannot be written.
    """
    check_writable(folder)
    if os.path.lexists(folder / MANIFEST):
        _read(folder)
    elif names := _names(folder):
        raise UserInputError(
            f"{folder} holds {names[0]} without the {MANIFEST} of a corpus, so it may be yours; name a new "
            "folder."
        )
    check_unlocked(folder, _DOING)


def _names(folder: Path) -> list[str]:
    """Names in the folder that are names of a corpus's files."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if _OURS.fullmatch(path.name))


def begin(folder: Path, settings: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write the manifest of a new corpus, or check that an old one has the same settings.

    Raises UserInputError, which names the settings that differ, or as `check_corpus_folder`. Raises CorruptFileError
    for an unreadable manifest.
    """
    settings = json.loads(json.dumps(settings))
    check_names = _names(folder)
    if not os.path.lexists(folder / MANIFEST):
        if check_names:
            check_corpus_folder(folder)
        _write(folder, {"format": 1, "settings": settings, "sources": {}, "provenance": provenance})
        return
    begun = _read(folder)["settings"]
    changed = sorted(key for key in settings if begun.get(key) != settings[key])
    # A run that failed before it had a prompt left no files, so other settings are allowed.
    if changed and not check_names:
        _write(folder, {"format": 1, "settings": settings, "sources": {}, "provenance": provenance})
    elif changed:
        raise UserInputError(
            f"the corpus in {folder} was begun with other settings ({', '.join(changed)}); use a new folder or the "
            "old settings."
        )


def note_source(folder: Path, part: str, facts: dict[str, Any]) -> None:
    """Record the source of the prompts in the file `part`."""
    content = _read(folder)
    _write(folder, content | {"sources": content["sources"] | {part: facts}})


def note_servers(folder: Path, servers: list[dict[str, Any]]) -> None:
    """Record the servers that answer. A server with the same facts is recorded once."""
    if servers:
        content = _read(folder)
        known = content.get("servers", [])
        _write(folder, content | {"servers": [*known, *(s for s in servers if s not in known)]})


def forget_sources(folder: Path) -> None:
    """Delete the prompt files of all sources that the manifest lists."""
    content = _read(folder)
    for part in content["sources"]:
        if Path(part).name == part and _OURS.fullmatch(part):
            (folder / part).unlink(missing_ok=True)
    _write(folder, content | {"sources": {}})


def base_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the base that answered; None if the corpus does not record it."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    found = _read(folder)["settings"].get("base_fingerprint")
    return None if found is None else str(found)


def corpus_sources(folder: Path) -> list[str]:
    """The sources of a corpus's prompts, one phrase for each; empty if its manifest does not record them."""
    try:
        sources = _read(folder)["settings"]["sources"]
        return [_source(s) for s in sources if isinstance(s, dict)]
    except (CorruptFileError, KeyError, TypeError):
        return []


def _source(source: dict[str, Any]) -> str:
    if source.get("dataset"):
        place = str(source["dataset"])
    else:
        place = "the model itself" if source.get("file") is None else Path(source["file"]).name
    return f"{place} ({source['domain']})" if source.get("domain") else place


def _read(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        content = parse_json(file.read_bytes())
        sound = all(isinstance(content[key], dict) for key in ("settings", "sources"))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CorruptFileError(_DAMAGED.format(file)) from e
    if not sound:
        raise CorruptFileError(_DAMAGED.format(file))
    return dict(content)


def _write(folder: Path, content: dict[str, Any]) -> None:
    write_text_atomic(folder / MANIFEST, json.dumps(content, indent=2) + "\n")
