"""Figures of the trained rivals from counts of single prompts, and the table that holds them side by side."""

import random
from statistics import mean
from typing import Any

from orthrus.base.markdown import markdown_table

Counts = list[tuple[int, int, int, int]]
RESAMPLES = 10_000

LEGEND = {
    "targets": "drafted positions that a loss was taken of; for a seed the same positions of the same sequences in all "
    "arms",
    "tokens_per_cycle": "(tokens - 1) / cycles, pooled over prompts: the base's own token of each cycle counts, and "
    "with the floor the one that the draft pass decides; chain, greedy, float32, every text equal to the stock model's",
    "accepted_per_cycle": "accepted drafts / cycles; tokens that the base decided do not count, drafts past the end "
    "of an answer do",
    "acceptance_rate": "accepted drafts / drafts that were verified",
    "cycle_cost": "(median CPU time of a draft + of a verification) / of a base pass over one row; the same eager "
    "PyTorch, one thread, the passes of one run in turns",
    "tokens_per_base_pass": "tokens_per_cycle / cycle_cost: above 1 the arm would beat plain eager decoding",
    "cpu_seconds": "of the training, base's own passes included: where an earlier arm's were kept, their time then",
    "foreseen_tokens_per_cycle": "on held-out sequences: 1 + sum over positions of the product of the rates up to "
    "there",
    "own_cache_numbers_per_token": "numbers that the drafter keeps for each token of context in a cache of its own",
    "near_ties": "texts that part from the stock model's where its two best logits are less than 0.001 apart; any "
    "other difference stops the run",
    "prompts": "(tokens - 1, cycles, drafts verified, accepted drafts) of each",
    "less_ours": "tokens_per_cycle of the arm less that of orthrus decoded alike, first seed, and the 95 % interval of "
    "a paired bootstrap over prompts (10,000 draws)",
    "check": "settings that were tried for a small budget with seed 0; the one that foresaw most was taken",
}


def pooled(counts: Counts) -> dict[str, float]:
    tokens, cycles, drafted, accepted = (sum(each) for each in zip(*counts, strict=True))
    return {
        "tokens_per_cycle": tokens / cycles,
        "accepted_per_cycle": accepted / cycles,
        "acceptance_rate": accepted / max(1, drafted),
    }


def score_of(by_set: dict[str, Counts], clock_ms: dict[str, float]) -> dict[str, Any]:
    """Figures of one way to decode, by set of prompts and over all of them."""
    every = pooled([count for counts in by_set.values() for count in counts])
    cost = (clock_ms["draft"] + clock_ms["verify"]) / clock_ms["one_row"]
    return {
        "all": every,
        "sets": {name: pooled(counts) for name, counts in by_set.items()},
        "cycle_cost": cost,
        "draft_cost": clock_ms["draft"] / clock_ms["one_row"],
        "tokens_per_base_pass": every["tokens_per_cycle"] / cost,
        "cpu_ms": clock_ms,
        "prompts": by_set,
    }


def less_ours(arms: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """By arm and way to decode: tokens per cycle less our view's decoded that way, and the interval; first seed."""
    runs = {name: arm["trainings"][0]["modes"] for name, arm in arms.items() if arm["trainings"]}
    ours = runs.get("orthrus", {})
    return {
        name: {
            mode: difference(_every(run), _every(ours[mode])) for mode, run in modes.items() if mode in ours
        }
        for name, modes in runs.items()
        if name != "orthrus"
    }


def difference(mine: Counts, ours: Counts) -> list[float]:
    """[difference, lower end, upper end] over the same prompts, resampled together."""
    drawn, found = random.Random(0), []
    for _ in range(RESAMPLES):
        picks = drawn.choices(range(len(ours)), k=len(ours))
        found.append(_tau([mine[i] for i in picks]) - _tau([ours[i] for i in picks]))
    found.sort()
    return [_tau(mine) - _tau(ours), *(found[round(share * (RESAMPLES - 1))] for share in (0.025, 0.975))]


def _tau(counts: Counts) -> float:
    return sum(count[0] for count in counts) / sum(count[1] for count in counts)


def _every(run: dict[str, Any]) -> Counts:
    return [tuple(count) for some in run["prompts"].values() for count in some]


def table(arms: dict[str, Any]) -> str:
    """A line for each arm and way to decode; means over seeds, and each seed's tokens per cycle."""
    sets = next((next(iter(t["modes"].values()))["sets"] for a in arms.values() for t in a["trainings"]), {})
    header = [
        *("arm", "decoded with", "accepted per cycle", "tokens per cycle", "by seed", *sets),
        *(
            "draft, base passes",
            "cycle, base passes",
            "tokens per base pass",
            "trained",
            "CPU s",
            "own cache",
        ),
    ]
    lines = []
    for arm in arms.values():
        for mode in arm["trainings"][0]["modes"] if arm["trainings"] else []:
            trainings = arm["trainings"]
            runs = [training["modes"][mode] for training in trainings]
            per_seed = [run["all"]["tokens_per_cycle"] for run in runs]
            lines.append(
                [
                    arm["label"],
                    mode,
                    f"{mean(run['all']['accepted_per_cycle'] for run in runs):.2f}",
                    f"{mean(per_seed):.2f}",
                    ", ".join(f"{value:.3f}" for value in per_seed),
                    *(f"{mean(run['sets'][name]['tokens_per_cycle'] for run in runs):.2f}" for name in sets),
                    f"{mean(run['draft_cost'] for run in runs):.2f}",
                    f"{mean(run['cycle_cost'] for run in runs):.2f}",
                    f"{mean(run['tokens_per_base_pass'] for run in runs):.2f}",
                    f"{trainings[0]['trained_parameters'] / 1e6:.1f} M",
                    f"{mean(training['cpu_seconds'] for training in trainings):.0f}",
                    "yes" if trainings[0]["own_cache_numbers_per_token"] else "no",
                ]
            )
    return markdown_table(header, lines)
