"""One engine in a process of its own: python engine_run.py PLAN.json OUT.json

The plan: `model`, `options` of vllm.LLM, and `rounds`, each a list of prompts (token ids) with `sampling`. The
answer: for each round token ids, how vLLM's own counters rose, and seconds.
"""

import json
import os
import sys
import time
from typing import Any

# One process: what fails in it fails here, and nothing is left running.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's counters as /metrics shows them."""
    found = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "values"):
            found[metric.name] = list(metric.values)
        elif hasattr(metric, "value"):
            found[metric.name] = metric.value
    return found


def risen(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [b - a for a, b in zip(before.get(name, [0] * len(value)), value, strict=True)]
        if isinstance(value, list)
        else value - before.get(name, 0)
        for name, value in after.items()
        if name.startswith("vllm:") and not name.endswith("_info")
    }


def main(plan_file: str, out_file: str) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    with open(plan_file) as f:
        plan = json.load(f)
    start = time.perf_counter()
    llm = LLM(plan["model"], dtype="float32", disable_log_stats=False, **plan["options"])
    answer: dict[str, Any] = {"start_seconds": time.perf_counter() - start, "rounds": []}
    for one in plan["rounds"]:
        before, start = counters(llm), time.perf_counter()
        outputs = llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in one["prompts"]],
            SamplingParams(**one["sampling"]),
            use_tqdm=False,
        )
        answer["rounds"].append(
            {
                "seconds": time.perf_counter() - start,
                "token_ids": [[list(text.token_ids) for text in output.outputs] for output in outputs],
                "counters": risen(before, counters(llm)),
            }
        )
    with open(out_file, "w") as f:
        json.dump(answer, f)


if __name__ == "__main__":
    main(*sys.argv[1:])
