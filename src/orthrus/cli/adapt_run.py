"""One run of `orthrus adapt`, from the log to the verdict."""

import json as json_module
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from orthrus.base.paths import expanded
from orthrus.cli.common import cancel_on_interrupt
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.render import note, note_turns
from orthrus.cli.train_panel import TrainDisplay
from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from torch import Tensor

    from orthrus.base.loading import Base
    from orthrus.model.dual_view import DualView
    from orthrus.training.adapt import Counts, Logged
    from orthrus.training.recipe import TrainConfig

REPORT, BEFORE = "report.json", "before.json"


def check_log(log: Path) -> None:
    """UserInputError for a log that is not there, or for the first line of it that is no request."""
    from orthrus.base.prompt_files import read_prompt_file

    if not log.is_file():
        raise UserInputError(f"there is no log {log}; give a JSONL file.")
    note_turns(log, read_prompt_file(log))


def start_folder(view: Path, init: str) -> Path:
    """The view to start from: the one that is there, or what `init` names. Raises UserInputError if it is none."""
    from orthrus.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
    from orthrus.model.loading import DEFAULT_MODEL_VIEW, shipped_view_folder
    from orthrus.training.replaced_views import set_aside

    if view.exists():
        found: Path | None = view
    elif init == "default":
        if aside := set_aside(view):
            raise UserInputError(
                f"there is no view {view}, but {aside[-1].name} lies beside it: an adapt was stopped while it "
                "replaced the view. Put that one back with --rollback, or name a view to start from with --init."
            )
        found = shipped_view_folder(DEFAULT_MODEL_VIEW)
    else:
        found = expanded(init)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if found is None or not (found / name).is_file():
            raise UserInputError(
                f"{found or init} holds no view ({name} is missing); name a view folder to start from with --init."
            )
    assert found is not None
    return found


class Adapting:
    """One invocation, from the log to the verdict. What it makes on the way lies in a folder beside the view."""

    def __init__(
        self,
        log: Path,
        view: Path,
        init: str,
        config: "TrainConfig",
        settings: dict[str, Any],
        *,
        quiet: bool,
    ) -> None:
        self.log, self.view, self.init, self.quiet = log, view, init, quiet
        self.config, self.settings = config, settings
        self.stopped = False

    def cancel(self) -> None:
        self.stopped = True

    def run(self) -> dict[str, Any]:
        """The report; of an earlier run of the same kind that came to its end, that one's."""
        from orthrus.base.outputs import check_writable
        from orthrus.base.owned import locked_file

        check_writable(self.view)
        self.view.parent.mkdir(parents=True, exist_ok=True)
        # All that is read of the present view is read under its lock: another run may be about to replace it.
        with locked_file(self.view, "adapts"):
            return self._run()

    def _run(self) -> dict[str, Any]:
        from orthrus.base.outputs import json_or_none
        from orthrus.errors import OrthrusError
        from orthrus.model.checkpoint import WEIGHTS_FILE
        from orthrus.training.adapt import work_key
        from orthrus.training.recipe import to_plain

        self.start = start_folder(self.view, self.init)
        config = replace(self.config, init_view=str(self.start))
        key = work_key(self.log, _digest(self.start / WEIGHTS_FILE), self.settings | to_plain(config))
        self.work = self.view.with_name(f"{self.view.name}.adapt-{key}")
        self.config = replace(config, corpus=(str(self.work / "corpus"),), output=str(self.work / "run"))
        done = self.work / REPORT
        report = json_or_none(done)
        # A view that was kept has taken the place of this one. If this one is here again, it was rolled back.
        if isinstance(report, dict) and report.get("kept") is False:
            note(f"this log was judged already; {done} says how")
            return report
        self.work.mkdir(exist_ok=True)
        try:
            return self._adapt()
        except OrthrusError:
            # Where nothing was done yet, nothing is left to go on with.
            with suppress(OSError):
                self.work.rmdir()
            raise

    def _adapt(self) -> dict[str, Any]:
        from orthrus.base.outputs import write_text_atomic
        from orthrus.model.checkpoint import CONFIG_FILE, read_json, round_as_stored, save_view
        from orthrus.training.adapt import (
            GENERAL_PROMPTS,
            SHARES,
            Verdict,
            counts_of,
            forgets,
            go_part_of_the_way,
            judge,
            read_log,
            split,
        )
        from orthrus.training.adapt import to_plain as plain_verdict
        from orthrus.training.replaced_views import put_in_place
        from orthrus.training.view_score import decoded_each, held_out_prompts

        with ProgressDisplay(quiet=self.quiet) as on_progress:
            base, dual = self._loaded(on_progress)
        most = min(self.config.sequence_length, base.context_length - self.settings["max_new_tokens"] - 1)
        requests = read_log(self.log, base, most_tokens=most)
        train_on, judged = split(requests, self.settings["held_back"], self.config.seed)
        general = held_out_prompts(base, GENERAL_PROMPTS, dual.config.block_size)
        self._say(f"{len(train_on)} requests to learn from, {len(judged)} held back")
        old, old_general = self._before(base, dual, judged, general)
        self._corpus(base, dual, train_on, most)
        encoding = read_json(self.start / CONFIG_FILE).get("encoding", "full")
        start = _weights(dual)
        num_trained = self._train(base, dual)
        end = _weights(dual)
        # As much of what was learnt as the general set bears.
        for share in SHARES:
            go_part_of_the_way(dual, start, end, share)
            round_as_stored(dual, encoding)
            new_general = _counts(dual, base, general)
            self._say(
                f"with {share:.0%} of what was learnt the general set makes {new_general.tokens_per_cycle:.2f} "
                f"tokens per cycle, {old_general.tokens_per_cycle:.2f} before"
            )
            if not forgets(old_general, new_general):
                break
        decoded = decoded_each(dual, base, _prompts(judged))
        new = counts_of(decoded)
        verdict: Verdict = judge(old, new, old_general, new_general, seed=self.config.seed)
        report = plain_verdict(verdict) | {
            "view": str(self.view),
            "share": share,
            "requests": {"trained": num_trained, "held_back": len(judged)},
            "tokens_per_cycle": {
                "held_back": {"old": old.tokens_per_cycle, "new": new.tokens_per_cycle},
                "general": {"old": old_general.tokens_per_cycle, "new": new_general.tokens_per_cycle},
            },
            "old_view": str(self.start),
            "replaced": False,
        }
        if verdict.kept:
            origin = dual.config.provenance | {"adapted": plain_verdict(verdict)}
            num_judged = sum(each.num_judged for each in decoded)
            goes_on = sum(each.num_accepted for each in decoded) / num_judged if num_judged else None
            dual.config = replace(dual.config, trained=True, goes_on=goes_on, provenance=origin)
            candidate = self.work / "candidate"
            shutil.rmtree(candidate, ignore_errors=True)
            save_view(dual, candidate, encoding)
            before = put_in_place(candidate, self.view)
            report |= {"old_view": str(before or self.start), "replaced": before is not None}
        write_text_atomic(self.work / REPORT, json_module.dumps(report, indent=2) + "\n")
        # Its state is many times the size of a view, and there is nothing left to go on with.
        shutil.rmtree(self.work / "run", ignore_errors=True)
        return report

    def _loaded(self, on_progress: Any) -> "tuple[Base, DualView]":
        from orthrus.model.card import stated_licence
        from orthrus.model.checkpoint import CONFIG_FILE, read_json
        from orthrus.model.loading import load_frozen
        from orthrus.model.view_config import ViewConfig
        from orthrus.training.start import starting_view

        stored = ViewConfig.from_dict(read_json(self.start / CONFIG_FILE))
        self.licence = stated_licence(stored)
        self.config = replace(self.config, block_size=stored.block_size)
        base = load_frozen(self.config.base, dtype=self.config.dtype, on_progress=on_progress).base
        return base, starting_view(base, self.config)

    def _before(
        self, base: "Base", dual: "DualView", judged: "list[Logged]", general: list[list[int]]
    ) -> "tuple[Counts, Counts]":
        """What the present view scores, measured once."""
        from orthrus.base.outputs import json_or_none, write_text_atomic
        from orthrus.training.adapt import Counts

        file = self.work / BEFORE
        content = json_or_none(file)
        if content is None:
            self._say("decoding with the present view")
            found = [_counts(dual, base, prompts) for prompts in (_prompts(judged), general)]
            content = [[list(counts.tokens), list(counts.cycles)] for counts in found]
            write_text_atomic(file, json_module.dumps(content) + "\n")
        old, old_general = (Counts(tuple(tokens), tuple(cycles)) for tokens, cycles in content)
        return old, old_general

    def _corpus(self, base: "Base", dual: "DualView", train_on: "list[Logged]", most_tokens: int) -> None:
        from orthrus.engine.engine import Engine
        from orthrus.engine.runners import make_runner
        from orthrus.model.runner import EagerRunner
        from orthrus.training.adapt import write_corpus
        from orthrus.training.manifest import corpus_folder
        from orthrus.training.view_score import served

        folder = self.work / "corpus"
        missing = any(request.answer_ids is None for request in train_on)
        with corpus_folder(folder), served(dual):
            # The AR view alone answers, so a runner that packs the view's present weights will do.
            engine = Engine(make_runner(dual) if missing else EagerRunner(dual))
            write_corpus(
                base,
                engine,
                train_on,
                folder,
                max_new_tokens=self.settings["max_new_tokens"],
                most_tokens=most_tokens,
                source=str(self.log),
                on_answer=lambda done, total: self._say(f"{done} of {total} requests have answers"),
            )

    def _train(self, base: "Base", dual: "DualView") -> int:
        """Train on the corpus. Returns the number of requests that are in it."""
        from orthrus.training.packs import packed_corpora
        from orthrus.training.recipe import to_plain
        from orthrus.training.start import check_packs
        from orthrus.training.trainer import Hooks, train

        sequences = packed_corpora(self.config.corpus, self.config.sequence_length, drop_long=True)
        check_packs(base, sequences)
        display = TrainDisplay(
            f"{base.name}, {sequences.dialogues} requests, K = {self.config.block_size}", quiet=self.quiet
        )
        hooks = Hooks(on_start=display.start, on_log=display.log, should_stop=lambda: self.stopped)
        with display, cancel_on_interrupt(self, on_kill=True) as interrupt:
            state = train(dual, sequences, self.config, sequences.digest, hooks)
        if self.stopped:
            note(f"stopped after step {state.step}; the same command goes on from there, and nothing changed")
            raise typer.Exit(interrupt.status)
        origin: dict[str, Any] = {
            "recipe": to_plain(self.config),
            "corpus": {"digest": sequences.digest, "dialogues": sequences.dialogues},
        }
        if self.licence is not None:
            origin["license"] = self.licence
        dual.config = replace(dual.config, provenance=origin)
        return sequences.dialogues

    def _say(self, line: str) -> None:
        if not self.quiet:
            note(line)


def _weights(dual: "DualView") -> "dict[str, Tensor]":
    return {name: parameter.detach().float().clone() for name, parameter in dual.view_parameters().items()}


def _prompts(requests: "list[Logged]") -> list[list[int]]:
    return [list(request.prompt_ids) for request in requests]


def _counts(dual: "DualView", base: "Base", prompts: list[list[int]]) -> "Counts":
    from orthrus.training.adapt import counts_of
    from orthrus.training.view_score import decoded_each

    return counts_of(decoded_each(dual, base, prompts))


def _digest(file: Path) -> str:
    import hashlib

    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()
