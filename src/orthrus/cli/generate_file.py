"""`orthrus generate --prompts FILE -o OUT.jsonl`: a file of prompts, an answer a line, in the same order.

The output grows line by line and is never rewritten: killed at any moment, it holds the answers to the first
prompts, perhaps with a torn last line, and the same command goes on behind them.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from orthrus.base.json_text import parse_json
from orthrus.base.outputs import check_writable, storage_errors
from orthrus.base.owned import locked_file
from orthrus.base.prompt_files import FilePrompt, read_prompt_file
from orthrus.cli.common import load_orthrus, plain_settings, time_passes
from orthrus.cli.progress import ProgressDisplay
from orthrus.cli.render import counted, note, note_turns
from orthrus.config import DRAFTING
from orthrus.errors import UserInputError

if TYPE_CHECKING:
    from orthrus.api import Orthrus

AHEAD = 8
"""Requests that may be answered before the first open one is, times the concurrency."""


def generate_file(
    prompts: Path,
    output: Path,
    *,
    model: str,
    decode: dict[str, Any],
    load: dict[str, Any],
    raw: bool,
    system: str | None,
    concurrency: int,
    quiet: bool,
) -> None:
    """Answer the prompts of a JSONL file, `concurrency` of them together.

    decode: keywords of `decode_config`, checked; with a seed, prompt number n (from 0) has seed + n. load:
    keywords of `Orthrus.load`. Raises UserInputError for a bad prompt, a file that somebody else writes, or
    one that holds anything but answers to these prompts with settings that make the same text.
    """
    given = read_prompt_file(prompts)
    asked = [_with_system(prompts, each, system, raw) for each in given]
    if not quiet:
        note_turns(prompts, given)
    about = {
        "model": model,
        "load": {name: load.get(name) for name in ("revision", "dtype", "runner")},
        "decode": {name: value for name, value in plain_settings(decode).items() if name not in DRAFTING},
        "raw": raw,
    }
    keys = [_key(about, index, prompt) for index, prompt in enumerate(asked)]
    check_writable(output.parent)
    # Told before a model is loaded; what counts is what is there once the file is ours.
    _num_answered(output, keys, prompts)
    with storage_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with locked_file(output, "writes"):
        num_done, end = _num_answered(output, keys, prompts)
        if num_done == len(asked):
            if not quiet:
                note(f"{output} has all {num_done} answers already")
            return
        orthrus = load_orthrus(model, quiet=quiet, **load)
        time_passes(orthrus, [decode["strategy"]], quiet=quiet)
        ids = _encoded(orthrus, prompts, asked, raw)
        started, num_tokens = perf_counter(), 0
        with ProgressDisplay(quiet=quiet, unit="prompts") as on_progress, _Appender(output, end) as out:
            for index, answer in _answers(orthrus, ids, decode, num_done, concurrency):
                on_progress("answering", index, len(asked))
                if answer is None:
                    continue
                out.write({"key": keys[index], "prompt": asked[index], **answer})
                num_tokens += len(answer["token_ids"])
        seconds = perf_counter() - started
        if not quiet:
            kept = f", {num_done} were there" if num_done else ""
            note(
                f"{counted(len(asked) - num_done, 'answer')}, {counted(num_tokens, 'token')} in {seconds:.2f} s · "
                f"{num_tokens / seconds:.1f} tokens/s{kept}"
            )


def _with_system(file: Path, given: FilePrompt, system: str | None, raw: bool) -> str | list[dict[str, str]]:
    """The prompt as it is asked."""
    prompt = given.prompt
    if isinstance(prompt, list):
        if raw:
            raise UserInputError(f"{file}, line {given.line}: messages need the chat template; drop --raw.")
        if system is not None and any(message["role"] == "system" for message in prompt):
            raise UserInputError(
                f"{file}, line {given.line}: the messages have a system prompt of their own; drop --system."
            )
    if system is None:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": system}, *turns]


def _key(about: dict[str, Any], index: int, prompt: object) -> str:
    """A short name for a prompt, its place, and all settings that the text hangs on."""
    text = json.dumps([about, index, prompt], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _head(key: str) -> bytes:
    """How the line of an answer begins."""
    return f'{{"key": "{key}", "prompt": '.encode()


def _num_answered(output: Path, keys: list[str], prompts: Path) -> tuple[int, int]:
    """How many answers the file begins with, and where they end; behind that lies at most a torn line of ours.

    UserInputError for a file that holds anything else.
    """
    if not os.path.lexists(output):
        return 0, 0
    if not output.is_file():
        raise UserInputError(f"{output} exists already and is no file; name a new one.")
    with storage_errors(output):
        content = output.read_bytes()
    *lines, torn = content.split(b"\n")
    for number, line in enumerate(lines):
        if number >= len(keys) or not line.startswith(_head(keys[number])) or not _is_json(line):
            raise UserInputError(
                f"{output}, line {number + 1}: no answer to a prompt of {prompts} with these settings; give the "
                "prompts and settings that it was begun with, or name a new file."
            )
    heads = [_head(key) for key in keys[len(lines) : len(lines) + 1]]
    if torn and not any(torn.startswith(head) or head.startswith(torn) for head in heads):
        raise UserInputError(f"{output} ends with something that is no answer of ours; name a new file.")
    return len(lines), len(content) - len(torn)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


def _encoded(
    orthrus: "Orthrus", file: Path, asked: list[str | list[dict[str, str]]], raw: bool
) -> list[list[int]]:
    """Token ids of all prompts, checked before the first is answered."""
    from orthrus.engine.limits import check_prompt

    found = []
    for number, prompt in enumerate(asked, start=1):
        try:
            found.append(orthrus.base.encode_prompt(prompt, raw=raw))
            check_prompt(found[-1], orthrus.base.context_length)
        except UserInputError as error:
            raise UserInputError(f"{file}, prompt {number}: {error}") from error
    return found


def _answers(
    orthrus: "Orthrus", ids: list[list[int]], decode: dict[str, Any], first: int, concurrency: int
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(prompt, its answer) from prompt `first` on, in order; None for an answer while it is being made."""
    from orthrus.api import decode_config
    from orthrus.engine.beside import EngineBeside
    from orthrus.engine.stream import TokenStream

    engine = EngineBeside(orthrus.engine, max_running=concurrency)
    streams: dict[int, TokenStream] = {}
    seed, submitted = decode["seed"], first
    for index in range(first, len(ids)):
        yield index, None
        while index not in streams or not streams[index].request.closed:
            while submitted < min(len(ids), index + AHEAD * concurrency) and _open(streams) < concurrency:
                own_seed = None if seed is None else (seed + submitted) % 2**63
                request = engine.submit(
                    ids[submitted],
                    decode_config(**(decode | {"seed": own_seed})),
                    eos_token_ids=orthrus.base.eos_token_ids,
                    tokenizer=orthrus.base.tokenizer,  # type: ignore[arg-type]
                )
                streams[submitted] = TokenStream(engine, request)
                submitted += 1
            if not streams[index].request.closed:
                engine.step()
        stream = streams.pop(index)
        result = stream.drain()
        yield (
            index,
            {
                "text": result.text,
                "token_ids": list(result.token_ids),
                "finish_reason": result.finish_reason,
                "num_prompt_tokens": len(ids[index]),
                "seed": stream.request.seed if decode["temperature"] else None,
            },
        )


def _open(streams: dict[int, Any]) -> int:
    return sum(not stream.request.closed for stream in streams.values())


class _Appender:
    """Writes whole lines at the end of a file, each by one call of the system; a torn line behind `end` goes."""

    def __init__(self, output: Path, end: int) -> None:
        self._output, self._end = output, end
        self._file = -1

    def __enter__(self) -> "_Appender":
        with storage_errors(self._output):
            self._file = os.open(self._output, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
        return self

    def write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode() + b"\n"
        with storage_errors(self._output):
            while line:
                line = line[os.write(self._file, line) :]

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
