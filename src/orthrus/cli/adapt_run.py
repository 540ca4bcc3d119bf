"""One run of `orthrus adapt`, from the log to the verdict."""

import json as json_module
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

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


class Adapting:
    """One invocation, from the log to the verdict. What it makes on the way lies in a folder beside the view."""

    def __init__(
        self,
        log: Path,
        view: Path,
        start: Path,
        config: "TrainConfig",
        settings: dict[str, Any],
        *,
        quiet: bool,
    ) -> None:
        from orthrus.base.outputs import check_writable
        from orthrus.model.checkpoint import WEIGHTS_FILE
        from orthrus.training.adapt import work_key
        from orthrus.training.recipe import to_plain

        self.log, self.view, self.start, self.quiet = log, view, start, quiet
        self.settings = settings
        key = work_key(log, _digest(start / WEIGHTS_FILE), settings | to_plain(config))
        self.work = view.with_name(f"{view.name}.adapt-{key}")
        self.config = replace(config, corpus=(str(self.work / "corpus"),), output=str(self.work / "run"))
        check_writable(self.work)
        self.stopped = False

    def cancel(self) -> None:
        self.stopped = True

    def run(self) -> dict[str, Any]:
        """The report; of an earlier run of the same kind that came to its end, that one's."""
        from orthrus.base.outputs import json_or_none
        from orthrus.base.owned import locked_file, locked_folder, remove_if_only_locked
        from orthrus.errors import OrthrusError

        done = self.work / REPORT
        report = json_or_none(done)
        # A view that was kept has taken the place of this one. If this one is here again, it was rolled back.
        if isinstance(report, dict) and report.get("kept") is False:
            note(f"this log was judged already; {done} says how")
            return report
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            # The view too: another log has another folder, and would replace the same view.
            with locked_file(self.view, "adapts"), locked_folder(self.work, "adapts a view"):
                return self._adapt()
        except OrthrusError:
            # Where nothing was done yet, nothing is left to go on with.
            remove_if_only_locked(self.work)
            raise

    def _adapt(self) -> dict[str, Any]:
        from orthrus.base.outputs import write_text_atomic
        from orthrus.model.checkpoint import CONFIG_FILE, read_json, round_as_stored, save_view
        from orthrus.training.adapt import (
            GENERAL_PROMPTS,
            SHARES,
            Verdict,
            forgets,
            go_part_of_the_way,
            judge,
            put_in_place,
            read_log,
            split,
        )
        from orthrus.training.adapt import to_plain as plain_verdict
        from orthrus.training.view_score import held_out_prompts

        with ProgressDisplay(quiet=self.quiet) as on_progress:
            base, dual = self._loaded(on_progress)
        most = min(self.config.sequence_length, base.context_length - self.settings["max_new_tokens"] - 1)
        requests = read_log(self.log, base, most_tokens=most)
        train_on, judged = split(requests, self.settings["held_back"], self.config.seed)
        general = held_out_prompts(base, GENERAL_PROMPTS, dual.config.block_size)
        self._say(f"{len(train_on)} requests to learn from, {len(judged)} held back")
        old, old_general = self._before(base, dual, judged, general)
        self._corpus(base, dual, train_on)
        encoding = read_json(self.start / CONFIG_FILE).get("encoding", "full")
        start = _weights(dual)
        self._train(base, dual)
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
        new = _counts(dual, base, _prompts(judged))
        verdict: Verdict = judge(old, new, old_general, new_general, seed=self.config.seed)
        report = plain_verdict(verdict) | {
            "view": str(self.view),
            "share": share,
            "requests": {"trained": len(train_on), "held_back": len(judged)},
            "tokens_per_cycle": {
                "held_back": {"old": old.tokens_per_cycle, "new": new.tokens_per_cycle},
                "general": {"old": old_general.tokens_per_cycle, "new": new_general.tokens_per_cycle},
            },
            "old_view": str(self.start),
        }
        if verdict.kept:
            origin = dual.config.provenance | {"adapted": plain_verdict(verdict)}
            dual.config = replace(dual.config, trained=True, provenance=origin)
            candidate = self.work / "candidate"
            shutil.rmtree(candidate, ignore_errors=True)
            save_view(dual, candidate, encoding)
            before = put_in_place(candidate, self.view)
            report["old_view"] = str(before or self.start)
        write_text_atomic(self.work / REPORT, json_module.dumps(report, indent=2) + "\n")
        # Its state is many times the size of a view, and there is nothing left to go on with.
        shutil.rmtree(self.work / "run", ignore_errors=True)
        return report

    def _loaded(self, on_progress: Any) -> "tuple[Base, DualView]":
        from orthrus.model.checkpoint import CONFIG_FILE, read_json
        from orthrus.model.loading import load_frozen
        from orthrus.model.view_config import ViewConfig
        from orthrus.training.start import starting_view

        stored = ViewConfig.from_dict(read_json(self.start / CONFIG_FILE))
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

    def _corpus(self, base: "Base", dual: "DualView", train_on: "list[Logged]") -> None:
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
                source=str(self.log),
                on_answer=lambda done, total: self._say(f"{done} of {total} requests have answers"),
            )

    def _train(self, base: "Base", dual: "DualView") -> None:
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
        recipe = to_plain(self.config)
        dual.config = replace(
            dual.config,
            provenance={
                "recipe": recipe,
                "corpus": {"digest": sequences.digest, "dialogues": sequences.dialogues},
            },
        )

    def _say(self, line: str) -> None:
        if not self.quiet:
            note(line)


def _weights(dual: "DualView") -> "dict[str, Tensor]":
    return {name: parameter.detach().float().clone() for name, parameter in dual.view_parameters().items()}


def _prompts(requests: "list[Logged]") -> list[list[int]]:
    return [list(request.prompt_ids) for request in requests]


def _counts(dual: "DualView", base: "Base", prompts: list[list[int]]) -> "Counts":
    from orthrus.training.adapt import Counts
    from orthrus.training.view_score import decoded_each

    counts = decoded_each(dual, base, prompts)
    return Counts(tuple(each.num_tokens for each in counts), tuple(each.num_cycles for each in counts))


def _digest(file: Path) -> str:
    import hashlib

    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()
