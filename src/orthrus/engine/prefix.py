"""Prefix cache: keeps pages of earlier requests by their tokens, so that a chat's next turn starts after the last."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from orthrus.model.pool import PAGE, SlotPool

Tokens = tuple[int, ...]


@dataclass(slots=True, eq=False)
class PrefixPage:
    """A page of committed history: its tokens, and the page before it (None for a text's first page)."""

    page: int
    tokens: Tokens
    parent: "PrefixPage | None"
    children: "dict[Tokens, PrefixPage]" = field(default_factory=dict)


class PrefixStore:
    """Full pages of committed history, keyed by all tokens from the beginning. The least recently used go first.

    The store owns its pages together with the requests that use them. A request that uses a page uses all pages before
    it. So if nobody uses a page, nobody uses the pages after it. Tokens are compared, not their hashes. Not
    thread-safe: the engine guards it.
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._first: dict[Tokens, PrefixPage] = {}
        # From the least to the most recently used.
        self._pages: OrderedDict[int, PrefixPage] = OrderedDict()

    def __len__(self) -> int:
        """Number of kept pages."""
        return len(self._pages)

    @property
    def num_idle(self) -> int:
        """Number of pages that no request uses. `evict` can free all of them."""
        return sum(self._pool.owners(page) == 1 for page in self._pages)

    def find(self, token_ids: Sequence[int]) -> list[PrefixPage]:
        """The longest sequence of kept pages with which these tokens begin. They never include the last token."""
        found: list[PrefixPage] = []
        children = self._first
        for start in range(0, len(token_ids) - PAGE, PAGE):
            node = children.get(tuple(token_ids[start : start + PAGE]))
            if node is None:
                break
            found.append(node)
            children = node.children
        # First pages serve most requests, so they count as the most recently used.
        for node in reversed(found):
            self._pages.move_to_end(node.page)
        return found

    def add(self, parent: PrefixPage | None, token_ids: Sequence[int], page: int) -> PrefixPage:
        """Keep a committed page that follows `parent`, which the caller uses. Returns the kept page.

        That may be an equal page of another request. The caller then uses it in place of its own.
        """
        tokens = tuple(token_ids)
        assert len(tokens) == PAGE, "only whole pages are kept"
        assert parent is None or self._pages.get(parent.page) is parent, "a page that has been given up"
        children = self._first if parent is None else parent.children
        if tokens not in children:
            self._pool.share(page)
            children[tokens] = self._pages[page] = PrefixPage(page, tokens, parent)
        return children[tokens]

    def evict(self, num_pages: int) -> int:
        """Evict up to so many pages that nobody uses, the ends of texts first; returns the number of evicted pages."""
        freed = 0
        while freed < num_pages:
            node = next((n for n in self._pages.values() if self._is_idle_end(n)), None)
            if node is None:
                break
            del self._pages[node.page]
            del (self._first if node.parent is None else node.parent.children)[node.tokens]
            self._pool.release(node.page)
            freed += 1
        return freed

    def _is_idle_end(self, node: PrefixPage) -> bool:
        return not node.children and self._pool.owners(node.page) == 1
