"""Decides which requests take part in the next pass: plain Python over requests and pages, without tensors.

Running requests go first, then waiting ones in order of arrival. A pass has at most one chunk of prompt rows. If pages
run out, kept pages are freed first. Then the request that arrived last is preempted, and starts again later from its
tokens.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from orthrus.engine.parts import prompt_work
from orthrus.engine.prefix import PrefixPage, PrefixStore
from orthrus.engine.request import Request, Work
from orthrus.errors import OrthrusError
from orthrus.model.pool import PAGE, SlotPool, pages_for

Wanted = Callable[[Request], Work | None]
"""The work of a request in the next pass, or None if the request failed."""


@dataclass(slots=True)
class Scheduler:
    """The requests of an engine: those `waiting` for pages, in order, and those `running`, oldest first.

    chunk: limit on the rows of prompts in one pass. max_running: limit on running requests. prefixes: None without
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

        plain: the smallest work with which a request can continue. It is used if even the whole pool cannot hold the
        wanted work. A request that is too large even then ends with finish "length".
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
        """Requests that share the next passes: the running ones, and waiting ones that may run."""
        return min(len(self.running) + len(self.waiting), self.max_running)

    @property
    def num_prompt_rows(self) -> int:
        """Estimate of the rows of prompts in the next pass, if there are pages for them: 0 or a whole chunk."""
        begin = self.waiting if len(self.running) < self.max_running else ()
        return self.chunk if any(r.num_to_feed for r in (*self.running, *begin)) else 0

    def finish(self, request: Request) -> None:
        """Remove a waiting or running request. Its pages are freed, or kept for others, at once."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.slots.free()

    def keep(self, request: Request) -> None:
        """Keep a request's full pages. Other requests can use them at once."""
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
        """Add a chunk of a request's prompt to the pass, and return its rows. Chunks end at fixed positions."""
        length = request.slots.length
        size = min(self.chunk - length % self.chunk, request.num_to_feed)
        if size > left or not self._make_room(request, size, chosen):
            return 0
        try:
            work = prompt_work(request, size)
        except OrthrusError as error:
            # A grammar that allows no first token ends its own request only.
            request.failure = error
            return 0
        chosen.append((request, work))
        return size

    def _can_begin(self, request: Request) -> bool:
        """Whether there are pages for a waiting request's text. Adopts kept pages with the same tokens."""
        if self.prefixes is not None and not request.slots.pages:
            found = self.prefixes.find(request.known(0, request.num_known))
            request.slots.adopt([node.page for node in found])
            request.prefix = (found[-1] if found else None), len(found)
        missing = pages_for(request.num_known + 1) - len(request.slots.pages)
        if self._free_pages(missing) or not self.running:
            # After a preemption, the kept pages found are its own, so they do not count as cached.
            if not request.num_preempted:
                request.num_cached = request.slots.length
            return True
        request.slots.free()
        return False

    def _free_pages(self, num_pages: int) -> bool:
        """Whether so many pages are free, after evicting kept ones. None is evicted if even all would be too few."""
        missing = num_pages - self.pool.num_free
        if missing > 0 and self.prefixes is not None and missing <= self.prefixes.num_idle:
            missing -= self.prefixes.evict(missing)
        return missing <= 0

    def _exceeds_pool(self, request: Request, work: Work) -> bool:
        """Whether the pool could not hold this work even if the request were alone."""
        return request.slots.length + work.part.num_rows > self.pool.num_slots

    def _make_room(self, request: Request, num_rows: int, chosen: list[tuple[Request, Work]]) -> bool:
        """Reserve slots for the rows of a pass. This may preempt other requests, and removes these from `chosen`.

        Returns False if this request must wait, or has ended.
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
            self._preempt(last)
            chosen[:] = [(other, work) for other, work in chosen if other is not last]
            if last is request:
                return False

    def _preempt(self, request: Request) -> None:
        """Preempt a running request. It keeps its tokens, and waits before all others of its priority."""
        self.running.remove(request)
        request.slots.free()
        request.drafts, request.stale, request.next_work, request.prefix = None, False, None, None
        request.noise.clear()
        request.num_preempted += 1
        before = [i for i, r in enumerate(self.waiting) if r.config.priority >= request.config.priority]
        self.waiting.insert(before[0] if before else len(self.waiting), request)
