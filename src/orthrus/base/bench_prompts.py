"""What benchmarks ask: forty prompts of our own over five domains, or a JSONL file of the user's."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from orthrus.base.prompt_files import FilePrompt, parse_prompts, read_prompt_file
from orthrus.errors import UserInputError

DOMAINS = ("math", "code", "chat", "creative", "summary")
NO_DOMAIN = "other"


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """`prompt`: text (one user turn) or chat messages. `domain`: what reports group by."""

    prompt: str | list[dict[str, str]]
    domain: str = NO_DOMAIN


def load_prompts(
    path: Path | None = None, domains: Sequence[str] = (), limit: int | None = None
) -> list[BenchPrompt]:
    """The prompts of a JSONL file, or the built-in ones.

    Args:
        path: one JSON object per line with `prompt` (text), `messages` (role and content each) or `turns` (a
            list of texts, of which only the first is asked; a `prompt` beside them is passed over), and
            optionally `domain`.
        domains: keep only these; all when empty.
        limit: keep at most so many of each domain.

    Raises:
        UserInputError: no such file, a bad line (named), an unknown domain, or nothing left.
    """
    if limit is not None and limit < 1:
        raise UserInputError(f"the limit of prompts per domain must be at least 1, not {limit}.")
    prompts = [BenchPrompt(p.prompt, p.domain or NO_DOMAIN) for p in _read(path)]
    known = {p.domain for p in prompts}
    for domain in domains:
        if domain not in known:
            there = ", ".join(sorted(known))
            raise UserInputError(f"no prompt belongs to domain '{domain}'; there are {there}.")
    seen: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        seen[prompt.domain] += 1
        if (not domains or prompt.domain in domains) and (limit is None or seen[prompt.domain] <= limit):
            kept.append(prompt)
    return kept


def _read(path: Path | None) -> Iterable[FilePrompt]:
    if path is not None:
        return read_prompt_file(path)
    text = files("orthrus.base").joinpath("bench_prompts.jsonl").read_text(encoding="utf-8")
    return parse_prompts("built-in prompts", text)
