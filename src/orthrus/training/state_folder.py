"""The folder of a run's saved state: `state.json` and a folder with the shards that it names.

`state.json` is written last and in one step. So a reader, or a run that resumes after a kill, finds either the whole
old state or the whole new one. Shards that it does not name are from a save that was not completed.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import SCRATCH, atomic_folder, write_text_atomic
from orthrus.base.owned import MARK, mark_folder, marked_files, restore_folder
from orthrus.errors import UserInputError

STATE = "state"
STATE_FILE = "state.json"
# The state file of older versions.
_OLD_FILE = "state.pt"
_SHARDS = re.compile(r"step-[0-9]{8,16}")
_SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def state_file(run: Path) -> Path:
    """The file that names the saved state of a run. It exists after the first save."""
    return run / STATE / STATE_FILE


def shards_folder(run: Path, step: int) -> Path:
    """The folder for the shards of the state after that step."""
    return run / STATE / f"step-{step:08d}"


def is_shards_name(name: object) -> bool:
    """Whether this is a folder name of `shards_folder`."""
    return isinstance(name, str) and _SHARDS.fullmatch(name) is not None


def is_shard_name(name: object) -> bool:
    """Whether this is a file name of a shard from torch.distributed.checkpoint."""
    return isinstance(name, str) and _SHARD.fullmatch(name) is not None


def check_state_folder(run: Path, owner: str) -> None:
    """Raises UserInputError if the state's folder holds anything that `owner`, a run's name, did not write."""
    old = run / _OLD_FILE
    if os.path.lexists(old):
        raise UserInputError(
            f"{old} is the state of a run of an older version, which this one does not read; go on with that "
            "version, or move it away to start again."
        )
    folder = run / STATE
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        reason = "is in the way of a folder of that name"
    elif marked_files(folder, owner) is None:
        reason = "was not written by this run"
    elif (mine := next(_foreign(folder), None)) is not None:
        reason = f"holds {mine.relative_to(folder)}, which this run did not write"
    else:
        return
    raise UserInputError(f"{folder} {reason}; move it away, or give another output folder.")


def _foreign(folder: Path) -> Iterator[Path]:
    for found in sorted(folder.iterdir()):
        plain = not found.is_symlink()
        if is_shards_name(found.name) and plain and found.is_dir():
            yield from (
                file
                for file in sorted(found.iterdir())
                if not is_shard_name(file.name) or file.is_symlink() or not file.is_file()
            )
        elif not (plain and found.is_file() and (found.name in {MARK, STATE_FILE} or _is_scrap(found))):
            yield found


def _is_scrap(file: Path) -> bool:
    return file.name.startswith(f".{STATE_FILE}{SCRATCH}")


def hold_state_folder(run: Path, owner: str) -> None:
    """Make the folder of the state if needed, and clean up after a process that was killed while saving.

    No other process may write to the run's folder. Raises StorageError if the folder cannot be made.
    """
    folder = run / STATE
    restore_folder(folder, owner)
    if not folder.is_dir():
        # It has its mark from the beginning, because a folder without a mark would count as the user's.
        with atomic_folder(folder) as made:
            mark_folder(made, owner)
    for found in folder.iterdir():
        if _is_scrap(found):
            found.unlink(missing_ok=True)
    drop_unnamed(run)


def drop_unnamed(run: Path) -> None:
    """Delete shards that `state.json` does not name. Does nothing if that cannot be read."""
    try:
        named = parse_json(state_file(run).read_bytes())["folder"]
    except FileNotFoundError:
        named = None
    except (OSError, ValueError, TypeError, KeyError):
        return
    for folder in (run / STATE).iterdir():
        if not is_shards_name(folder.name) or folder.name == named or folder.is_symlink():
            continue
        # Files that cannot be deleted only use disk space until the next save.
        with suppress(OSError):
            for file in folder.iterdir():
                if is_shard_name(file.name):
                    file.unlink()
            folder.rmdir()


def drop_state(run: Path) -> None:
    """Delete the saved state of a run that is over. Foreign files stay, with their folder."""
    state_file(run).unlink(missing_ok=True)
    drop_unnamed(run)
    with suppress(OSError):
        (run / STATE / MARK).unlink(missing_ok=True)
        (run / STATE).rmdir()


def place_state(run: Path, content: dict[str, Any]) -> None:
    """Make `content`, which names its shards, the state of the run. Delete the shards of the previous state.

    Raises StorageError if the disk is full or not writable. Then the previous state stays.
    """
    write_text_atomic(state_file(run), json.dumps(content, indent=2) + "\n")
    drop_unnamed(run)
