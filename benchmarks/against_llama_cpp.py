"""Orthrus beside llama.cpp on one machine: python benchmarks/against_llama_cpp.py [--help]

Both continue the same token ids greedily for the same number of tokens, turn by turn on every prompt, so that
a drift of the machine hits both. llama.cpp runs the default model's own GGUF file (Q4_1) at its fastest
number of threads, Orthrus every combination of the options given. Needs llama-cpp-python (`pip install
"orthrus-lm[llama-cpp]"`; see llama_side.py for compilers that break it). Leave the machine alone meanwhile.
"""

import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from llama_side import Decode, LlamaSide, Run, best_threads, default_gguf, usable_cores

from orthrus.api import Orthrus, decode_config
from orthrus.audit.explain import first_difference
from orthrus.base.bench_prompts import load_prompts
from orthrus.base.markdown import markdown_table
from orthrus.base.outputs import write_text_atomic
from orthrus.base.provenance import installed_version, provenance
from orthrus.base.storage import sha256_file
from orthrus.bench.cycles import without_reuse
from orthrus.bench.records import output_digest
from orthrus.bench.runner import prompts_digest

LLAMA = "llama.cpp"
SETTLE_S = 0.02
NUM_DRAWS = 10_000
LEGEND = {
    "decode_tokens_per_second": "(new tokens - 1) / time after the first token; median over prompts of the "
    "median over repeats",
    "tokens_per_second": "new tokens / (time to first token + decoding time); median likewise",
    "decode_ratio": "ours / llama.cpp's decode_tokens_per_second of the same prompt and repeat, median over "
    "repeats; then median, least and largest over prompts",
    "interval": "95 % of the bootstrap of that median over prompts (percentiles of 10,000 draws, seed 0)",
    "ratio": "the same of tokens_per_second, prefill included",
    "num_equal": "prompts whose tokens all equal llama.cpp's, whose quantised arithmetic lets near-ties fall "
    "otherwise: for information",
    "first_difference": "index of the first new token that differs, by prompt; null where none does",
    "runs": "by arm, prompt and repeat; output: a digest of the new tokens",
    "threads": "llama.cpp's decode_tokens_per_second by number of threads; the fastest is used",
}


def our_side(orthrus: Orthrus, decode: dict[str, Any]) -> Decode:
    def run(prompt_ids: list[int], num_new: int) -> Run:
        config = decode_config(max_new_tokens=num_new, ignore_eos=True, **decode)
        result = orthrus.stream_ids(prompt_ids, config).drain()
        return Run(result.token_ids, result.stats.ttft_ms, result.stats.decode_ms)

    return run


def main(
    prompts: Annotated[
        Path | None, typer.Argument(help="JSONL file of prompts; left out, the built-in ones.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="What Orthrus loads: the default model, or its like.")
    ] = "default",
    gguf: Annotated[
        Path | None, typer.Option(help="What llama.cpp loads; the default model's own file.")
    ] = None,
    view: Annotated[str, typer.Option(help="View folder, 'default' or 'untrained'.")] = "default",
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated: a dtype of Orthrus.load.")] = None,
    runner: Annotated[
        list[str] | None, typer.Option(help="May be repeated: a runner of Orthrus.load.")
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="May be repeated. Left out: ar and auto.")
    ] = None,
    load: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for Orthrus.load; may be repeated.")
    ] = None,
    decode: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for decoding; may be repeated.")
    ] = None,
    domain: Annotated[list[str] | None, typer.Option(help="Only prompts of this domain.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each domain.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of each prompt.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of llama.cpp; left out, tried from 1 up.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print a table and a line of JSON, and keep every run."""
    loads = [named(load) | dict(pair) for pair in combinations(dtype=dtype, runner=runner)]
    decodes = [named(decode) | {"strategy": name} for name in strategy or ("ar", "auto")]
    for keywords, function in ((loads[0], Orthrus.load), (decodes[0], decode_config)):
        check_keywords(keywords, function)
    asked = load_prompts(prompts, tuple(domain or ()), limit)
    # Both sides read every prompt anew.
    loaded = [without_reuse(Orthrus.load(model, view, **keywords)) for keywords in loads]
    ids = [loaded[0].base.encode_prompt(prompt.prompt) for prompt in asked]
    arms: dict[str, Decode] = {}
    settings: dict[str, dict[str, Any]] = {}
    for (orthrus, of_load), of_decode in product(zip(loaded, loads, strict=True), decodes):
        name = arm_name(of_load | of_decode)
        arms[name] = our_side(orthrus, of_decode)
        settings[name] = {"load": of_load, "decode": of_decode, "model": orthrus.describe()}
        if of_decode["strategy"] == "auto":
            orthrus.time_passes()
    path = gguf or default_gguf()
    llama = LlamaSide(path, max(map(len, ids)) + max_new_tokens)
    numbers = [threads] if threads else range(1, usable_cores() + 1)
    tried = best_threads(llama, ids[0], numbers, num_new=min(48, max_new_tokens))
    llama.set_threads(max(tried, key=tried.__getitem__))
    arms[LLAMA] = llama.decode
    runs: dict[str, list[list[Run]]] = {name: [[] for _ in ids] for name in arms}
    for name, prompt, run in measure(arms, ids, max_new_tokens, repeats):
        runs[name][prompt].append(run)
        typer.echo(
            f"prompt {prompt + 1} of {len(ids)}, {name}: {run.decode_tokens_per_second:.1f}/s", err=True
        )
    llama.close()
    results = summarise(runs)
    about = loaded[0].describe()
    report = {
        "kind": "orthrus-against-llama-cpp",
        "legend": LEGEND,
        "results": results,
        "settings": settings,
        "llama_cpp": {
            "version": installed_version("llama-cpp-python"),
            "system_info": llama.system_info,
            "file": path.name,
            "sha256": sha256_file(path),
            "threads": tried,
        },
        "options": {"max_new_tokens": max_new_tokens, "repeats": repeats, "limit": limit},
        "prompts": {"digest": prompts_digest(asked), "lengths": [len(i) for i in ids]},
        "provenance": provenance(device=about["device"], dtype=about["dtype"], seed=None),
        "runs": {name: [[kept(run) for run in row] for row in rows] for name, rows in runs.items()},
    }
    target = output or Path(__file__).parent / "results" / "llama-cpp-cpu.json"
    write_text_atomic(target, json.dumps(report, indent=2) + "\n")
    typer.echo(table(results))
    line = {name: round(row["decode_ratio"]["median"], 3) for name, row in results.items() if name != LLAMA}
    typer.echo(json.dumps({"decode_ratio": line}))


def kept(run: Run) -> dict[str, Any]:
    """What the report keeps of a run: its times, and a digest of its tokens."""
    return {"output": output_digest(run.token_ids), "ttft_ms": run.ttft_ms, "decode_ms": run.decode_ms}


def named(pairs: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE as keywords; a value that is JSON is meant as such."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not separator:
            raise typer.BadParameter(f"{pair!r} is not NAME=VALUE")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.replace("-", "_")] = value
    return found


def combinations(**values: Sequence[str] | None) -> Iterator[tuple[tuple[str, str], ...]]:
    """Every combination of the values given, as pairs; what was left out is left to its default."""
    yield from product(*([(name, value) for value in given] for name, given in values.items() if given))


def check_keywords(keywords: dict[str, Any], function: Callable[..., Any]) -> None:
    """Refuse what the function does not take, before minutes go by."""
    known = inspect.signature(function).parameters
    if unknown := sorted(keywords.keys() - known.keys()):
        raise typer.BadParameter(
            f"{function.__qualname__} takes no {unknown[0]}; it takes {', '.join(known)}"
        )


def arm_name(settings: dict[str, Any]) -> str:
    return ", ".join(str(value) for value in settings.values())


def measure(
    arms: dict[str, Decode], prompts: list[list[int]], num_new: int, repeats: int
) -> Iterator[tuple[str, int, Run]]:
    """(arm, prompt, run) as they come; each arm takes its turn at going first. The first round warms up."""
    names = list(arms)
    for decode in arms.values():
        decode(prompts[0], min(16, num_new))
    for index, prompt_ids in enumerate(prompts):
        for repeat in range(repeats):
            shift = (index * repeats + repeat) % len(names)
            for name in names[shift:] + names[:shift]:
                # The threads of the side before may still be spinning for more work.
                time.sleep(SETTLE_S)
                yield name, index, arms[name](prompt_ids, num_new)


def summarise(runs: dict[str, list[list[Run]]]) -> dict[str, dict[str, Any]]:
    """The numbers of each arm, as `LEGEND` says."""
    theirs = runs[LLAMA]
    results: dict[str, dict[str, Any]] = {}
    for name, ours in runs.items():
        row: dict[str, Any] = {
            metric: median(median(getattr(run, metric) for run in repeats) for repeats in ours)
            for metric in ("decode_tokens_per_second", "tokens_per_second")
        }
        if name != LLAMA:
            for key, metric in (("decode_ratio", "decode_tokens_per_second"), ("ratio", "tokens_per_second")):
                row[key] = spread(
                    [
                        median(
                            getattr(a, metric) / getattr(b, metric) for a, b in zip(mine, other, strict=True)
                        )
                        for mine, other in zip(ours, theirs, strict=True)
                    ]
                )
            row["first_difference"] = [
                None
                if mine[0].token_ids == other[0].token_ids
                else first_difference(mine[0].token_ids, other[0].token_ids)
                for mine, other in zip(ours, theirs, strict=True)
            ]
            row["num_equal"] = row["first_difference"].count(None)
        results[name] = row
    return results


def spread(values: list[float]) -> dict[str, Any]:
    """Median over prompts, its bootstrap interval, and the least and largest."""
    draws = np.random.default_rng(0).choice(np.array(values), (NUM_DRAWS, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {
        "median": median(values),
        "interval": [float(low), float(high)],
        "least": min(values),
        "largest": max(values),
        "by_prompt": values,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, row in results.items():
        cells = [name, f"{row['decode_tokens_per_second']:.1f}", f"{row['tokens_per_second']:.1f}"]
        for key in ("decode_ratio", "ratio"):
            s = row.get(key)
            cells.append(
                f"{s['median']:.2f} [{s['interval'][0]:.2f}, {s['interval'][1]:.2f}] "
                f"({s['least']:.2f}..{s['largest']:.2f})"
                if s
                else "1"
            )
        cells.append(f"{row['num_equal']} of {len(row['first_difference'])}" if "num_equal" in row else "–")
        lines.append(cells)
    header = [
        "",
        "decode tokens/s",
        "tokens/s",
        "decode ratio [95 %] (range)",
        "ratio with prefill",
        "equal texts",
    ]
    return markdown_table(header, lines)


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
