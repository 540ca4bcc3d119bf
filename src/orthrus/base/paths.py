"""Paths as users write them."""

from pathlib import Path

from orthrus.errors import UserInputError


def expanded(path: str | Path) -> Path:
    """The path with the home folder in the place of ~. Raises UserInputError for the ~NAME of an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserInputError(
            f"there is no home folder for {str(path)!r:.200}; write the path out."
        ) from error
