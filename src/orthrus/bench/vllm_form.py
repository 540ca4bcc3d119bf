"""Acceptance in the form in which vLLM reports it for each request (its `speculative_decoding` metrics, detailed)."""

from collections import Counter
from typing import Any

from orthrus.bench.records import Run
from orthrus.bench.report import BenchReport


def acceptance(report: BenchReport) -> list[dict[str, Any]]:
    """One object a run of a drafting arm: whose it is, and vLLM's fields under vLLM's names.

    vLLM counts steps, which are our cycles that drafted, and a bonus token for each:
    `mean_acceptance_length` = 1 + accepted / steps. With the floor a cycle of ours commits one token more.
    """
    return [
        {
            "arm": run.arm,
            "domain": run.domain,
            "prompt_index": run.prompt_index,
            "repeat": run.repeat,
            "temperature": run.temperature,
            "completion_tokens": run.num_tokens,
            "metrics": {"speculative_decoding": stats},
        }
        for run in report.runs
        if (stats := _stats(run)) is not None
    ]


def _stats(run: Run) -> dict[str, Any] | None:
    if not run.accepted:
        return None
    steps, accepted, drafted = len(run.accepted), sum(run.accepted), sum(run.drafted)
    histogram = Counter(run.accepted)
    return {
        "mean_acceptance_length": 1.0 + accepted / steps,
        "draft_acceptance_rate": accepted / drafted,
        "acceptance_histogram": {str(n): histogram[n] for n in sorted(histogram)},
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": max(run.drafted),
        "per_step_accepted": list(run.accepted),
        "per_step_drafted": list(run.drafted),
    }
