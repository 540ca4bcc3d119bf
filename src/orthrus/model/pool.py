"""The KV cache that both views and all requests share: a pool of slots in pages, and one request's part of it.

A slot holds the keys and values of one row in every layer. A request's slots are in pages that it owns, or shares with
requests that have the same prefix. Below its `length` they hold committed AR history, where the slot number is the
position. Slots above `length` are scratch, which the next pass overwrites. So the diffusion view needs space for one
block, and no second cache.

Letters: P pages, W slots of a page, D head dimension.
"""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

PAGE = 64
"""Slots of a page. `kernels/attention_plan.h` has the same number."""

NOBODY, AR, DIFFUSION = 0, 1, 2
_WRITERS = ("nobody", "the AR view", "the diffusion view")

Move = Callable[[list[Tensor], list[int], list[int]], None]
"""Called with (stores, sources, targets) to move slots of each store."""


def move_slots(stores: list[Tensor], sources: list[int], targets: list[int]) -> None:
    """Move slot sources[i] of each store (1, H, S, D) to targets[i]. All sources are read first."""
    source_P, target_P = (torch.tensor(slots, device=stores[0].device) for slots in (sources, targets))
    for store_1HSD in stores:
        store_1HSD.index_copy_(2, target_P, store_1HSD.index_select(2, source_P))


def transposed(keys_1HSD: Tensor) -> Tensor:
    """A copy of the keys of whole pages, transposed to `keys_1HPDW`.

    A page stores the same element of all its slots side by side, because attention reads one element of many keys at a
    time.
    """
    keys_1HPDW: Tensor = keys_1HSD.unflatten(2, (-1, PAGE)).mT.contiguous()
    return keys_1HPDW


def pages_for(num_slots: int) -> int:
    """How many pages hold so many slots."""
    return -(-num_slots // PAGE)


class SlotPool:
    """Keys and values of `num_pages` pages, for each layer (1, H_kv, S, D), and the owners of the pages.

    On a CPU the memory is only reserved. The system provides it when a slot is first written, so low pages are used
    first. A ledger on the host records the position and the writer of each slot, for `Slots.check`. move: the function
    that gathers accepted paths. keys_transposed: store keys as (1, H_kv, P, D, W) for our kernels, see `transposed`.
    Not thread-safe: the engine that owns the pool guards it.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        num_pages: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        move: Move = move_slots,
        keys_transposed: bool = False,
    ) -> None:
        num_heads, size = num_kv_heads(config), head_dim(config)
        shape = (1, num_heads, num_pages * PAGE, size)
        key_shape = (1, num_heads, num_pages, size, PAGE) if keys_transposed else shape
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(key_shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.num_pages = num_pages
        self.positions_S: NDArray[np.int64] = np.full(num_pages * PAGE, -1, dtype=np.int64)
        self.writers_S: NDArray[np.int8] = np.zeros(num_pages * PAGE, dtype=np.int8)
        self._move = move
        self._owners = [0] * num_pages
        self._free = list(range(num_pages))

    @property
    def num_free(self) -> int:
        """Number of pages without an owner."""
        return len(self._free)

    @property
    def num_slots(self) -> int:
        return self.num_pages * PAGE

    def take(self) -> int | None:
        """Allocate a page with one owner; None if no page is free."""
        if not self._free:
            return None
        page = heappop(self._free)
        self._owners[page] = 1
        self.writers_S[page * PAGE : (page + 1) * PAGE] = NOBODY
        return page

    def share(self, page: int) -> None:
        """Add an owner to a page that has owners."""
        assert self._owners[page] > 0, "a page that nobody owns"
        self._owners[page] += 1

    def release(self, page: int) -> None:
        """Remove an owner; the last owner frees the page."""
        assert self._owners[page] > 0, "a page that nobody owns"
        self._owners[page] -= 1
        if not self._owners[page]:
            heappush(self._free, page)

    def owners(self, page: int) -> int:
        return self._owners[page]

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Move slots, numbered over the whole pool, in all layers and in the ledger."""
        self._move([*self.keys, *self.values], sources, targets)
        for ledger in (self.positions_S, self.writers_S):
            ledger[targets] = ledger[sources]


class Slots:
    """One request's slots: its pages, in order, and how many slots are committed history."""

    def __init__(self, pool: SlotPool) -> None:
        self.pool = pool
        self.pages: list[int] = []
        self.length = 0

    @property
    def num_slots(self) -> int:
        return len(self.pages) * PAGE

    def reserve(self, num_slots: int) -> bool:
        """Allocate pages for so many slots; False, without any change, if the pool has too few."""
        missing = pages_for(num_slots) - len(self.pages)
        if missing > self.pool.num_free:
            return False
        for _ in range(missing):
            page = self.pool.take()
            assert page is not None
            self.pages.append(page)
        return True

    def adopt(self, pages: Sequence[int]) -> None:
        """Start with pages of committed history, shared with their owners."""
        assert not self.pages and not self.length, "only an empty request can adopt pages"
        for page in pages:
            self.pool.share(page)
        self.pages = list(pages)
        self.length = len(self.pages) * PAGE

    def replace(self, index: int, page: int) -> None:
        """Replace an own page by another page of the same committed history, shared with its owners."""
        assert (index + 1) * PAGE <= self.length, "a page that is not history yet"
        if page != self.pages[index]:
            self.pool.share(page)
            self.pool.release(self.pages[index])
            self.pages[index] = page

    def places(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of this request's slots in the whole pool."""
        return np.array(self.pages, dtype=np.int64)[slots // PAGE] * PAGE + slots % PAGE

    def commit(self, num_tokens: int) -> None:
        """Make the next scratch slots history. The AR view must have written and accepted them."""
        assert 0 <= num_tokens <= self.num_slots - self.length
        self.length += num_tokens

    def compact(self, rows: Sequence[int]) -> None:
        """Move an accepted path (scratch rows in ascending order) to the end of the history, and commit it."""
        start = self.length
        # Rows that are in place already need not move: those of a chain, and of a tree's first branch.
        kept = next((i for i, row in enumerate(rows) if row != i), len(rows))
        if kept < len(rows):
            moved = np.array([*rows[kept:], *range(kept, len(rows))], dtype=np.int64) + start
            sources, targets = np.split(self.places(moved), 2)
            self.pool.move(sources.tolist(), targets.tolist())
        self.commit(len(rows))

    def free(self) -> None:
        """Release all pages."""
        for page in self.pages:
            self.pool.release(page)
        self.pages, self.length = [], 0

    def check(self) -> None:
        """Integrity check: every committed slot was written by the AR view for its own position.

        Raises AssertionError, which names the first wrong slot.
        """
        places = self.places(np.arange(self.length))
        wrong = (self.pool.writers_S[places] != AR) | (
            self.pool.positions_S[places] != np.arange(self.length)
        )
        if wrong.any():
            slot = int(wrong.argmax())
            raise AssertionError(
                f"slot {slot} holds position {self.pool.positions_S[places[slot]]}, written by "
                f"{_WRITERS[self.pool.writers_S[places[slot]]]}"
            )


def num_kv_heads(config: PreTrainedConfig) -> int:
    """Key/value heads of one layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: PreTrainedConfig) -> int:
    """Size of one head. Without a field of its own it is hidden size / heads."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def slot_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one slot, over all layers."""
    return 2 * int(config.num_hidden_layers) * num_kv_heads(config) * head_dim(config) * dtype.itemsize
