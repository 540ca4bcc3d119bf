"""Requests through the engine, and what must hold after every step of it."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from orthrus.config import DecodeConfig
from orthrus.engine.engine import Engine, EngineConfig
from orthrus.engine.request import Request
from orthrus.engine.round import Observer
from orthrus.engine.stream import TokenStream
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.runner import EagerRunner, Runner
from orthrus.types import GenerationResult


class ShortEngine(Engine):
    """An engine whose model has a shorter context than its config says."""

    limit: int | None = None

    @property
    def context_length(self) -> int:
        return self.limit or super().context_length


def engine_for(
    model: DualView | Runner,
    *,
    context_length: int | None = None,
    observers: Iterable[Observer] = (),
    **config: Any,
) -> Engine:
    """An engine of its own, eager unless a runner is given. config: as EngineConfig."""
    runner: Runner = EagerRunner(model) if isinstance(model, DualView) else model
    engine = ShortEngine(runner, EngineConfig(**config), observers=list(observers))
    engine.limit = context_length
    return engine


def stream(
    model: DualView | Runner,
    prompt: list[int],
    config: DecodeConfig,
    *,
    eos: frozenset[int] = frozenset(),
    tokenizer: Any = None,
    **options: Any,
) -> TokenStream:
    """One request in an engine of its own."""
    engine = engine_for(model, **options)
    return TokenStream(engine, engine.submit(prompt, config, eos_token_ids=eos, tokenizer=tokenizer))


def decode(
    model: DualView | Runner, prompt: list[int], config: DecodeConfig, **options: Any
) -> GenerationResult:
    return stream(model, prompt, config, **options).drain()


def noting(note: Callable[[Pass], None]) -> Observer:
    """An observer that looks at passes alone."""

    def observe(p: Pass, _pool: SlotPool, _hidden_RC: Tensor) -> None:
        note(p)

    return observe


def used_pages(engine: Engine) -> Counter[int]:
    """How many running or waiting requests have each page."""
    scheduler = engine.scheduler
    return Counter(page for r in [*scheduler.running, *scheduler.waiting] for page in r.slots.pages)


def check_pages(engine: Engine) -> None:
    """free + stored + used = total, where a stored page that is used counts once; each page has as many owners
    as know of it; committed slots hold what the AR view wrote."""
    scheduler = engine.scheduler
    pool, used, store = scheduler.pool, used_pages(engine), scheduler.prefixes
    num_stored, num_idle = (0, 0) if store is None else (len(store), store.num_idle)
    assert pool.num_free + num_idle + len(used) == pool.num_pages
    stored = [pool.owners(page) - used[page] for page in range(pool.num_pages)]
    assert set(stored) <= {0, 1}
    assert sum(stored) == num_stored
    for request in [*scheduler.running, *scheduler.waiting]:
        request.slots.check()
        assert not request.closed


def run_all(engine: Engine, requests: Iterable[Request], *, most: int = 10_000) -> None:
    """Step until all have ended; pages add up after each step."""
    requests = list(requests)
    for _ in range(most):
        if all(request.closed for request in requests):
            return
        engine.step()
        check_pages(engine)
    raise AssertionError("the engine does not come to an end")


def acceptance(request: Request) -> list[tuple[object, ...]]:
    """Drafted and accepted tokens of each cycle. Passes over a prompt depend on the other requests."""
    return [(c.kind, c.token_ids, c.is_draft, c.num_drafted, c.num_accepted) for c in request.cycles]
