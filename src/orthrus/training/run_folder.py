"""The output folder of a training run: its owner, its lock, and checks that foreign files stay untouched."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import check_writable, write_text_atomic
from orthrus.base.owned import check_owned, check_unlocked, locked_folder, restore_folder, scraps_of
from orthrus.errors import UserInputError
from orthrus.training.state_folder import check_state_folder, hold_state_folder

RUN_FILE = "run.json"
# The view with the best score, and the last one.
BEST, LAST = "best", "view"
_KIND = "orthrus-train"
_DOING = "trains"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder to which this process may write. owner: the name with which it marks its files."""

    path: Path
    owner: str


def check_run_folder(path: Path) -> None:
    """Check, before any work, that a run may begin or continue in `path`. Makes nothing.

    Raises UserInputError if the run would replace foreign files, or if another process trains there. Raises
    StorageError if the folder cannot be written.
    """
    check_writable(path)
    owner = str(read_run(path).get("id", ""))
    for name in (BEST, LAST):
        check_owned(path / name, owner)
    check_state_folder(path, owner)
    check_unlocked(path, _DOING)


@contextmanager
def run_folder(path: Path, *, is_main: bool = True) -> Iterator[RunFolder]:
    """Lock the folder of a run for this process. Makes it if needed, and cleans up after a process that was killed.

    Only the main process of a run locks it, because the others do not write. Raises as `check_run_folder`.
    """
    if not is_main:
        yield RunFolder(path, "")
        return
    check_run_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    with locked_folder(path, _DOING):
        owner = str(note_run(path)["id"])
        for scrap in scraps_of(path / RUN_FILE):
            scrap.unlink(missing_ok=True)
        for name in (BEST, LAST):
            restore_folder(path / name, owner)
        hold_state_folder(path, owner)
        yield RunFolder(path, owner)


def read_run(path: Path) -> dict[str, Any]:
    """The recorded facts of the run in a folder, such as its `id`; empty if there is no run.

    Raises UserInputError if a file of that name is not ours.
    """
    file = path / RUN_FILE
    if not os.path.lexists(file):
        return {}
    try:
        content = parse_json(file.read_bytes())
        if content["kind"] == _KIND and isinstance(content["id"], str):
            return dict(content)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserInputError(
        f"{file} was not written by a training run; move it away, or give another output folder."
    )


def note_run(path: Path, **facts: str) -> dict[str, Any]:
    """Record facts of the run, in addition to the `id` that a new run gets. Returns all facts."""
    known = read_run(path)
    content = {"kind": _KIND, "id": uuid.uuid4().hex} | known | facts
    if content != known:
        write_text_atomic(path / RUN_FILE, json.dumps(content, indent=2) + "\n")
    return content
