"""Measured figures of a view: reads them from a file for its provenance, and makes a table for its card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orthrus.base.json_text import parse_json
from orthrus.base.markdown import markdown_table
from orthrus.errors import UserInputError

# Known columns in their order, with their headings. Other columns follow under their own names.
_HEADS = {
    "set": "prompt set",
    "strategy": "strategy",
    "num_prompts": "prompts",
    "num_tokens": "new tokens",
    "tokens_per_cycle": "tokens per cycle",
    "tokens_per_cycle_pooled": "pooled",
    "tokens_per_forward": "tokens per forward",
    "rows_per_pass": "rows per pass",
    "acceptance_rate": "drafts accepted",
    "num_equal_to_ar": "equal to plain decoding",
    "speedup": "speed-up",
}
_FORMULAS = {
    "tokens_per_cycle": "tokens per cycle: (new tokens - 1) / cycles, the base's own tokens included",
    "tokens_per_forward": "tokens per forward: new tokens / all passes of both views, prefill included",
    "rows_per_pass": "rows per pass: rows of both views / passes, both without the prefill",
    "acceptance_rate": "drafts accepted: accepted / judged drafts",
    "num_equal_to_ar": "equal to plain decoding: prompts with the same tokens",
    "speedup": "speed-up: against the stock base model on the same machine, dtype and prompts",
}


def read_figures(file: Path) -> list[dict[str, Any]]:
    """The figures for the card, one dictionary for each row.

    The file is a JSON list of such rows ({"set": "gsm8k", "tokens_per_cycle": 3.6, ...}), or a result of
    `benchmarks/acceptance.py`. Raises UserInputError for anything else.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserInputError(f"the figures in {file} cannot be read ({e}); give a JSON file.") from e
    if isinstance(content, dict) and isinstance(content.get("results"), dict):
        content = [
            {"set": name, "strategy": strategy, **row} if isinstance(row, dict) else row
            for strategy, by_set in content["results"].items()
            for name, row in (by_set.items() if isinstance(by_set, dict) else [("", None)])
        ]
    if not is_figures(content):
        raise UserInputError(
            f"{file} holds no figures: give a JSON list of objects such as "
            '{"set": "gsm8k", "tokens_per_cycle": 3.6}, or a result of benchmarks/acceptance.py.'
        )
    rows: list[dict[str, Any]] = content
    return rows


def is_figures(content: object) -> bool:
    """Whether this is a list, with at least one element, of rows that a table can show."""
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(row, dict) and row for row in content)
        and all(isinstance(v, str | int | float | None) for row in content for v in row.values())
    )


def figures_table(figures: list[dict[str, Any]]) -> str:
    """A Markdown table with one row for each measurement, and the formulas of its columns."""
    keys = dict.fromkeys(key for row in figures for key in row)
    columns = [key for key in _HEADS if key in keys] + [key for key in keys if key not in _HEADS]
    heads = {key: _HEADS.get(key, key.replace("_", " ")) for key in columns}
    lines = [[_cell(key, row.get(key)) for key in columns] for row in figures]
    table = markdown_table([heads[key] for key in columns], lines)
    formulas = "; ".join(words for key, words in _FORMULAS.items() if key in columns)
    return f"{table}\n\n{formulas[0].upper()}{formulas[1:]}." if formulas else table


def key_table(rows: Mapping[str, str]) -> str:
    """A table of names and values without headings."""
    return markdown_table(["", ""], [[key, value] for key, value in rows.items()])


def _cell(key: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key == "acceptance_rate":
        return f"{100 * value:.1f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
