"""Trained rivals on one corpus at an equal number of targets: python benchmarks/rivals/trained CORPUS OUT.json [--help]

A DFlash and an EAGLE-3 drafter, a view in the manner of Uno, and ours, each from its own start, by one loop. A part
that is done is not done again: the same command goes on wherever it was stopped. `--quick` rehearses.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from chain import Clock, decode, first_gap
from drafter_parts import Lessons
from equal_loop import budget, foreseen, learn
from rival_arms import ARMS, SHARED, Arm, Built, build, targets_of
from rival_table import LEGEND, Counts, less_ours, score_of, table

from orthrus.base.bench_prompts import load_prompts
from orthrus.base.loading import Base, load_base
from orthrus.base.outputs import check_report, write_text_atomic
from orthrus.base.provenance import provenance
from orthrus.engine.stock import stock_generate
from orthrus.training.packs import packed_corpora
from orthrus.training.recipe import to_plain
from orthrus.training.view_score import held_out_prompts

HELD_OUT_SEQUENCES = 6
# In logits, where rounding in float32 is about a hundred times smaller.
NEAR_TIE = 1e-3
Prompts = dict[str, list[list[int]]]


def main(
    corpus: Annotated[Path, typer.Argument(help="A folder that `orthrus synth` made.")],
    output: Annotated[Path, typer.Argument(help="JSON file to write.")],
    runs: Annotated[Path, typer.Option(help="Where finished parts stay.")] = Path("runs/rivals"),
    targets: Annotated[int, typer.Option(min=1, help="Targets of each arm.")] = 60_000,
    check: Annotated[int, typer.Option(min=1, help="Targets of each trial of settings.")] = 8_000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each arm.")] = 2,
    prompts: Annotated[list[Path] | None, typer.Option(help="Further JSONL files; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Prompts of each such file.")] = 8,
    num_prompts: Annotated[int, typer.Option(min=1, help="Built-in prompts, a domain in turn.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of the training; decoding is float32.")] = "bfloat16",
    only: Annotated[list[str] | None, typer.Option(help="An arm's name; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option(help="A few targets and prompts, one seed.")] = False,
) -> None:
    """Train and score all arms, one seed after the other."""
    if quick:
        targets, check, seeds, limit, num_prompts, max_new_tokens = 1_000, 500, 1, 1, 2, 16
    check_report(output)
    runs.mkdir(parents=True, exist_ok=True)
    sequences = packed_corpora([str(corpus)], SHARED.sequence_length, drop_long=True)
    bench = Bench(sequences, runs, dtype)
    asked = bench.prompts(prompts or [], limit, num_prompts)
    arms = [arm for arm in ARMS if not only or arm.name in only]
    options = {
        "targets": targets,
        "check": check,
        "limit": limit,
        "num_prompts": num_prompts,
        "max_new_tokens": max_new_tokens,
    }
    bench.same_options(options | {"digest": sequences.digest, "dtype": dtype, "prompts": asked})
    chosen = {arm.name: bench.chosen(arm, round(arm.check_share * check)) for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            bench.train(arm, chosen[arm.name]["settings"], seed, targets)
        for arm in arms:
            bench.score(arm, chosen[arm.name]["settings"], seed, asked, max_new_tokens)
            found = bench.finished(arms, chosen, seeds)
            report = {
                "kind": "orthrus-trained-rivals",
                "legend": LEGEND,
                "options": options,
                "shared_recipe": to_plain(SHARED),
                "corpus": {
                    "digest": sequences.digest,
                    "dialogues": sequences.dialogues,
                    "sequences": len(sequences),
                },
                "less_ours": less_ours(found),
                "arms": found,
                "provenance": provenance(device="cpu", dtype=f"{dtype}, decoding in float32", seed=None),
            }
            write_text_atomic(output, json.dumps(report, indent=1) + "\n")
    typer.echo(table(report["arms"]))


class Bench:
    """What all arms share, and the folder of finished parts."""

    def __init__(self, sequences: Any, runs: Path, dtype: str) -> None:
        self.sequences, self.runs, self.dtype = sequences, runs, dtype
        self.training_sequences, self.held_out = (
            sequences[:-HELD_OUT_SEQUENCES],
            sequences[-HELD_OUT_SEQUENCES:],
        )
        self._lessons: Lessons | None = None
        self._exact: Base | None = None

    def prompts(self, files: list[Path], limit: int, number: int) -> Prompts:
        """Token ids by the set's name."""
        base = self.exact()
        found = {"built-in": held_out_prompts(base, number, SHARED.block_size)}
        for file in files:
            found[file.stem] = [base.encode_prompt(p.prompt) for p in load_prompts(file, (), limit)[:limit]]
        return found

    def same_options(self, options: dict[str, Any]) -> None:
        """Parts that are done must belong to this very run."""
        file, text = self.runs / "options.json", json.dumps(options) + "\n"
        if file.is_file() and file.read_text() != text:
            raise typer.BadParameter(f"{self.runs} holds parts of a run with other options.")
        write_text_atomic(file, text)

    def exact(self) -> Base:
        """The base in float32, untouched."""
        self._exact = self._exact or load_base("default", dtype="float32")
        return self._exact

    def base_for(self, arm: Arm, dtype: str) -> Base:
        """A view needs a base of its own; drafters share the one that the lessons come from, or the exact one."""
        if arm.kind == "view":
            return load_base("default", dtype=dtype)
        return self.exact() if dtype == "float32" else self._taught()[0]

    def lessons(self) -> Lessons:
        return self._taught()[1]

    def _taught(self) -> tuple[Base, Lessons]:
        if self._lessons is None:
            self._teacher = load_base("default", dtype=self.dtype)
            layers = targets_of(self._teacher.model.config.num_hidden_layers)[0]
            self._lessons = Lessons(self._teacher.model, layers)
        return self._teacher, self._lessons

    def chosen(self, arm: Arm, targets: int) -> dict[str, Any]:
        """The settings that foresee most on held-out sequences after a small budget, and what all of them foresaw."""
        file = self.runs / f"check-{arm.name}.json"
        if file.is_file():
            return json.loads(file.read_text())  # type: ignore[no-any-return]
        trials: list[dict[str, Any]] = []
        for settings in arm.trials if len(arm.trials) > 1 else ():
            config = arm.config(settings, 0, self.dtype)
            built = build(arm, self.base_for(arm, self.dtype), config, self.lessons())
            steps = budget(self.training_sequences, config, targets).steps
            learn(built.learner, list(built.parameters.values()), self.training_sequences, config, steps)
            held = foreseen(built.learner, self.held_out, config, len(self.training_sequences))
            trials.append({"settings": settings, "foreseen_tokens_per_cycle": held})
            typer.echo(f"{arm.name}: {trials[-1]}", err=True)
        best = max(trials, key=lambda trial: trial["foreseen_tokens_per_cycle"], default=None)
        settings = arm.trials[0] if best is None else best["settings"]
        found = {"settings": settings, "trials": trials, "targets_of_a_trial": targets}
        write_text_atomic(file, json.dumps(found) + "\n")
        return found

    def train(self, arm: Arm, settings: dict[str, Any], seed: int, targets: int) -> None:
        weights, file = (self.runs / f"{arm.name}-{seed}.{end}" for end in ("pt", "train.json"))
        if file.is_file():
            return
        config = arm.config(settings, seed, self.dtype)
        typer.echo(f"{arm.name}, seed {seed}: {settings}", err=True)
        lessons = self.lessons()
        built = build(arm, self.base_for(arm, self.dtype), config, lessons)
        spend = budget(self.training_sequences, config, targets)
        spared = lessons.spared_s
        made = learn(
            built.learner,
            list(built.parameters.values()),
            self.training_sequences,
            config,
            spend.steps,
            lambda line: typer.echo(line, err=True),
        )
        held = foreseen(built.learner, self.held_out, config, len(self.training_sequences))
        made["cpu_seconds"] += lessons.spared_s - spared
        torch.save({name: p.detach() for name, p in built.parameters.items()}, weights)
        about = {
            "seed": seed,
            "steps": spend.steps,
            "targets": spend.targets,
            "trained_parameters": built.num_parameters,
            "own_cache_numbers_per_token": built.cache_numbers,
            "foreseen_tokens_per_cycle": held,
            "provenance": provenance(device="cpu", dtype=self.dtype, seed=seed),
        }
        write_text_atomic(file, json.dumps(about | made) + "\n")

    def score(self, arm: Arm, settings: dict[str, Any], seed: int, asked: Prompts, num_new: int) -> None:
        file = self.runs / f"{arm.name}-{seed}.score.json"
        done = json.loads(file.read_text()) if file.is_file() else {}
        if len(done) == arm.num_modes:
            return
        plain = self.plain(asked, num_new)
        base = self.base_for(arm, "float32")
        built = build(arm, base, arm.config(settings, seed, "float32"), self.lessons())
        built.load(torch.load(self.runs / f"{arm.name}-{seed}.pt"))
        for mode in built.modes:
            if mode not in done:
                done[mode] = scored(base, built, mode, asked, plain, num_new, base.eos_token_ids)
                write_text_atomic(file, json.dumps(done) + "\n")
                typer.echo(f"{arm.name}, seed {seed}, {mode}: {done[mode]['all']}", err=True)

    def plain(self, asked: Prompts, num_new: int) -> dict[str, list[list[int]]]:
        """What the stock model's own `generate` answers, token by token."""
        file = self.runs / "plain.json"
        if not file.is_file():
            base = self.exact()
            done = {
                name: [
                    list(
                        stock_generate(
                            base.model, ids, max_new_tokens=num_new, eos_token_ids=base.eos_token_ids
                        ).token_ids
                    )
                    for ids in some
                ]
                for name, some in asked.items()
            }
            write_text_atomic(file, json.dumps(done) + "\n")
        return json.loads(file.read_text())  # type: ignore[no-any-return]

    def finished(self, arms: list[Arm], chosen: dict[str, Any], seeds: int) -> dict[str, Any]:
        """Everything that is done, by arm."""
        found = {}
        for arm in arms:
            trainings = []
            for seed in range(seeds):
                train, score = (self.runs / f"{arm.name}-{seed}.{end}.json" for end in ("train", "score"))
                if score.is_file():
                    trainings.append(json.loads(train.read_text()) | {"modes": json.loads(score.read_text())})
            found[arm.name] = {
                "label": arm.label,
                "settings": arm.settings | chosen[arm.name]["settings"],
                "check": chosen[arm.name],
                "trainings": trainings,
            }
        return found


def scored(
    base: Base, built: Built, mode: str, asked: Prompts, plain: Prompts, num_new: int, eos: frozenset[int]
) -> dict[str, Any]:
    """Decode all prompts. AssertionError for a text that is not that of plain decoding, unless the first token that
    differs was a near-tie, which rounding may decide either way; those are counted."""
    clock, near_ties = Clock(), 0
    by_set: dict[str, Counts] = {}
    for name, some in asked.items():
        found = []
        for ids, expected in zip(some, plain[name], strict=True):
            run = decode(base.model, built.modes[mode](), ids, num_new, eos, clock)
            if run.tokens != expected:
                gap = first_gap(base.model, ids, run.tokens, expected)
                assert gap < NEAR_TIE, f"{mode} gave another text than plain decoding: set {name}, gap {gap}"
                near_ties += 1
            found.append((len(run.tokens) - 1, run.cycles, run.drafted, run.accepted))
        by_set[name] = found
    return score_of(by_set, clock.medians_ms()) | {"near_ties": near_ties}


if __name__ == "__main__":
    typer.run(main)
