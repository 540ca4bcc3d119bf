"""What requests mean to each other, and grammars: python benchmarks/company.py FILE.jsonl ... [--help]

A long prompt arrives among running requests; a second turn follows a first one with a long history; texts of a
JSON schema are made with drafts and plainly. Leave the machine alone meanwhile; --quick rehearses.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from orthrus.api import Orthrus, decode_config
from orthrus.base.bench_prompts import load_prompts
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.config import Grammar
from orthrus.engine.engine import EngineConfig

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "kind": {"enum": ["question", "task", "story"]},
        "difficulty": {"type": "integer", "minimum": 1, "maximum": 10},
        "words": {
            "type": "array",
            "items": {"type": "string", "maxLength": 12},
            "minItems": 1,
            "maxItems": 4,
        },
    },
    "required": ["title", "kind", "difficulty", "words"],
    "additionalProperties": False,
}
LEGEND = {
    "long prompt": "longest_gap_ms: longest time between two records with tokens of any of the running requests, "
    "from the arrival of the long prompt to its first token; chunk_ms: longest pass of the same prompt alone, "
    "in chunks; gap_before_ms: longest gap before it arrived; median over repeats",
    "second turn": "time to first token of a second turn / of the same token ids with nothing kept; median over "
    "repeats",
    "schema": "texts of one JSON schema, greedy and sampled: num_valid: parse and keep to the schema; num_equal: "
    "token ids equal those of plain decoding under the same schema; tokens_per_pass: tokens / passes of auto; "
    "over_plain: time of plain / time of auto, all texts, one at a time",
}


def long_prompt(
    orthrus: Orthrus, prompts: Sequence[list[int]], num_tokens: int, repeats: int
) -> dict[str, Any]:
    engine = orthrus.engine
    ids = filler(prompts, num_tokens)
    gaps, chunks, before = [], [], []
    for repeat in range(repeats):
        # Other beginnings, so that nothing is found in the store of pages.
        long = [1 + repeat, *ids[1:]]
        times: list[float] = []
        alone = orthrus.submit([100 + repeat, *long[1:]], decode_config(strategy="auto", max_new_tokens=1))
        while not alone.closed:
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        chunks.append(max(times) * 1e3)
        last: dict[int, float] = {}
        longest = [0.0]

        def see(
            index: int, cycle: Any, last: dict[int, float] = last, longest: list[float] = longest
        ) -> None:
            now = time.perf_counter()
            if index in last and cycle.token_ids:
                longest[0] = max(longest[0], now - last[index])
            last[index] = now

        config = decode_config(strategy="auto", max_new_tokens=400, ignore_eos=True)
        running = [
            orthrus.submit(prompt, config, on_cycle=lambda cycle, index=i: see(index, cycle))  # type: ignore[misc]
            for i, prompt in enumerate(prompts[:8])
        ]
        while any(len(request.token_ids) < 8 for request in running):
            engine.step()
        longest[0] = 0.0
        for _ in range(10):
            engine.step()
        before.append(longest[0] * 1e3)
        longest[0] = 0.0
        arrived = orthrus.submit(long, decode_config(strategy="auto", max_new_tokens=1))
        while not arrived.closed:
            engine.step()
        gaps.append(longest[0] * 1e3)
        for request in running:
            engine.drop(request)
    return {
        "num_tokens": len(ids),
        "longest_gap_ms": median(gaps),
        "chunk_ms": median(chunks),
        "gap_before_ms": median(before),
    }


def second_turn(
    orthrus: Orthrus, prompts: Sequence[list[int]], num_tokens: int, repeats: int
) -> dict[str, Any]:
    config = decode_config(strategy="auto", max_new_tokens=16, ignore_eos=True)
    ratios, fresh_ms, turn_ms = [], [], []
    for repeat in range(repeats):
        history = [11 + 2 * repeat, *filler(prompts, num_tokens)[1:]]
        said = orthrus.stream_ids(history, config).drain()
        turn = [*history, *said.token_ids, *prompts[0][:24]]
        again = orthrus.stream_ids(turn, config).drain()
        # The same length with another first token, so that no page of it is kept.
        fresh = orthrus.stream_ids([12 + 2 * repeat, *turn[1:]], config).drain()
        turn_ms.append(again.stats.ttft_ms)
        fresh_ms.append(fresh.stats.ttft_ms)
        ratios.append(again.stats.ttft_ms / fresh.stats.ttft_ms)
    return {
        "history_tokens": num_tokens,
        "ratio": median(ratios),
        "turn_ms": median(turn_ms),
        "fresh_ms": median(fresh_ms),
    }


def schema(orthrus: Orthrus, prompts: Sequence[list[int]], number: int) -> dict[str, Any]:
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    seconds = dict.fromkeys(("ar", "auto"), 0.0)
    num_tokens = num_passes = num_valid = num_equal = 0
    orthrus.stream_ids(prompts[0], decode_config(max_new_tokens=4, grammar=grammar)).drain()
    for i in range(number):
        config = decode_config(
            max_new_tokens=200,
            grammar=grammar,
            temperature=0.0 if i % 2 == 0 else 1.0,
            seed=i,
        )
        results = {}
        for arm in ("ar", "auto") if i % 4 < 2 else ("auto", "ar"):
            start = time.perf_counter()
            results[arm] = orthrus.stream_ids(
                prompts[i % len(prompts)], replace(config, strategy=arm)
            ).drain()
            seconds[arm] += time.perf_counter() - start
        num_equal += results["ar"].token_ids == results["auto"].token_ids
        num_valid += is_valid(results["auto"].text)
        num_tokens += results["auto"].stats.num_tokens
        num_passes += results["auto"].stats.num_passes
    return {
        "number": number,
        "num_valid": num_valid,
        "num_equal": num_equal,
        "tokens_per_pass": num_tokens / num_passes,
        "over_plain": seconds["ar"] / seconds["auto"],
    }


def is_valid(text: str) -> bool:
    """Whether a text keeps to SCHEMA; by hand, so that no second checker of schemas is needed."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (
        found.keys() == SCHEMA["properties"].keys()  # type: ignore[attr-defined]
        and isinstance(found["title"], str)
        and len(found["title"]) <= 40
        and found["kind"] in ("question", "task", "story")
        and type(found["difficulty"]) is int
        and 1 <= found["difficulty"] <= 10
        and 1 <= len(found["words"]) <= 4
        and all(isinstance(word, str) and len(word) <= 12 for word in found["words"])
    )


def filler(prompts: Sequence[list[int]], num_tokens: int) -> list[int]:
    """So many token ids, out of the prompts."""
    joined = [token_id for prompt in prompts for token_id in prompt]
    return (joined * (1 + num_tokens // len(joined)))[:num_tokens]


def main(
    files: Annotated[list[Path], typer.Argument(help="Prompts, JSONL.")],
    precision: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    repeats: Annotated[int, typer.Option(help="Of the first two.")] = 5,
    texts: Annotated[int, typer.Option(help="Of the JSON schema.")] = 200,
    output: Annotated[Path | None, typer.Option(help="Where the result goes.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A rehearsal.")] = False,
) -> None:
    report: dict[str, Any] = {"kind": "orthrus-company", "legend": LEGEND, "results": {}}
    for name in precision or ["bfloat16"]:
        orthrus = Orthrus.load(dtype=name, engine=EngineConfig(max_slots=32_768))
        orthrus.time_passes()
        asked = [prompt for file in files for prompt in load_prompts(file)]
        prompts = [orthrus.base.encode_prompt(prompt.prompt) for prompt in asked[: 16 if quick else 64]]
        report["results"][name] = {
            "long prompt": long_prompt(orthrus, prompts, 1000 if quick else 6000, 1 if quick else repeats),
            "second turn": second_turn(orthrus, prompts, 500 if quick else 2000, 1 if quick else repeats),
            "schema": schema(orthrus, prompts, 8 if quick else texts),
        }
        typer.echo(f"{name}: {json.dumps(report['results'][name])}", err=True)
        report["provenance"] = provenance(device="cpu", dtype=", ".join(report["results"]), seed=0)
        path = output or Path(__file__).parent / "results" / "company-cpu.json"
        write_text_atomic(path, json.dumps(report, indent=2) + "\n")
        del orthrus


if __name__ == "__main__":
    typer.run(main)
