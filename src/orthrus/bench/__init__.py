"""Measure: the stock model against every strategy, same prompts, the formula beside the number."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthrus.bench.compare import Comparison, compare_reports
    from orthrus.bench.report import BenchReport, read_report
    from orthrus.bench.runner import BenchOptions, run_bench

__all__ = [
    "BenchOptions",
    "BenchReport",
    "Comparison",
    "compare_reports",
    "read_report",
    "run_bench",
]

_HOME = {
    "BenchOptions": "runner",
    "BenchReport": "report",
    "Comparison": "compare",
    "compare_reports": "compare",
    "read_report": "report",
    "run_bench": "runner",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the error for a wrong prompt file comes without waiting for torch."""
    if name in _HOME:
        return getattr(import_module(f"orthrus.bench.{_HOME[name]}"), name)
    raise AttributeError(f"module 'orthrus.bench' has no attribute {name!r}")
