"""The manifest of a corpus: what it was begun with, where its prompts came from, and what made it."""

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
    """Hold the folder of a corpus, made if need be, for this process alone.

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
    """Make sure, before any work, that a corpus may begin or go on in `folder`; makes nothing.

    Raises UserInputError when files of such names are there that are not of a corpus of ours, or another
    process makes one there; CorruptFileError for a damaged manifest; StorageError when it cannot be written.
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
    """The files of a corpus, or what bears their names."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if _OURS.fullmatch(path.name))


def begin(folder: Path, settings: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write the manifest of a new corpus, or make sure that an old one was begun alike.

    Raises UserInputError naming the settings that differ, or as `check_corpus_folder`; CorruptFileError for
    an unreadable manifest.
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
    # A run that failed before it had a prompt leaves nothing that other settings could spoil.
    if changed and not check_names:
        _write(folder, {"format": 1, "settings": settings, "sources": {}, "provenance": provenance})
    elif changed:
        raise UserInputError(
            f"the corpus in {folder} was begun with other settings ({', '.join(changed)}); use a new folder or the "
            "old settings."
        )


def note_source(folder: Path, part: str, facts: dict[str, Any]) -> None:
    """Record where the prompts in the file `part` came from."""
    content = _read(folder)
    _write(folder, content | {"sources": content["sources"] | {part: facts}})


def note_servers(folder: Path, servers: list[dict[str, Any]]) -> None:
    """Record the servers that answer; one that is there already, with the same facts, is not named twice."""
    if servers:
        content = _read(folder)
        known = content.get("servers", [])
        _write(folder, content | {"servers": [*known, *(s for s in servers if s not in known)]})


def forget_sources(folder: Path) -> None:
    """Remove the prompts of all sources, as far as this corpus noted that it wrote them."""
    content = _read(folder)
    for part in content["sources"]:
        if Path(part).name == part and _OURS.fullmatch(part):
            (folder / part).unlink(missing_ok=True)
    _write(folder, content | {"sources": {}})


def base_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the base that answered; None for a corpus that does not say."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    found = _read(folder)["settings"].get("base_fingerprint")
    return None if found is None else str(found)


def corpus_sources(folder: Path) -> list[str]:
    """Where a corpus's prompts came from, one phrase a source; empty when its manifest does not say."""
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
