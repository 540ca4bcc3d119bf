"""Data sets by name: the built-in prompts, a file of a folder of the user's, or a data set of the hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from orthrus.base.bench_prompts import BenchPrompt, load_prompts
from orthrus.errors import UserInputError

BUILT_IN = "built-in"
_BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where the hub keeps a data set, and what is asked behind each of its prompts. `hub` None: it has none that
    can be read as prompts, so only a file gives them."""

    name: str
    hub: str | None
    config: str | None = None
    split: str = "test"
    suffix: str = ""


DATA_SETS = {
    data.name: data
    for data in (
        DataSet("gsm8k", "openai/gsm8k", "main", suffix=_BOXED),
        DataSet("math500", "HuggingFaceH4/MATH-500", suffix=_BOXED),
        DataSet("aime24", "HuggingFaceH4/aime_2024", split="train", suffix=_BOXED),
        DataSet("aime25", "math-ai/aime25", suffix=_BOXED),
        DataSet("humaneval", "openai/openai_humaneval"),
        DataSet("mbpp", "google-research-datasets/mbpp", "sanitized"),
        DataSet("mt_bench", "HuggingFaceH4/mt_bench_prompts", split="train"),
        # Each of these is a file of its authors, in a form of its own.
        DataSet("pseudo2code", None),
        DataSet("lcb_v5", None),
        DataSet("spec_bench", None),
    )
}


def read_sets(
    names: Sequence[str],
    folder: Path | None = None,
    domains: Sequence[str] = (),
    limit: int | None = None,
) -> list[BenchPrompt]:
    """The prompts of data sets, one after the other.

    Args:
        names: each "built-in", a name of DATA_SETS, or a JSONL file (see `load_prompts`).
        folder: where NAME.jsonl is looked for before the hub is asked. A file's prompts are asked as they are.
            The domain of a named set is its name; of a file of several domains, NAME/DOMAIN.
        domains, limit: as for `load_prompts`, of each set.

    Raises UserInputError for a name that is neither, a set that is in no folder and on no hub, and as
    `load_prompts` does; MissingExtraError where the hub is needed without the package that reads it.
    """
    found: list[BenchPrompt] = []
    for name in names:
        found += _one(name, folder, domains, limit)
    return found


def _one(name: str, folder: Path | None, domains: Sequence[str], limit: int | None) -> list[BenchPrompt]:
    if name == BUILT_IN:
        return load_prompts(None, domains, limit)
    data = DATA_SETS.get(name)
    if data is None:
        path = Path(name)
        if not path.suffix and not os.path.lexists(path):
            raise UserInputError(
                f"there is no data set '{name}'; name {BUILT_IN}, {', '.join(DATA_SETS)}, or a JSONL file."
            )
        return load_prompts(path, domains, limit)
    file = None if folder is None else folder / f"{name}.jsonl"
    if file is not None and file.is_file():
        prompts = load_prompts(file, domains, limit)
        several = len({prompt.domain for prompt in prompts}) > 1
        return [replace(p, domain=f"{name}/{p.domain}" if several else name) for p in prompts]
    if data.hub is None:
        raise UserInputError(
            f"the data set {name} is in no form that the hub gives as prompts; write it to {name}.jsonl, with "
            "'prompt' and 'domain' on each line, and name its folder with --data."
        )
    return _from_hub(data, limit)


def _from_hub(data: DataSet, limit: int | None) -> list[BenchPrompt]:
    from orthrus.training.dataset_prompts import open_dataset

    assert data.hub is not None
    turns = open_dataset(data.hub, data.config, data.split).turns(None, 0)[:limit]
    return [BenchPrompt(first + data.suffix, data.name) for first, *_ in turns]
