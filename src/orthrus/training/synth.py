"""Fill a corpus folder: gather prompts once, then answer them shard by shard; a stopped run goes on."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any, Literal

from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base
from orthrus.base.provenance import provenance
from orthrus.config import SamplingParams
from orthrus.decoding.noise import choice_seed
from orthrus.errors import UserInputError
from orthrus.model.twin import stock
from orthrus.training import manifest
from orthrus.training.answers import Answer, Answerer, Question
from orthrus.training.corpus import (
    PROMPTS,
    Unseen,
    read_prompts,
    read_source,
    shard_path,
    source_path,
    write_jsonl,
)
from orthrus.training.prompt_sources import PromptSource, gather_prompts, read_prompt_texts
from orthrus.training.self_prompts import is_repetitive


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthConfig:
    """How a corpus is made; stored in its manifest, and a folder only goes on with the same settings.

    greedy_share: part of the prompts answered greedily, the rest sampled at `temperature`.
    """

    sources: tuple[PromptSource, ...]
    held_out: tuple[str, ...] = ()
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
    """Where a run stands: sources read (stage "prompts") or prompts answered (stage "answers").

    num_tokens: answered in this run; seconds_left extrapolates from its whole shards, None before the first.
    """

    stage: Literal["prompts", "answers"]
    done: int
    total: int
    num_tokens: int = 0
    seconds_left: float | None = None


NUM_CHECKED = 32
"""Prompts whose greedy answers show whether it is the base that answers."""

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
    """Make or continue the corpus in `folder`; answers are the frozen base's own (the AR view).

    keep_out: texts that no prompt may repeat, besides those of `config.held_out`. Raises UserInputError when
    the folder was begun with other settings, no prompt is left after filtering, or another model than the base
    answers.
    """
    if config.max_new_tokens >= base.context_length:
        raise UserInputError(
            f"max_new_tokens {config.max_new_tokens} leaves no room for a prompt in {base.name}'s context of "
            f"{base.context_length} tokens; ask for shorter answers."
        )
    report = on_progress or (lambda _: None)
    _begin(folder, config, base, answerer)
    if not (folder / PROMPTS).is_file():
        write_jsonl(folder / PROMPTS, _gather(base, answerer, config, folder, report, keep_out))
    prompts = list(read_prompts(folder))
    size = config.shard_size
    shards = [range(first, min(first + size, len(prompts))) for first in range(0, len(prompts), size)]
    todo = [(i, shard) for i, shard in enumerate(shards) if not shard_path(folder, i).is_file()]
    if todo:
        checked = [_question(i, prompts[i], SamplingParams()) for i in range(min(NUM_CHECKED, len(prompts)))]
        facts = answerer.check(checked, max_new_tokens=config.max_new_tokens)
        manifest.note_servers(folder, facts)
    meter = _Meter(report, len(prompts), sum(len(shard) for _, shard in todo))
    for index, shard in todo:
        answers = _answer(answerer, config, prompts, shard, meter)
        write_jsonl(shard_path(folder, index), answers)
        meter.end_shard(len(shard))


class _Meter:
    """Counts answers as they come. Short answers come first, so only whole shards say how long one takes."""

    def __init__(self, report: OnSynth, total: int, num_left: int) -> None:
        self._report, self._total, self._left = report, total, num_left
        self._done, self._num_tokens = total - num_left, 0
        self._timed, self._seconds, self._started = 0, 0.0, monotonic()
        self._tell()

    def answered(self, num_tokens: int) -> None:
        self._done += 1
        self._num_tokens += num_tokens
        self._tell()

    def end_shard(self, size: int) -> None:
        now = monotonic()
        self._timed, self._left = self._timed + size, self._left - size
        self._seconds, self._started = self._seconds + now - self._started, now
        self._tell()

    def _tell(self) -> None:
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
    keep_out: Iterable[str],
) -> list[dict[str, Any]]:
    """All sources' prompts, filtered and shuffled; each source is stored when done, so none is made twice."""
    held_out = [text for file in config.held_out for text, _ in read_prompt_texts(Path(file))]
    unseen = Unseen([*held_out, *keep_out])
    longest = min(config.max_prompt_tokens, base.context_length - config.max_new_tokens)
    found: list[dict[str, Any]] = []
    for number, source in enumerate(config.sources):
        report(SynthProgress("prompts", number, len(config.sources)))
        part = source_path(folder, number)
        if not part.is_file():
            texts, facts = gather_prompts(source, base, answerer, seed=config.seed + number)
            manifest.note_source(folder, part.name, facts)
            write_jsonl(part, ({"prompt": text, "domain": domain} for text, domain in texts))
        for record in read_source(part):
            if unseen(record["prompt"]):
                text = record["prompt"] + source.suffix
                ids = base.encode_prompt(text)
                if len(ids) <= longest:
                    found.append({"prompt_ids": ids, "domain": record["domain"], "prompt": text})
    if not found:
        # The next try may bring other prompts under the same name.
        manifest.forget_sources(folder)
        raise UserInputError(
            f"no prompt is left after taking out duplicates, held-out ones and those above {longest} tokens; "
            "give more or other prompts."
        )
    # Shuffled, so that every prefix of the corpus has the same mix and training may begin early.
    Random(config.seed).shuffle(found)
    return found


def _answer(
    answerer: Answerer,
    config: SynthConfig,
    prompts: list[dict[str, Any]],
    which: range,
    meter: _Meter,
) -> list[dict[str, Any]]:
    random = Random(f"{config.seed}-{which.start}")
    questions = []
    for i in which:
        sampling = SamplingParams()
        if random.random() >= config.greedy_share:
            sampling = SamplingParams(
                temperature=config.temperature, top_p=config.top_p, seed=choice_seed(config.seed, i)
            )
        questions.append(_question(i, prompts[i], sampling))
    answers = []
    for answer in answerer(questions, max_new_tokens=config.max_new_tokens):
        answers.append(answer)
        meter.answered(len(answer.token_ids))
    return [_record(a) for a in sorted(answers) if a.left_out or not is_repetitive(a.token_ids)]


def _question(index: int, prompt: dict[str, Any], sampling: SamplingParams) -> Question:
    return Question(index, prompt["prompt_ids"], sampling, prompt.get("prompt"))


def _record(answer: Answer) -> dict[str, Any]:
    record = {"prompt": answer.key, "answer_ids": answer.token_ids, "finished": answer.finished}
    return record | ({"left_out": answer.left_out} if answer.left_out else {})


def _begin(folder: Path, config: SynthConfig, base: Base, answerer: Answerer) -> None:
    # Twins change the names of the weights that they wrap.
    weights = fingerprint(stock(base.model))
    made = provenance(device=str(base.model.device), dtype=str(base.model.dtype), seed=config.seed)
    settings = {"base": base.reference, "base_fingerprint": weights, "dtype": made["dtype"], **asdict(config)}
    # How many are answered at once changes no answer.
    del settings["batch_size"]
    manifest.begin(folder, settings | {"answerer": answerer.origin}, made)
