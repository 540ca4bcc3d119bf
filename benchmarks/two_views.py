"""Two views of one base in one run: python benchmarks/two_views.py BEFORE NOW FILE... [--help]

Plain decoding, `auto` with the first view and `auto` with the second answer the same prompts; for each prompt and
round their order is drawn anew, since what runs first or last has a lead. Every text must be plain decoding's. Leave
the machine alone meanwhile.
"""

import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from orthrus.api import Orthrus
from orthrus.base.bench_prompts import load_prompts
from orthrus.base.fingerprint import weights_fingerprint
from orthrus.base.outputs import check_report, write_text_atomic
from orthrus.base.provenance import provenance

ARMS = ("plain", "before", "now")
LEGEND = {
    "over_plain": "seconds of plain decoding / seconds of the arm, sums over prompts and rounds; "
    "prompts were fed before",
    "now_over_before": "seconds of auto with the view before / seconds of auto with the view now",
    "tokens_per_forward": "sum of tokens / sum of passes, prefill included, both views counted",
}


@dataclass
class Sums:
    """Of one arm on one set."""

    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0


def main(
    before: Annotated[str, typer.Argument(help="A view folder.")],
    now: Annotated[str, typer.Argument(help="A view folder.")],
    files: Annotated[list[Path], typer.Argument(help="Prompt files, each a set.")],
    model: Annotated[str, typer.Option(help="As in Orthrus.load.")] = "default",
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated. Left out: float32.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each file.")] = 5,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=2)] = 96,
    seed: Annotated[int, typer.Option(help="Of the order of the arms.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure, print, and exit with 1 where a text was not plain decoding's."""
    if output is not None:
        check_report(output)
    report: dict[str, Any] = {
        "kind": "orthrus-two-views",
        "legend": LEGEND,
        "results": {},
        "num_different": 0,
    }
    report["options"] = {"before": before, "now": now, "files": [file.name for file in files], "limit": limit}
    report["options"] |= {"rounds": rounds, "max_new_tokens": max_new_tokens}
    for name in dtype or ["float32"]:
        views = {"before": Orthrus.load(model, before, name), "now": Orthrus.load(model, now, name)}
        for one in views.values():
            one.generate("Hello.", max_new_tokens=16)
        report["views"] = {
            arm: weights_fingerprint(one.dual.view_parameters().items()) for arm, one in views.items()
        }
        found = report["results"][name] = {}
        for file in files:
            prompts = [prompt.prompt for prompt in load_prompts(file, (), limit)]
            sums, num_different = measured(views, prompts, rounds, max_new_tokens, seed)
            found[file.stem] = figures(sums)
            report["num_different"] += num_different
            typer.echo(f"{name}, {file.stem}: {json.dumps(found[file.stem])}")
    report["provenance"] = provenance(device="cpu", dtype=", ".join(report["results"]), seed=seed)
    if output is not None:
        write_text_atomic(output, json.dumps(report, indent=1) + "\n")
    if report["num_different"]:
        raise typer.Exit(1)


def measured(
    views: dict[str, Orthrus], prompts: list[Any], rounds: int, max_new_tokens: int, seed: int
) -> tuple[dict[str, Sums], int]:
    """The sums of each arm, and how many texts were not plain decoding's."""
    sums: dict[str, Sums] = defaultdict(Sums)
    num_different = 0
    draw = random.Random(seed)
    for _ in range(rounds):
        for prompt in prompts:
            # All arms find the prompt in the prefix store: else whoever comes second would.
            for one in views.values():
                one.generate(prompt, max_new_tokens=1, strategy="ar")
            texts = {}
            for arm in draw.sample(ARMS, len(ARMS)):
                orthrus = views.get(arm, views["before"])
                start = perf_counter()
                result = orthrus.generate(
                    prompt, max_new_tokens=max_new_tokens, strategy="ar" if arm == "plain" else "auto"
                )
                sums[arm].seconds += perf_counter() - start
                sums[arm].tokens += result.stats.num_tokens
                sums[arm].passes += result.stats.num_passes
                texts[arm] = result.token_ids
            num_different += sum(texts[arm] != texts["plain"] for arm in ARMS)
    return sums, num_different


def figures(sums: dict[str, Sums]) -> dict[str, Any]:
    """What `LEGEND` names."""
    plain_s, before_s, now_s = (sums[arm].seconds for arm in ARMS)
    return {
        "over_plain": {"before": round(plain_s / before_s, 3), "now": round(plain_s / now_s, 3)},
        "now_over_before": round(before_s / now_s, 3),
        "tokens_per_forward": {arm: round(sums[arm].tokens / sums[arm].passes, 3) for arm in ARMS},
        "plain_tokens_per_second": round(sums["plain"].tokens / plain_s, 1),
    }


if __name__ == "__main__":
    typer.run(main)
