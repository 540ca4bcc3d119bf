"""The output folder of a training run: whose it is, who may write to it now, and what is never touched."""

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
    """A folder that this process may write to. `owner` is the name under which it marks what it writes."""

    path: Path
    owner: str


def check_run_folder(path: Path) -> None:
    """Make sure, before any work, that a run may begin or go on in `path`; makes nothing.

    Raises UserInputError when what the run would replace is not its own, or another process trains there;
    StorageError when the folder cannot be written.
    """
    check_writable(path)
    owner = str(read_run(path).get("id", ""))
    for name in (BEST, LAST):
        check_owned(path / name, owner)
    check_state_folder(path, owner)
    check_unlocked(path, _DOING)


@contextmanager
def run_folder(path: Path, *, is_main: bool = True) -> Iterator[RunFolder]:
    """Hold the folder of a run, made if need be, for this process alone; clears up after one that was killed.

    Of the processes of one run only the main one holds it: the others do not write. Raises as
    `check_run_folder`.
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
    """What is known of the run in a folder: its `id`; empty when none was begun there.

    Raises UserInputError when a file of that name is not ours.
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
    """Write down facts of the run, besides the `id` that it gets when it begins; returns all of them."""
    known = read_run(path)
    content = {"kind": _KIND, "id": uuid.uuid4().hex} | known | facts
    if content != known:
        write_text_atomic(path / RUN_FILE, json.dumps(content, indent=2) + "\n")
    return content
