"""Fills a corpus folder: gathers prompts once, then answers them shard by shard. A stopped run can continue."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Literal

from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base
from orthrus.base.provenance import provenance
from orthrus.config import SamplingParams
from orthrus.decoding.noise import choice_seed
from orthrus.errors import CorruptFileError, UserInputError
from orthrus.model.twin import stock
from orthrus.training import manifest
from orthrus.training.answers import Answerer, Question
from orthrus.training.corpus import (
    PROMPTS,
    Unseen,
    read_prompts,
    read_source,
    shard_path,
    source_path,
    write_jsonl,
)
from orthrus.training.dialogue_rounds import Rounds
from orthrus.training.dialogues import begin
from orthrus.training.prompt_sources import PromptSource, gather_prompts, read_prompts_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthConfig:
    """Settings of a corpus. They are stored in its manifest, and work continues only with the same settings.

    turns: number of answers of each dialogue. The model writes user turns that are missing. None: one answer for each
    given turn. greedy_share: share of the dialogues with greedy answers; the others are sampled at `temperature`.
    max_prompt_tokens: limit on the tokens before an answer, earlier turns included. A dialogue that reached it gets no
    further turn.
    """

    sources: tuple[PromptSource, ...]
    held_out: tuple[str, ...] = ()
    turns: int | None = None
    greedy_share: float = 0.5
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 256
    max_prompt_tokens: int = 320
    batch_size: int = 64
    shard_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_prompt_tokens", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise UserInputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.turns is not None and self.turns < 1:
            raise UserInputError(f"turns must be at least 1, not {self.turns}.")
        if not 0 <= self.greedy_share <= 1:
            raise UserInputError(f"greedy_share must lie between 0 and 1, not {self.greedy_share}.")
        if self.temperature <= 0:
            raise UserInputError(
                "the temperature of sampled answers must be positive; greedy_share sets how many."
            )
        if not self.sources:
            raise UserInputError(
                "there is no source of prompts; give prompt files or counts of self-made ones."
            )


@dataclass(frozen=True, slots=True)
class SynthProgress:
    """The progress of a run: sources that were read (stage "prompts") or prompts that were answered (stage "answers").

    num_tokens: tokens of answers in this run. seconds_left: an extrapolation from its whole shards, None before the
    first one.
    """

    stage: Literal["prompts", "answers"]
    done: int
    total: int
    num_tokens: int = 0
    seconds_left: float | None = None


NUM_CHECKED = 32
"""Number of prompts whose greedy answers show whether the base answers."""

OnSynth = Callable[[SynthProgress], None]


def synthesise(
    base: Base,
    answerer: Answerer,
    config: SynthConfig,
    folder: Path,
    on_progress: OnSynth | None = None,
    *,
    keep_out: Iterable[str] = (),
) -> None:
    """Make or continue the corpus in `folder`. The answers are the frozen base's own (the AR view).

    keep_out: texts that no prompt may repeat, in addition to those of `config.held_out`. Raises UserInputError if the
    folder was begun with other settings or held-out texts, if no prompt is left after filtering, or if another model
    than the base answers. Raises CorruptFileError for a folder with answers whose prompts are gone.
    """
    if config.max_new_tokens >= base.context_length:
        raise UserInputError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in {base.name}'s context of "
            f"{base.context_length} tokens; ask for shorter answers."
        )
    report = on_progress or (lambda _: None)
    files = [read_prompts_of(Path(file)) for file in config.held_out]
    unseen = Unseen([turn for prompts in files for prompt in prompts for turn in prompt.turns] + [*keep_out])
    _begin(folder, config, base, answerer, unseen)
    if not (folder / PROMPTS).is_file():
        if shard_path(folder, 0).is_file():
            raise CorruptFileError(
                f"{folder} holds answers without their {PROMPTS}; restore that file, or name a new folder."
            )
        write_jsonl(folder / PROMPTS, _gather(base, answerer, config, folder, report, unseen))
    prompts = list(read_prompts(folder))
    size = config.shard_size
    shards = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
    todo = [(i, shard) for i, shard in enumerate(shards) if not shard_path(folder, i).is_file()]
    if todo:
        checked = [_question(i, prompts[i], SamplingParams()) for i in range(min(NUM_CHECKED, len(prompts)))]
        try:
            facts = answerer.check(checked, max_new_tokens=config.max_new_tokens)
        except UserInputError:
            if len(todo) == len(shards) and any(source.is_self_made for source in config.sources):
                # The wrong model wrote prompts too.
                manifest.forget_sources(folder)
                (folder / PROMPTS).unlink()
            raise
        manifest.note_servers(folder, facts)
    meter = _Meter(report, len(prompts), sum(len(shard) for _, shard in todo))
    for index, shard in todo:
        rounds = Rounds(base, answerer, config.max_new_tokens, _most_tokens(base, config), unseen.holds_out)
        write_jsonl(shard_path(folder, index), _answer(rounds, config, prompts, shard, meter))
        meter.end_shard(len(shard))


class _Meter:
    """Counts answers. Short answers come first, so only whole shards give the time of an answer."""

    def __init__(self, report: OnSynth, total: int, num_left: int) -> None:
        self._report, self._total, self._left = report, total, num_left
        self._done, self._num_tokens = total - num_left, 0
        self._timed, self._seconds, self._started = 0, 0.0, monotonic()
        self._report_progress()

    def answered(self, num_tokens: int, over: bool) -> None:
        self._done += over
        self._num_tokens += num_tokens
        self._report_progress()

    def end_shard(self, size: int) -> None:
        now = monotonic()
        self._timed, self._left = self._timed + size, self._left - size
        self._seconds, self._started = self._seconds + now - self._started, now
        self._report_progress()

    def _report_progress(self) -> None:
        left = None
        if self._timed:
            left = max(0.0, self._seconds / self._timed * self._left - (monotonic() - self._started))
        self._report(SynthProgress("answers", self._done, self._total, self._num_tokens, left))


def _gather(
    base: Base,
    answerer: Answerer,
    config: SynthConfig,
    folder: Path,
    report: OnSynth,
    unseen: Unseen,
) -> list[dict[str, Any]]:
    """The prompts of all sources, filtered and shuffled. Each source is stored once done, so none is made twice."""
    longest = _most_tokens(base, config)
    found: list[dict[str, Any]] = []
    for number, source in enumerate(config.sources):
        report(SynthProgress("prompts", number, len(config.sources)))
        part = source_path(folder, number)
        if not part.is_file():
            gathered, facts = gather_prompts(source, base, answerer, seed=config.seed + number)
            manifest.note_source(folder, part.name, facts)
            write_jsonl(
                part, ({"prompt": p.turns[0], "domain": p.domain, **_more(p.turns)} for p in gathered)
            )
        for record in read_source(part):
            if unseen(record["prompt"]):
                text = record["prompt"] + source.suffix
                ids = base.encode_prompt(text)
                # A dialogue ends before a held-out turn.
                later = takewhile(lambda turn: not unseen.holds_out(turn), record.get("turns", []))
                if len(ids) <= longest:
                    prompt = {"prompt_ids": ids, "domain": record["domain"], "prompt": text}
                    found.append(prompt | _more([text, *later]))
    if not found:
        # The next attempt may use other prompts with the same name.
        manifest.forget_sources(folder)
        raise UserInputError(
            f"no prompt is left after taking out duplicates, held-out ones and those above {longest} tokens; "
            "give more or other prompts."
        )
    # Shuffled, so that every part of the corpus has the same mix, and training may begin early.
    Random(config.seed).shuffle(found)
    return found


def _more(turns: Sequence[str]) -> dict[str, Any]:
    """The user turns after the first one, if there are any."""
    return {"turns": list(turns[1:])} if len(turns) > 1 else {}


def _most_tokens(base: Base, config: SynthConfig) -> int:
    """Limit on the tokens before an answer."""
    return min(config.max_prompt_tokens, base.context_length - config.max_new_tokens)


def _answer(
    rounds: Rounds,
    config: SynthConfig,
    prompts: list[dict[str, Any]],
    which: range,
    meter: _Meter,
) -> list[dict[str, Any]]:
    """The lines of a shard, in the prompts' order."""
    random = Random(f"{config.seed}-{which.start}")
    dialogues, sampling = {}, {}
    for i in which:
        prompt = prompts[i]
        dialogues[i] = begin(
            prompt["prompt_ids"], prompt.get("turns", []), prompt["domain"], num_turns=config.turns
        )
        sampling[i] = SamplingParams()
        if random.random() >= config.greedy_share:
            sampling[i] = SamplingParams(
                temperature=config.temperature, top_p=config.top_p, seed=choice_seed(config.seed, i)
            )
    texts = {i: prompts[i].get("prompt") for i in which}
    outcomes = sorted(rounds.hold(dialogues, sampling, texts, meter.answered), key=lambda o: o.key)
    return [record for outcome in outcomes if (record := outcome.record()) is not None]


def _question(index: int, prompt: dict[str, Any], sampling: SamplingParams) -> Question:
    text = prompt.get("prompt")
    return Question(index, prompt["prompt_ids"], sampling, None if text is None else (text,))


def _begin(folder: Path, config: SynthConfig, base: Base, answerer: Answerer, unseen: Unseen) -> None:
    # The stock model, because twins change the names of the weights.
    weights = fingerprint(stock(base.model))
    made = provenance(device=str(base.model.device), dtype=str(base.model.dtype), seed=config.seed)
    settings = {"base": base.reference, "base_fingerprint": weights, "dtype": made["dtype"], **asdict(config)}
    # The batch size does not change the answers. The names of files do not say which texts are held out.
    del settings["batch_size"]
    settings["held_out_texts"] = unseen.digest
    manifest.begin(folder, settings | {"answerer": answerer.origin}, made)
