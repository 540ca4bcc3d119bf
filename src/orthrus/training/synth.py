"""Fill a corpus folder: gather prompts once, then answer them shard by shard; a stopped run goes on."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

from orthrus.base.loading import Base
from orthrus.base.outputs import write_text_atomic
from orthrus.config import SamplingParams
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.training.batch_decode import Request, decode_batch
from orthrus.training.corpus import (
    MANIFEST,
    PROMPTS,
    Unseen,
    read_jsonl,
    read_prompt_texts,
    shard_path,
    write_jsonl,
)
from orthrus.training.self_prompts import is_repetitive, self_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """One source of prompts: a JSONL file, or (without `file`) the model itself. `count` None takes all."""

    file: str | None = None
    domain: str | None = None
    count: int | None = None
    suffix: str = ""


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


@dataclass(frozen=True, slots=True)
class SynthProgress:
    """Where a run stands; `seconds_left` extrapolates from the shards of this run."""

    stage: str
    done: int
    total: int
    num_tokens: int = 0
    seconds_left: float | None = None


OnSynth = Callable[[SynthProgress], None]


def synthesise(
    base: Base, dual: DualView, config: SynthConfig, folder: Path, on_progress: OnSynth | None = None
) -> None:
    """Make or continue the corpus in `folder`; answers are the frozen base's own (the AR view).

    Raises UserInputError when the folder was begun with other settings, or no prompt is left after filtering.
    """
    report = on_progress or (lambda _: None)
    _check_manifest(folder, config, base)
    if not (folder / PROMPTS).is_file():
        write_jsonl(folder / PROMPTS, _gather(base, dual, config, folder, report))
    prompts = read_jsonl(folder / PROMPTS)
    num_shards = -(-len(prompts) // config.shard_size)
    todo = [i for i in range(num_shards) if not shard_path(folder, i).is_file()]
    started, num_tokens = monotonic(), 0
    for position, index in enumerate(todo):
        first = index * config.shard_size
        answers = _answer(base, dual, config, prompts, range(first, min(first + config.shard_size, len(prompts))))
        num_tokens += sum(len(a["answer_ids"]) for a in answers)
        write_jsonl(shard_path(folder, index), answers)
        left = (monotonic() - started) / (position + 1) * (len(todo) - position - 1)
        report(SynthProgress("answers", num_shards - len(todo) + position + 1, num_shards, num_tokens, left))


def _gather(
    base: Base, dual: DualView, config: SynthConfig, folder: Path, report: OnSynth
) -> list[dict[str, Any]]:
    """All sources' prompts, filtered and shuffled; each source is stored when done, so none is made twice."""
    held_out = [text for file in config.held_out for text, _ in read_prompt_texts(Path(file))]
    unseen = Unseen(held_out)
    found: list[dict[str, Any]] = []
    for number, source in enumerate(config.sources):
        part = folder / f"source-{number:02d}.jsonl"
        if not part.is_file():
            texts = _texts(base, dual, config, source, config.seed + number)
            write_jsonl(part, ({"prompt": text, "domain": domain} for text, domain in texts))
        for record in read_jsonl(part):
            if unseen(record["prompt"]):
                ids = base.encode_prompt(record["prompt"] + source.suffix)
                if len(ids) <= config.max_prompt_tokens:
                    found.append({"prompt_ids": ids, "domain": record["domain"]})
        report(SynthProgress("prompts", number + 1, len(config.sources)))
    if not found:
        raise UserInputError("no prompt is left after filtering; give more or longer prompts.")
    # Shuffled, so that every prefix of the corpus has the same mix and training may begin early.
    Random(config.seed).shuffle(found)
    return found


def _texts(
    base: Base, dual: DualView, config: SynthConfig, source: PromptSource, seed: int
) -> list[tuple[str, str]]:
    if source.file is None:
        counts = {source.domain or "chat": source.count or 0}
        return list(self_prompts(base, dual, counts, seed=seed, batch_size=config.batch_size))
    texts = read_prompt_texts(Path(source.file), source.domain)
    Random(seed).shuffle(texts)
    return texts[: source.count]


def _answer(
    base: Base, dual: DualView, config: SynthConfig, prompts: list[dict[str, Any]], which: range
) -> list[dict[str, Any]]:
    sampled = SamplingParams(temperature=config.temperature, top_p=config.top_p)
    random = Random(f"{config.seed}-{which.start}")
    requests = [
        Request(i, prompts[i]["prompt_ids"], SamplingParams() if random.random() < config.greedy_share else sampled)
        for i in which
    ]
    answers = decode_batch(
        dual,
        requests,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        max_prompt_tokens=max(len(r.prompt_ids) for r in requests),
        eos_token_ids=base.eos_token_ids,
        seed=config.seed + which.start,
    )
    return [
        {"prompt": a.key, "answer_ids": a.token_ids, "finished": a.finished}
        for a in sorted(answers)
        if not is_repetitive(a.token_ids)
    ]


def _check_manifest(folder: Path, config: SynthConfig, base: Base) -> None:
    """Write the manifest of a new corpus, or make sure that an old one was begun alike."""
    settings = json.loads(json.dumps({"base": base.reference, **asdict(config)}))
    manifest = folder / MANIFEST
    if not manifest.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(manifest, json.dumps({"format": 1, "settings": settings}, indent=2) + "\n")
        return
    begun = json.loads(manifest.read_text(encoding="utf-8"))["settings"]
    changed = sorted(key for key in settings if begun.get(key) != settings[key])
    if changed:
        raise UserInputError(
            f"the corpus in {folder} was begun with another {', '.join(changed)}; use a new folder or the old settings."
        )
