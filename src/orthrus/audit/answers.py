"""Answers prompts with an engine of the audit's own, and checks the slots that requests give back."""

from collections.abc import Callable, Iterator, Sequence

from orthrus.api import Orthrus
from orthrus.config import DecodeConfig
from orthrus.engine.beside import EngineBeside
from orthrus.engine.request import Request
from orthrus.engine.stream import TokenStream
from orthrus.model.pool import SlotPool, Slots
from orthrus.types import GenerationResult


class Answers:
    """Answers all asks with one engine. Iterate to run it; each item is the new number of finished answers.

    asks: (prompt ids, settings) of each. damages: (index of the ask, what is wrong with the slots that it gave back).
    """

    def __init__(
        self, orthrus: Orthrus, asks: Sequence[tuple[list[int], DecodeConfig]], concurrency: int
    ) -> None:
        self.damages: list[tuple[int, str]] = []
        self._engine = engine = EngineBeside(orthrus.engine, max_running=concurrency)
        self._requests = [orthrus.submit(ids, config, engine=engine) for ids, config in asks]
        for index, request in enumerate(self._requests):
            self._check_slots(index, request)

    def __iter__(self) -> Iterator[int]:
        known = -1
        while (num_answers := sum(request.closed for request in self._requests)) < len(self._requests):
            if num_answers > known:
                known = num_answers
                yield known
            self._engine.step()

    @property
    def results(self) -> list[GenerationResult]:
        return [TokenStream(self._engine, request).drain() for request in self._requests]

    def _check_slots(self, index: int, request: Request) -> None:
        """Replace the slots of a request that has not run yet by checked ones."""
        request.slots = _CheckedSlots(
            self._engine.scheduler.pool, lambda what: self.damages.append((index, what))
        )


class _CheckedSlots(Slots):
    """Slots that check themselves when the request gives them back."""

    def __init__(self, pool: SlotPool, on_damage: Callable[[str], None]) -> None:
        super().__init__(pool)
        self._on_damage = on_damage

    def free(self) -> None:
        try:
            self.check()
        except AssertionError as error:
            self._on_damage(str(error))
        super().free()
