"""Reads prompts from data sets of the Hugging Face hub, or of a local folder: the user turns of each row."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from orthrus.errors import MissingExtraError, OrthrusError, UserInputError

# The columns that may hold prompts. The first one that a data set has is read. `instruction` may have an `input` too.
COLUMNS = (
    "prompt",
    "question",
    "problem",
    "instruction",
    "turns",
    "messages",
    "conversations",
    "conversation",
)
_INPUT = "input"
_USERS = ("user", "human")
# Size of the shuffle buffer of a streamed data set, which is never in memory as a whole.
_SHUFFLE_ROWS = 10_000


@dataclass(frozen=True, slots=True)
class DatasetRows:
    """A data set that is open as a stream. revision: the hub's commit, or a hash of a local folder's files."""

    name: str
    revision: str
    column: str
    rows: Any

    def turns(self, count: int | None, seed: int) -> list[tuple[str, ...]]:
        """The user turns of `count` rows drawn with `seed`, or of all rows in order. Rows without any are skipped.

        Raises UserInputError if there is none, or if the data set cannot be read to the end.
        """
        with _said_clearly(self.name):
            rows = self.rows
            if count is not None:
                rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS)
            found = list(islice(filter(None, (_turns(row, self.column) for row in rows)), count))
        if not found:
            raise UserInputError(
                f"no row of the data set {self.name} holds a user turn in its column '{self.column}'; name "
                "another split, configuration or data set."
            )
        return found


def open_dataset(name: str, config: str | None, split: str) -> DatasetRows:
    """Find a data set and the column that holds its prompts. Reads at most its first rows.

    Raises MissingExtraError without the `datasets` package. Raises UserInputError for an unknown data set,
    configuration or split, without a usable column, and if the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError as e:
        raise MissingExtraError(
            'reading data sets needs the package datasets; run `pip install "orthrus-lm[train]"`.'
        ) from e
    datasets.disable_progress_bars()
    with _said_clearly(name):
        builder = datasets.load_dataset_builder(name, config)
        try:
            rows = builder.as_streaming_dataset(split=split)
        except ValueError as e:
            there = re.search(r"\[(.*)\]", str(e))
            raise UserInputError(
                f"the data set {name} has no split '{split}'; add @SPLIT with one of its own: "
                f"{there[1] if there else e}."
            ) from e
        # Some JSON streams do not know their columns before the first row.
        columns = rows.column_names or list(next(iter(rows), {}))
    column = next((c for c in COLUMNS if c in columns), None)
    if column is None:
        raise UserInputError(
            f"the data set {name} has no column that prompts are read from ({', '.join(COLUMNS)}), only "
            f"{', '.join(columns) or 'none'}; write its prompts to a JSONL file and give that as --prompts."
        )
    wanted = [column, *([_INPUT] if column == "instruction" and _INPUT in columns else [])]
    return DatasetRows(name, str(builder.hash), column, rows.select_columns(wanted))


def user_turns(value: Any) -> tuple[str, ...]:
    """The user turns of text, a list of turns, or messages (role and content, or from and value)."""
    if isinstance(value, dict):
        # Some data sets store messages by column.
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=False)]
    found = []
    for turn in value if isinstance(value, list) else [value]:
        if isinstance(turn, dict):
            said = turn.get("content", turn.get("value"))
            turn = said if str(turn.get("role", turn.get("from"))).lower() in _USERS else None
        if isinstance(turn, str) and turn.strip():
            found.append(turn)
    return tuple(found)


def _turns(row: dict[str, Any], column: str) -> tuple[str, ...]:
    turns = user_turns(row.get(column))
    more = row.get(_INPUT)
    if turns and isinstance(more, str) and more.strip():
        return (f"{turns[0]}\n\n{more}", *turns[1:])
    return turns


@contextmanager
def _said_clearly(name: str) -> Iterator[None]:
    try:
        yield
    except OrthrusError:
        raise
    except ConnectionError as e:
        raise UserInputError(
            f"the data set {name} cannot be fetched, the hub is out of reach; check the network and "
            "HF_HUB_OFFLINE, or name a folder of parquet or JSONL files."
        ) from e
    except FileNotFoundError as e:
        raise UserInputError(
            f"there is no data set {name} with files to read ({_reason(e)}); check the spelling, and run "
            "`hf auth login` if it is private or gated."
        ) from e
    except Exception as e:
        raise UserInputError(
            f"the data set {name} cannot be read ({_reason(e)}); name a configuration like OWNER/NAME/CONFIG."
        ) from e


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words.rstrip(".")[:200]
