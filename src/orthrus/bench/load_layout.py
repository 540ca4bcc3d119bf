"""How the figures of a load test are laid out: as `vllm bench serve` prints them, and as one table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orthrus.base.markdown import markdown_table

WIDTH, LABEL = 50, 40
Figures = Mapping[str, Any]

_TIMES = (
    ("Time to First Token", "TTFT", "ttft_ms"),
    ("Time per Output Token (excl. 1st token)", "TPOT", "tpot_ms"),
    ("Inter-token Latency", "ITL", "itl_ms"),
    ("End-to-end Latency", "E2EL", "e2e_ms"),
)
_COUNTS = (
    ("Successful requests:", "num_ok"),
    ("Refused requests (429):", "num_refused"),
    ("Failed requests:", "num_failed"),
    ("Requests sent once more:", "num_repeated"),
    ("Benchmark duration (s):", "duration_s"),
    ("Total input tokens:", "input_tokens"),
    ("Total input tokens from cache:", "cached_tokens"),
    ("Total generated tokens:", "output_tokens"),
    ("Request throughput (req/s):", "requests_per_second"),
    ("Request goodput (req/s):", "goodput"),
    ("Output token throughput (tok/s):", "output_tokens_per_second"),
    ("Total token throughput (tok/s):", "total_tokens_per_second"),
    ("Output throughput to the first arm:", "to_first_arm"),
    ("Mean concurrent requests:", "concurrency_mean"),
    ("Peak concurrent requests:", "concurrency_peak"),
)
_DRAFTS = (
    ("Acceptance length:", "acceptance_length"),
    ("Tokens per forward:", "tokens_per_forward"),
)


def block(row: Figures) -> str:
    """All figures of a level and an arm; what is not known has no line."""
    return "\n".join(_block(row))


def _block(row: Figures) -> Iterator[str]:
    yield " Serving Benchmark Result ".center(WIDTH, "=")
    yield from _lines([("Load:", row["level"]), ("Arm:", row["arm"])])
    yield from _lines([(label, row[name]) for label, name in _COUNTS])
    for title, short, name in _TIMES:
        if row[name]:
            yield title.center(WIDTH, "-")
            names = {"mean": "Mean", "median": "Median", "p95": "P95", "p99": "P99"}
            yield from _lines([(f"{names[key]} {short} (ms):", value) for key, value in row[name].items()])
    if row["tokens_per_forward"]:
        yield "Speculative Decoding".center(WIDTH, "-")
        rate = row["acceptance_rate"]
        yield from _lines([("Acceptance rate (%):", None if rate is None else rate * 100.0)])
        yield from _lines([(label, row[name]) for label, name in _DRAFTS])
    if row["num_checked"]:
        yield "Answers Against the Same Alone".center(WIDTH, "-")
        yield from _lines([("Checked:", row["num_checked"]), ("Different:", row["num_different"])])
    yield "=" * WIDTH


def _lines(pairs: Sequence[tuple[str, Any]]) -> Iterator[str]:
    for label, value in pairs:
        if value is not None:
            yield f"{label:<{LABEL}} {value:.2f}" if isinstance(value, float) else f"{label:<{LABEL}} {value}"


_COLUMNS = (
    ("load", "level", 0),
    ("arm", "arm", 0),
    ("ok", "num_ok", 0),
    ("429", "num_refused", 0),
    ("failed", "num_failed", 0),
    ("tok/s", "output_tokens_per_second", 1),
    ("to first arm", "to_first_arm", 2),
    ("goodput/s", "goodput", 2),
    ("TTFT p50", "ttft_ms.median", 1),
    ("TTFT p99", "ttft_ms.p99", 1),
    ("TPOT mean", "tpot_ms.mean", 1),
    ("TPOT p99", "tpot_ms.p99", 1),
    ("tok/pass", "tokens_per_forward", 2),
    ("differ", "num_different", 0),
)


def summary(rows: Sequence[Figures]) -> str:
    """A line for each level and arm."""
    body = [[_cell(row, name, digits) for _, name, digits in _COLUMNS] for row in rows]
    return markdown_table([head for head, _, _ in _COLUMNS], body, "ll" + "r" * (len(_COLUMNS) - 2))


def _cell(row: Figures, name: str, digits: int) -> str:
    figure, _, part = name.partition(".")
    value = row[figure]
    if part and value is not None:
        value = value[part]
    if value is None or (name == "num_different" and not row["num_checked"]):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
