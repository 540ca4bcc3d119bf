"""Decides which requests take part in the next pass: plain Python over requests and pages, without tensors.

First come, first served, and running requests go first. A pass has at most one chunk of prompt rows. If pages run
out, kept pages are freed first; then the request that arrived last is preempted, and later starts again from its
tokens.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from orthrus.engine.parts import prompt_work
from orthrus.engine.prefix import PrefixPage, PrefixStore
from orthrus.engine.request import Request, Work
from orthrus.model.pool import PAGE, SlotPool, pages_for

Wanted = Callable[[Request], Work | None]
"""What a request wants of the next pass; None where it has failed instead."""


@dataclass(slots=True)
class Scheduler:
    """The requests of an engine: `waiting` for pages, in their order, and `running`, oldest first.

    chunk: rows of prompts in one pass. max_running: requests that may run at once. prefixes: None without
    reuse. Not thread-safe: the engine guards it.
    """

    pool: SlotPool
    chunk: int
    max_running: int
    prefixes: PrefixStore | None
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)

    def add(self, request: Request) -> None:
        """Add a request to the queue, after all with the same or a lower priority value."""
        behind = [i for i, r in enumerate(self.waiting) if r.config.priority > request.config.priority]
        self.waiting.insert(behind[0] if behind else len(self.waiting), request)

    def next_pass(self, wanted: Wanted, plain: Wanted) -> list[tuple[Request, Work]]:
        """The work of the next pass, each part with slots for its rows; empty if no request can continue.

        plain: the smallest work with which a request can continue, for one whose drafts even the whole pool cannot
        hold. A request that is too large for the pool even so gets finish "length".
        """
        chosen: list[tuple[Request, Work]] = []
        for request in list(self.running):
            if request in self.running and not request.num_to_feed:
                work = wanted(request)
                if work is not None and self._exceeds_pool(request, work):
                    work = plain(request)
                if work is not None and self._make_room(request, work.part.num_rows, chosen):
                    chosen.append((request, work))
        left = self.chunk
        for request in list(self.running):
            if request in self.running and request.num_to_feed and left:
                left -= self._feed(request, left, chosen)
        while left and self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            if not self._can_begin(request):
                break
            self.waiting.popleft()
            self.running.append(request)
            request.began = request.began or monotonic()
            if request.num_to_feed:
                size = self._feed(request, left, chosen)
                left = left - size if size else 0
        return chosen

    @property
    def num_sharing(self) -> int:
        """Requests that share the next passes: those that run, and those that will as soon as they are fed."""
        return min(len(self.running) + len(self.waiting), self.max_running)

    @property
    def num_prompt_rows(self) -> int:
        """Rows of prompts in the next pass, if there are pages for them: 0 or a whole chunk, which is near enough."""
        begin = self.waiting if len(self.running) < self.max_running else ()
        return self.chunk if any(r.num_to_feed for r in (*self.running, *begin)) else 0

    def finish(self, request: Request) -> None:
        """Remove a request, waiting or running; its pages are freed, or kept for others, at once."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.slots.free()

    def keep(self, request: Request) -> None:
        """Keep the pages that have become full; other requests can use them at once."""
        if self.prefixes is None:
            return
        node: PrefixPage | None
        node, num_kept = request.prefix or (None, 0)
        while (num_kept + 1) * PAGE <= request.slots.length:
            tokens = request.known(num_kept * PAGE, (num_kept + 1) * PAGE)
            node = self.prefixes.add(node, tokens, request.slots.pages[num_kept])
            # If another request has kept an equal page, both use that one.
            request.slots.replace(num_kept, node.page)
            num_kept += 1
        request.prefix = node, num_kept

    def _feed(self, request: Request, left: int, chosen: list[tuple[Request, Work]]) -> int:
        """Choose a chunk of a request's prompt; returns its rows. Chunks end at fixed places of the text."""
        length = request.slots.length
        size = min(self.chunk - length % self.chunk, request.num_to_feed)
        if size > left or not self._make_room(request, size, chosen):
            return 0
        work = prompt_work(request, size)
        chosen.append((request, work))
        return size

    def _can_begin(self, request: Request) -> bool:
        """Whether there are pages for a waiting request's text; takes over what is kept of it."""
        if self.prefixes is not None and not request.slots.pages:
            found = self.prefixes.find(request.known(0, request.num_known))
            request.slots.adopt([node.page for node in found])
            request.prefix = (found[-1] if found else None), len(found)
        missing = pages_for(request.num_known + 1) - len(request.slots.pages)
        if self._free_pages(missing) or not self.running:
            # After a preemption it finds pages of its own, its answer's among them.
            if not request.num_preempted:
                request.num_cached = request.slots.length
            return True
        request.slots.free()
        return False

    def _free_pages(self, num_pages: int) -> bool:
        """Whether so many pages are free, after giving up kept ones; none are given up where all are too few."""
        missing = num_pages - self.pool.num_free
        if missing > 0 and self.prefixes is not None and missing <= self.prefixes.num_idle:
            missing -= self.prefixes.evict(missing)
        return missing <= 0

    def _exceeds_pool(self, request: Request, work: Work) -> bool:
        """Whether the pool could not hold this work even if the request were alone."""
        return request.slots.length + work.part.num_rows > self.pool.num_slots

    def _make_room(self, request: Request, num_rows: int, chosen: list[tuple[Request, Work]]) -> bool:
        """Slots for the rows of a pass; may send other requests back, and then takes them out of `chosen`.

        False: this request must wait, or has ended.
        """
        num_slots = request.slots.length + num_rows
        while True:
            missing = pages_for(num_slots) - len(request.slots.pages)
            if missing <= 0 or self._free_pages(missing):
                return request.slots.reserve(num_slots)
            last = max(self.running, key=lambda r: (r.config.priority, self.running.index(r)))
            if last is request and len(self.running) == 1:
                request.finish = "length"
                return False
            self._send_back(last)
            chosen[:] = [(other, work) for other, work in chosen if other is not last]
            if last is request:
                return False

    def _send_back(self, request: Request) -> None:
        """Free a running request's pages; it keeps its tokens and comes back before its equals who wait."""
        self.running.remove(request)
        request.slots.free()
        request.drafts, request.stale, request.next_work, request.prefix = None, False, None, None
        request.noise.clear()
        request.num_preempted += 1
        before = [i for i, r in enumerate(self.waiting) if r.config.priority >= request.config.priority]
        self.waiting.insert(before[0] if before else len(self.waiting), request)
