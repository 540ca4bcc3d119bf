"""Re-tunes a view on logged requests: the data that it learns from, and the test of the new view."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from orthrus.base.bench_prompts import load_prompts
from orthrus.base.fingerprint import fingerprint
from orthrus.base.loading import Base
from orthrus.base.prompt import Message
from orthrus.base.prompt_files import read_prompt_file
from orthrus.base.provenance import provenance
from orthrus.config import SamplingParams
from orthrus.engine.engine import Engine
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.training import manifest
from orthrus.training.answers import Question, answer_all
from orthrus.training.corpus import PROMPTS, Unseen, normalised, shard_path, write_jsonl
from orthrus.training.self_prompts import is_repetitive
from orthrus.training.view_score import Decoded

LEAST_REQUESTS = 20
LEAST_GAIN = 0.01
"""The least gain on the held-back requests. It must also be statistically clear."""
MOST_LOSS = 0.02
"""The largest loss on the general set, which consists of `GENERAL_PROMPTS` built-in prompts."""
GENERAL_PROMPTS = 25
SHARES = (1.0, 0.75, 0.5, 0.3)
"""The shares of the change of weights that are tried, the largest first. A smaller share forgets less."""
_DOMAIN = "log"
_SHARD = 32
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Logged:
    """A request of a log: the prompt through the chat template, and the answer if the log has one."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of decoding some prompts: for each, its tokens after the first, and its cycles."""

    tokens: tuple[int, ...]
    cycles: tuple[int, ...]

    @property
    def tokens_per_cycle(self) -> float:
        return sum(self.tokens) / max(1, sum(self.cycles))


def counts_of(decoded: Sequence[Decoded]) -> Counts:
    """The counts of decoded prompts that a comparison uses."""
    return Counts(tuple(each.num_tokens for each in decoded), tuple(each.num_cycles for each in decoded))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a comparison of two views.

    kept: whether the new view drafts better. gain, general: new / old - 1 in tokens per cycle, on the held-back
    requests and on the general set. gain_low: the gain that 95 % of resamplings of the held-back requests exceed.
    """

    kept: bool
    reason: str
    gain: float
    gain_low: float
    general: float


def read_log(file: Path, base: Base, *, most_tokens: int) -> list[Logged]:
    """The requests of a JSONL file with `messages`, `prompt` or `turns` on each line, each once.

    If the last message is the assistant's, it is the answer. Requests longer than `most_tokens` are left out, and those
    that contain a built-in prompt, because the general set consists of these. Raises UserInputError for a file that
    cannot be read, for a wrong line, and for fewer than `LEAST_REQUESTS` requests.
    """
    unseen = Unseen(p.prompt for p in load_prompts() if isinstance(p.prompt, str))
    seen: set[str] = set()
    found: list[Logged] = []
    for line in read_prompt_file(file):
        messages: list[Message] = (
            [{"role": "user", "content": line.prompt}] if isinstance(line.prompt, str) else [*line.prompt]
        )
        answer = str(messages.pop()["content"]) if messages[-1]["role"] == "assistant" else None
        key = normalised(" ".join(str(message["content"]) for message in messages))
        if not key or key in seen or unseen.holds_out(key):
            continue
        seen.add(key)
        try:
            asked = line.prompt if isinstance(line.prompt, str) else messages
            prompt_ids = tuple(base.encode_prompt(asked))
        except UserInputError as e:
            raise UserInputError(f"{file}, line {line.line}: {e}") from e
        answer_ids = _answer_ids(answer, base) if answer is not None and answer.strip() else None
        # An answer that the base is to write gets the room that is left.
        if len(prompt_ids) + (1 if answer_ids is None else len(answer_ids)) <= most_tokens:
            found.append(Logged(prompt_ids, answer_ids))
    if len(found) < LEAST_REQUESTS:
        raise UserInputError(
            f"{file} has {len(found)} different requests of at most {most_tokens} tokens that are no built-in prompts, "
            f"too few to learn from and be judged by: give at least {LEAST_REQUESTS}."
        )
    return found


def _answer_ids(text: str, base: Base) -> tuple[int, ...]:
    """The token ids of a logged answer, with the end-of-text token."""
    ids = list(base.tokenizer(text, add_special_tokens=False)["input_ids"])
    end = base.tokenizer.eos_token_id
    return (*ids, end) if end in base.eos_token_ids else tuple(ids)


def split(requests: Sequence[Logged], share: float, seed: int) -> tuple[list[Logged], list[Logged]]:
    """(requests to train on, held-back requests), at least one of each."""
    shuffled = list(requests)
    Random(seed).shuffle(shuffled)
    number = min(max(1, round(share * len(shuffled))), len(shuffled) - 1)
    return shuffled[number:], shuffled[:number]


def write_corpus(
    base: Base,
    engine: Engine,
    requests: Sequence[Logged],
    folder: Path,
    *,
    max_new_tokens: int,
    most_tokens: int,
    source: str,
    on_answer: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Make or continue the corpus of these requests. The base answers those for which the log has no answer.

    max_new_tokens: limit on such an answer. most_tokens: limit on a request with its answer, which is cut there.
    on_answer: called with (requests done, all requests). The caller holds the folder.
    """
    made = provenance(device=str(base.model.device), dtype=str(base.model.dtype), seed=0)
    settings = {
        "base": base.reference,
        "base_fingerprint": fingerprint(engine.runner.dual.stock()),
        "sources": [{"file": source, "domain": _DOMAIN}],
        "max_new_tokens": max_new_tokens,
        "most_tokens": most_tokens,
        "requests": hashlib.blake2b(repr(list(requests)).encode(), digest_size=16).hexdigest(),
    }
    manifest.begin(folder, settings, made)
    prompts = ({"prompt_ids": list(r.prompt_ids), "domain": _DOMAIN} for r in requests)
    write_jsonl(folder / PROMPTS, prompts)
    for index, first in enumerate(range(0, len(requests), _SHARD)):
        last = min(first + _SHARD, len(requests))
        if not shard_path(folder, index).is_file():
            answers = _answers(base, engine, requests, range(first, last), max_new_tokens, most_tokens)
            write_jsonl(shard_path(folder, index), answers)
        on_answer(last, len(requests))


def _answers(
    base: Base,
    engine: Engine,
    requests: Sequence[Logged],
    which: range,
    max_new_tokens: int,
    most_tokens: int,
) -> list[dict[str, Any]]:
    known = {i: list(ids) for i in which if (ids := requests[i].answer_ids) is not None}
    cut = set[int]()
    questions = (Question(i, list(requests[i].prompt_ids), SamplingParams()) for i in which if i not in known)
    options = {"batch_size": _SHARD, "max_new_tokens": max_new_tokens, "eos_token_ids": base.eos_token_ids}
    for answer in answer_all(engine, questions, **options):  # type: ignore[arg-type]
        room = most_tokens - len(requests[answer.key].prompt_ids)
        known[answer.key] = answer.token_ids[:room]
        if not answer.finished or len(answer.token_ids) > room:
            cut.add(answer.key)
    return [
        {"prompt": i, "answer_ids": known[i], "finished": i not in cut}
        for i in sorted(known)
        if not is_repetitive(known[i])
    ]


def judge(old: Counts, new: Counts, old_general: Counts, new_general: Counts, *, seed: int = 0) -> Verdict:
    """Whether to keep the new view. `old` and `new` are of the same held-back requests, in order.

    Its gain must be at least `LEAST_GAIN`, and above 0 in 95 % of resamplings of the requests. The general set must not
    fall by more than `MOST_LOSS`.
    """
    gain, general = _gain(old, new), _gain(old_general, new_general)
    low = _resampled_low(old, new, seed)
    if forgets(old_general, new_general):
        reason = f"the general set falls by {-general:.1%}, more than {MOST_LOSS:.0%}"
    elif gain < LEAST_GAIN:
        reason = f"the held-back requests gain {gain:+.1%}, less than {LEAST_GAIN:.0%}"
    elif low <= 0:
        reason = f"the held-back requests gain {gain:+.1%}, which chance may explain (from {low:+.1%})"
    else:
        reason = f"the held-back requests gain {gain:+.1%}, the general set {general:+.1%}"
        return Verdict(True, reason, gain, low, general)
    return Verdict(False, reason, gain, low, general)


def forgets(old_general: Counts, new_general: Counts) -> bool:
    """Whether the general set falls by more than `MOST_LOSS`."""
    return _gain(old_general, new_general) < -MOST_LOSS


@torch.no_grad()
def go_part_of_the_way(
    dual: DualView, start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float
) -> None:
    """Set the view's weights to `start` + share x (`end` - `start`).

    Such an interpolation keeps most of the gain and forgets less (arXiv 2109.01903).
    """
    for name, parameter in dual.view_parameters().items():
        parameter.copy_(torch.lerp(start[name], end[name], share))


def _gain(old: Counts, new: Counts) -> float:
    """new / old - 1; 0 if nothing was decoded."""
    return new.tokens_per_cycle / old.tokens_per_cycle - 1 if old.tokens_per_cycle else 0.0


def _resampled_low(old: Counts, new: Counts, seed: int) -> float:
    """The gain that 95 % of resamplings of the requests exceed."""
    random, number = Random(seed), len(old.tokens)
    gains = []
    for _ in range(_RESAMPLES):
        picks = random.choices(range(number), k=number)
        before, after = (
            Counts(tuple(c.tokens[i] for i in picks), tuple(c.cycles[i] for i in picks)) for c in (old, new)
        )
        gains.append(_gain(before, after))
    return sorted(gains)[round(0.05 * (_RESAMPLES - 1))]


def work_key(log: Path, view_digest: str, settings: dict[str, Any]) -> str:
    """A short name for this log, view and settings. Work with the same name continues, other work begins anew."""
    digest = hashlib.blake2b(log.read_bytes(), digest_size=16)
    digest.update(json.dumps([view_digest, settings], sort_keys=True).encode())
    return digest.hexdigest()[:10]


def to_plain(verdict: Verdict) -> dict[str, Any]:
    return asdict(verdict)
