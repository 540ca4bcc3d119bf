"""Sources of a corpus's prompts: JSONL files, data sets, or the model itself."""

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from orthrus.base.loading import Base
from orthrus.base.prompt_files import FilePrompt, is_domain, read_prompt_file
from orthrus.errors import UserInputError
from orthrus.training.answers import Answerer
from orthrus.training.dataset_prompts import open_dataset, user_turns
from orthrus.training.self_prompts import self_prompts

NO_DOMAIN = "other"


class Prompt(NamedTuple):
    """The user turns of a dialogue, at least one, and their domain."""

    turns: tuple[str, ...]
    domain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """One source of prompts: a JSONL `file`, a `dataset` (hub id or folder, with `config` and `split`), or the model.

    Without file and dataset the model writes the prompts. count: number of prompts, None for all. suffix: added to each
    prompt.
    """

    file: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str = "train"
    domain: str | None = None
    count: int | None = None
    suffix: str = ""

    @property
    def is_self_made(self) -> bool:
        """Whether the model that answers also writes these prompts."""
        return self.file is None and self.dataset is None

    def __post_init__(self) -> None:
        if self.domain is not None and not is_domain(self.domain):
            raise UserInputError(
                f"a domain must be a printable text of at most 200 characters, not {self.domain[:200]!r}."
            )


def gather_prompts(
    source: PromptSource, base: Base, answerer: Answerer, *, seed: int
) -> tuple[list[Prompt], dict[str, Any]]:
    """(the prompts, facts for the manifest). Raises UserInputError as the readers do."""
    if source.file is not None:
        prompts = read_prompts_of(Path(source.file), source.domain)
        Random(seed).shuffle(prompts)
        return prompts[: source.count], {"file": source.file}
    if source.dataset is not None:
        found = open_dataset(source.dataset, source.config, source.split)
        domain = source.domain or NO_DOMAIN
        facts = {"dataset": source.dataset, "config": source.config, "split": source.split}
        facts |= {"revision": found.revision, "column": found.column}
        return [Prompt(turns, domain) for turns in found.turns(source.count, seed)], facts
    counts = {source.domain or "chat": source.count or 0}
    made = self_prompts(base, answerer, counts, seed=seed)
    return [Prompt((text,), domain) for text, domain in made], {"file": None}


def read_prompts_of(file: Path, domain: str | None = None) -> list[Prompt]:
    """The prompt on each line of a JSONL file; of messages, only the user turns.

    Raises UserInputError, with file and line, for other content, and for a file without prompts.
    """
    return [Prompt(_user_turns(file, p), domain or p.domain or NO_DOMAIN) for p in read_prompt_file(file)]


def _user_turns(file: Path, prompt: FilePrompt) -> tuple[str, ...]:
    turns = user_turns(prompt.prompt)
    if not turns:
        raise UserInputError(f"{file}, line {prompt.line}: no user turn; add one to 'messages'.")
    return (*turns, *prompt.more_turns)
