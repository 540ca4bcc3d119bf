"""`orthrus train --plan`: what a run needs, before anything is loaded."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.render import note, out, print_json
from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from orthrus.training.plan_run import Machine, Plan
    from orthrus.training.recipe import TrainConfig

_DEFAULT_GPU = "h100"
_UTILISATION = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The options that belong to --plan; None where they were not given."""

    gpus: int | None
    gpu: str | None
    gpu_memory: float | None
    peak_tflops: float | None
    utilisation: float | None
    corpus_tokens: float | None

    def refuse_alone(self) -> None:
        """UserInputError for one that was given without --plan, which would do nothing."""
        given = [name for name, value in asdict(self).items() if value is not None]
        if given:
            raise UserInputError(
                f"--{given[0].replace('_', '-')} belongs to --plan; add that, or leave it out."
            )


def print_plan(recipe: "TrainConfig", options: PlanOptions, *, quiet: bool, json: bool) -> None:
    """Print the plan of a recipe; UserInputError, behind the plan, when it does not fit."""
    from orthrus.base.model_config import model_config
    from orthrus.training.plan_run import plan_run, what_to_change
    from orthrus.training.plan_shape import plan_shape

    gpu, machine = _machine(recipe, options)
    with ProgressDisplay(quiet=quiet) as on_progress:
        base, name = model_config(recipe.base, on_progress)
    num_sequences = _num_sequences(recipe, options.corpus_tokens)
    shape = plan_shape(base, recipe)
    plan = plan_run(shape, recipe, machine, num_sequences)
    fits = plan.peak_bytes <= machine.bytes_each
    if json:
        print_json(_report(plan, recipe, machine, gpu, name))
    else:
        # What is refused prints nothing on stdout, but the figures say why.
        lines = _lines(plan, recipe, machine, gpu, name)
        if fits:
            out("\n".join(lines) + "\n")
        else:
            for line in lines:
                note(line)
    if not fits:

        def fits_too(other: "TrainConfig") -> bool:
            changed = shape if other.rank == recipe.rank else plan_shape(base, other)
            return plan_run(changed, other, machine, num_sequences).peak_bytes <= machine.bytes_each

        changes = what_to_change(recipe, machine.num_gpus, fits_too)
        keys = " and ".join(f"{key}: {value}" for key, value in changes.items())
        advice = f"set {keys}" if keys else "no key of the recipe makes it fit: take GPUs with more memory"
        raise UserInputError(
            f"the run needs {_gb(plan.peak_bytes)} on each GPU, which has {_gb(machine.bytes_each)}; {advice}."
        )


def _machine(recipe: "TrainConfig", options: PlanOptions) -> "tuple[str, Machine]":
    from orthrus.training.plan import GPUS
    from orthrus.training.plan_run import Machine

    name = (options.gpu or _DEFAULT_GPU).lower()
    if name not in GPUS:
        raise UserInputError(
            f"--gpu knows {', '.join(GPUS)}, not {options.gpu!r:.80}; for another one give --gpu-memory and "
            "--peak-tflops."
        )
    half, single, size = GPUS[name]
    peak = half if recipe.dtype == "bfloat16" else single
    return name, Machine(
        num_gpus=1 if options.gpus is None else options.gpus,
        bytes_each=1e9 * (size if options.gpu_memory is None else options.gpu_memory),
        peak=peak if options.peak_tflops is None else options.peak_tflops * 1e12,
        utilisation=_UTILISATION if options.utilisation is None else options.utilisation,
    )


def _num_sequences(recipe: "TrainConfig", corpus_tokens: float | None) -> int | None:
    """Packed sequences of the corpus: of so many tokens, or of the one that is there; None where there is none."""
    if corpus_tokens is not None:
        if not 0 < corpus_tokens < math.inf:
            raise UserInputError(f"--corpus-tokens must be a positive number, not {corpus_tokens}.")
        return math.ceil(corpus_tokens / recipe.sequence_length)
    from orthrus.training.packs import has_corpus, packed_corpora

    if not all(map(has_corpus, recipe.corpus)):
        return None
    return len(packed_corpora(recipe.corpus, recipe.sequence_length, drop_long=recipe.drop_long))


def _report(plan: "Plan", recipe: "TrainConfig", machine: "Machine", gpu: str, name: str) -> dict[str, Any]:
    memory = plan.memory
    return {
        "base": name,
        "parameters": plan.shape.parameters,
        "view_parameters": plan.shape.view_parameters,
        "trained_parameters": plan.shape.trained_parameters,
        "gpu": gpu,
        "gpus": machine.num_gpus,
        "gpu_bytes": round(machine.bytes_each),
        "peak_flops": machine.peak,
        "utilisation": machine.utilisation,
        "bytes": asdict(memory) | {"total": memory.total},
        "gathered_bytes": plan.gathered,
        "state_bytes": plan.state_bytes,
        "tokens_per_step": plan.tokens,
        "targets_per_step": plan.targets,
        "flops_per_step": plan.step_flops,
        "steps": plan.num_steps,
        "flops": plan.total_flops,
        "hours": plan.hours,
        "fits": plan.peak_bytes <= machine.bytes_each,
        "recipe": {
            "batch_size": recipe.batch_size,
            "micro_batch_size": recipe.micro_batch_size,
            "activations": recipe.activations,
            "sharding": recipe.sharding,
        },
    }


def _lines(plan: "Plan", recipe: "TrainConfig", machine: "Machine", gpu: str, name: str) -> list[str]:
    shape, memory = plan.shape, plan.memory
    share = shape.view_parameters / shape.parameters
    learns = (
        "" if shape.trained_parameters == shape.view_parameters else f", {shape.trained_parameters:,} learn"
    )
    sharded = f", {recipe.sharding}" if machine.num_gpus > 1 else ""
    lines = [
        f"plan for {name}: computed, not run",
        f"  base          {shape.parameters:,} parameters, {recipe.dtype}",
        f"  view          {shape.view_parameters:,} parameters ({share:.1%}){learns}",
        f"  machine       {machine.num_gpus} x {gpu}{sharded}: {_gb(machine.bytes_each)}, "
        f"{machine.peak / 1e12:,.0f} TFLOP/s at {machine.utilisation:.0%} each",
        "  memory of each process",
    ]
    lines += [f"    {part.replace('_', ' '):<15} {_gb(size):>9}" for part, size in asdict(memory).items()]
    lines.append(f"    {'in a step':<15} {_gb(memory.total):>9} of {_gb(machine.bytes_each)}")
    if plan.gathered:
        lines.append(f"    {'gathered':<15} {_gb(plan.gathered):>9} in real decodes and at the end")
    lines += [
        f"  state on disk {_gb(plan.state_bytes)}",
        f"  step          {recipe.batch_size:,} sequences, {plan.tokens:,} tokens, at most {plan.targets:,} targets, "
        f"{_flops(plan.step_flops)}",
    ]
    if plan.num_steps is None or plan.total_flops is None or plan.hours is None:
        lines.append("  run           there is no corpus yet: say how large with --corpus-tokens")
    else:
        lines.append(
            f"  run           {plan.num_steps:,} steps, {_flops(plan.total_flops)}, {_hours(plan.hours)}"
        )
    return lines


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _flops(number: float) -> str:
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e9:,.1f} GFLOP"


def _hours(number: float) -> str:
    return f"{number:,.1f} hours" if number >= 0.1 else f"{number * 60:,.1f} minutes"
