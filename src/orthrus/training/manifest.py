"""The manifest of a corpus: what it was begun with, where its prompts came from, and what made it."""

import json
from pathlib import Path
from typing import Any

from orthrus.base.outputs import write_text_atomic
from orthrus.errors import CorruptFileError, UserInputError

MANIFEST = "manifest.json"


def begin(folder: Path, settings: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write the manifest of a new corpus, or make sure that an old one was begun alike.

    Raises UserInputError naming the settings that differ, CorruptFileError for an unreadable manifest.
    """
    settings = json.loads(json.dumps(settings))
    # A run that failed before it had a prompt leaves nothing that other settings could spoil.
    if not (folder / MANIFEST).is_file() or not any(folder.glob("[ps]*.jsonl")):
        _write(folder, {"format": 1, "settings": settings, "sources": {}, "provenance": provenance})
        return
    begun = _read(folder)["settings"]
    changed = sorted(key for key in settings if begun.get(key) != settings[key])
    if changed:
        raise UserInputError(
            f"the corpus in {folder} was begun with another {', '.join(changed)}; use a new folder or the "
            "old settings."
        )


def note_source(folder: Path, part: str, facts: dict[str, Any]) -> None:
    """Record where the prompts in the file `part` came from."""
    content = _read(folder)
    content["sources"] = content.get("sources", {}) | {part: facts}
    _write(folder, content)


def base_fingerprint(folder: Path) -> str | None:
    """Fingerprint of the base that answered; None for a corpus that does not say."""
    if not (folder / MANIFEST).is_file():
        return None
    found = _read(folder)["settings"].get("base_fingerprint")
    return None if found is None else str(found)


def corpus_sources(folder: Path) -> list[str]:
    """Where a corpus's prompts came from, one phrase a source; empty when its manifest does not say."""
    try:
        return [_source(s) for s in _read(folder)["settings"]["sources"]]
    except (OSError, CorruptFileError, KeyError, TypeError):
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
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content | {"settings": dict(content["settings"])}
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptFileError(f"{file} is damaged; delete the folder and begin again.") from e


def _write(folder: Path, content: dict[str, Any]) -> None:
    write_text_atomic(folder / MANIFEST, json.dumps(content, indent=2) + "\n")
