"""The handle of one request: it steps the engine until the request has a new record."""

from collections.abc import Iterator
from weakref import finalize

from orthrus.decoding.stats import summarise
from orthrus.engine.engine import Engine
from orthrus.engine.request import Request
from orthrus.types import Cycle, GenerationResult


class TokenStream(Iterator[Cycle]):
    """Iterate to decode; each item is the record of one cycle. `result` is the whole answer so far.

    Streams of one engine share its passes. Asking one of them for its next record advances all of them, and the records
    of the others are kept until they are asked for. Different threads may use different streams; one stream belongs to
    one thread.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self.request = engine, request
        self._next = 0
        # If nobody holds the stream any more, its request is cancelled.
        self._finalizer = finalize(self, engine.cancel, request)

    def __next__(self) -> Cycle:
        request = self.request
        while self._next >= len(request.cycles):
            if request.closed and self._next >= len(request.cycles):
                if request.failure is not None:
                    raise request.failure
                raise StopIteration
            self._engine.step_for(request)
        self._next += 1
        return request.cycles[self._next - 1]

    def close(self) -> None:
        """Stop at once and free the request's memory. The iteration ends."""
        self._engine.drop(self.request)
        self._next = len(self.request.cycles)

    def cancel(self) -> None:
        """Stop before the next pass. The stream ends with finish_reason 'cancelled'."""
        self._engine.cancel(self.request)

    def drain(self) -> GenerationResult:
        """Run to the end and return the result."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> GenerationResult:
        """The answer so far. Until the stream has ended, its finish_reason is 'cancelled'."""
        cycles = tuple(self.request.cycles[: self._next])
        last = cycles[-1].finish_reason if cycles else None
        return GenerationResult(
            text="".join(c.text for c in cycles),
            token_ids=tuple(token_id for c in cycles for token_id in c.token_ids),
            finish_reason=last or "cancelled",
            stats=summarise(len(self.request.prompt_ids), cycles, self.request.num_cached),
            cycles=cycles,
        )
