"""Puts a view in the place of another one, which stays beside it, and restores it."""

import os
import re
from pathlib import Path

from orthrus.errors import UserInputError


def put_in_place(candidate: Path, view: Path) -> Path | None:
    """Move `candidate` to `view`. An old view there is kept beside it; returns its path, or None if there was none."""
    old = None
    if os.path.lexists(view):
        old = _numbered(view, "before")
        view.rename(old)
    try:
        candidate.rename(view)
    except OSError:
        if old is not None:
            old.rename(view)
        raise
    return old


def roll_back(view: Path) -> tuple[Path, Path | None]:
    """Restore the view that the last `put_in_place` set aside.

    Returns (the path at which it was kept, the new path of the present view or None if there was none). Raises
    UserInputError if no view was set aside.
    """
    kept = set_aside(view)
    if not kept:
        raise UserInputError(
            f"no earlier view lies beside {view}, so there is nothing to go back to: adapt keeps one when it "
            "puts a new one in its place."
        )
    aside = None
    if os.path.lexists(view):
        aside = _numbered(view, "adapted")
        view.rename(aside)
    kept[-1].rename(view)
    return kept[-1], aside


def set_aside(view: Path) -> list[Path]:
    """The views that `put_in_place` kept beside this one, the oldest first."""
    return _kept(view, "before")


def _kept(view: Path, word: str) -> list[Path]:
    """The views that were kept beside this one with that word in their name, the oldest first."""
    pattern = re.compile(rf"{re.escape(view.name)}\.{word}-(\d+)")
    if not view.parent.is_dir():
        return []
    found = [(int(m[1]), p) for p in view.parent.iterdir() if (m := pattern.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def _numbered(view: Path, word: str) -> Path:
    kept = _kept(view, word)
    number = int(kept[-1].name.rpartition("-")[2]) + 1 if kept else 1
    return view.with_name(f"{view.name}.{word}-{number}")
