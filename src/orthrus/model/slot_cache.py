"""The slot cache: one KV store that both views read and write.

Slots below a row's `length` are committed AR history, slot index = position. Slots above are scratch,
overwritten by the next pass; so the diffusion view costs one block of head-room and no second cache.
A cache may grow with its text: `max_slots` says how far.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from orthrus.errors import UserInputError
from orthrus.model.passes import Pass

_EMPTY, _AR, _DIFFUSION = 0, 1, 2

GROWTH_STEP = 512
"""Slots are made in whole steps, and never less than one step at a time."""

Move = Callable[[list[Tensor], int, int, list[int]], None]
"""(stores, row, start, slots): slots of a row, in ascending order, to start, start + 1, ... of each store."""


class SlotCache:
    """Duck-typed transformers cache (`update`, `get_seq_length`) whose slots each pass chooses itself.

    keys and values: per layer (B, H_kv, S, D). A ledger remembers each slot's position and the view that
    wrote it: sliding windows need the former, the integrity check both.

    max_slots: as many slots as the cache may grow to; those that it was made with, unless set higher. Growing
    replaces the tensors of `keys` and `values`, so look them up after `begin`; it also empties `recorded`,
    where a runner may keep what hangs on their addresses. move: a faster way to gather an accepted path.
    """

    is_compileable = False

    def __init__(
        self,
        config: PreTrainedConfig,
        num_slots: int,
        *,
        batch_size: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        # Zeros, not empty: a masked slot still enters softmax(..) @ V, and 0 * nan is nan.
        shape = (batch_size, num_kv_heads(config), num_slots, head_dim(config))
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.positions_BS = torch.full((batch_size, num_slots), -1, dtype=torch.long, device=device)
        self.writers_BS = torch.zeros((batch_size, num_slots), dtype=torch.int8, device=device)
        self.lengths = [0] * batch_size
        self.max_slots = num_slots
        self.recorded: dict[Any, Any] = {}
        self.move: Move | None = None
        self._whole: SlotCache | None = None
        self._slots_BT: Tensor | None = None
        self._num_read = 0

    @property
    def num_slots(self) -> int:
        return self.positions_BS.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, over all layers."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def begin(self, p: Pass) -> None:
        """Make ready for a pass: note where its rows will be written and how many slots it reads.

        Grows where the pass needs more; UserInputError where it needs more than `max_slots`.
        """
        assert self._whole is None or self._whole.num_slots == self.num_slots, "a row of an outgrown store"
        self.ensure(p.num_slots)
        self._slots_BT, self._num_read = p.slots_BT, p.num_slots
        writers_T = torch.full_like(p.slots_BT, _DIFFUSION, dtype=torch.int8)
        writers_T[:, : p.num_ar_rows] = _AR
        self.positions_BS.scatter_(1, p.slots_BT, p.position_ids_BT)
        self.writers_BS.scatter_(1, p.slots_BT, writers_T)

    def ensure(self, num_slots: int) -> None:
        """Have at least `num_slots`. History, scratch, ledger and lengths stay; new slots are empty.

        Grows by a quarter, or to what is needed, rounded up to whole steps: so at most a quarter or a step is
        idle (doubling would leave half), a slot is copied four times on average however long the text, and
        the sizes that a captured pass has to follow stay few. Layer after layer: never two stores at once.
        """
        if num_slots <= self.num_slots:
            return
        if num_slots > self.max_slots:
            raise UserInputError(
                f"the pass needs {num_slots} cache slots, but only {self.max_slots} were made; "
                "ask for fewer tokens or a larger cache."
            )
        self.recorded.clear()
        wanted = max(num_slots, self.num_slots * 5 // 4)
        size = min(self.max_slots, -(-wanted // GROWTH_STEP) * GROWTH_STEP)
        for stores in (self.keys, self.values):
            for layer, store_BHSD in enumerate(stores):
                stores[layer] = _longer(store_BHSD, 2, size, 0)
        self.positions_BS = _longer(self.positions_BS, 1, size, -1)
        self.writers_BS = _longer(self.writers_BS, 1, size, _EMPTY)

    def clear(self) -> None:
        """Forget the text; the tensors stay, with what has been recorded on them."""
        self.lengths = [0] * len(self.lengths)
        self.positions_BS.fill_(-1)
        self.writers_BS.fill_(_EMPTY)

    def update(
        self, keys_BHTD: Tensor, values_BHTD: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the stock attention: store this pass's rows, return the slots that it may read."""
        assert self._slots_BT is not None, "begin(pass) comes first"
        stored = self.keys[layer_idx], self.values[layer_idx]
        for store_BHSD, new_BHTD in zip(stored, (keys_BHTD, values_BHTD), strict=True):
            if store_BHSD.shape[0] == 1:
                store_BHSD.index_copy_(2, self._slots_BT[0], new_BHTD)
            else:
                # scatter_ would copy the whole store on a CPU; this touches only the rows written.
                rows_B1 = torch.arange(store_BHSD.shape[0], device=store_BHSD.device)[:, None]
                store_BHSD[rows_B1, :, self._slots_BT] = new_BHTD.transpose(1, 2)
        return stored[0][:, :, : self._num_read], stored[1][:, :, : self._num_read]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens of the longest row."""
        return max(self.lengths)

    def commit(self, num_tokens: int, row: int = 0) -> None:
        """The next `num_tokens` scratch slots become history: the AR view has written and accepted them."""
        assert num_tokens >= 0 and self.lengths[row] + num_tokens <= self.num_slots
        self.lengths[row] += num_tokens

    def roll_back(self, num_tokens: int, row: int = 0) -> None:
        """The last `num_tokens` of the history become scratch again."""
        assert 0 <= num_tokens <= self.lengths[row]
        self.lengths[row] -= num_tokens

    def compact(self, slots: list[int], row: int = 0) -> None:
        """Gather an accepted tree path, in scratch `slots` that ascend, into the history and commit it."""
        start = self.lengths[row]
        assert all(slot >= start for slot in slots), "an accepted path lies in scratch"
        # What lies in its place already need not move: a chain, and the first of a tree's branches.
        kept = next((i for i, slot in enumerate(slots) if slot != start + i), len(slots))
        if kept < len(slots):
            source_P = torch.tensor(slots[kept:], device=self.positions_BS.device)
            target = slice(start + kept, start + len(slots))
            if self.move is not None:
                self.move([*self.keys, *self.values], row, start + kept, slots[kept:])
            else:
                for store in (*self.keys, *self.values):
                    store[row, :, target] = store[row].index_select(1, source_P)
            for ledger in (self.positions_BS, self.writers_BS):
                ledger[row, target] = ledger[row, source_P]
        self.commit(len(slots), row)

    def row(self, row: int) -> "SlotCache":
        """One row as a cache of its own that shares the storage; its length starts where the row's is.

        It cannot grow, and must not be used any more once the whole has grown: AssertionError in `begin`.
        """
        view = object.__new__(SlotCache)
        view.keys = [k[row : row + 1] for k in self.keys]
        view.values = [v[row : row + 1] for v in self.values]
        view.positions_BS = self.positions_BS[row : row + 1]
        view.writers_BS = self.writers_BS[row : row + 1]
        view.lengths = [self.lengths[row]]
        view.max_slots, view._whole, view.recorded, view.move = self.num_slots, self, {}, self.move
        view._slots_BT, view._num_read = None, 0
        return view

    def check(self) -> None:
        """Integrity: every committed slot was written by the AR view for the position that it stands for.

        Raises AssertionError naming the first slot that breaks this. Costs a host synchronisation.
        """
        for row, length in enumerate(self.lengths):
            wrong = self.writers_BS[row, :length] != _AR
            wrong |= self.positions_BS[row, :length] != torch.arange(length, device=wrong.device)
            if wrong.any():
                slot = int(wrong.nonzero()[0])
                raise AssertionError(
                    f"row {row}, slot {slot}: position {int(self.positions_BS[row, slot])}, "
                    f"writer {('nobody', 'ar', 'diffusion')[int(self.writers_BS[row, slot])]}"
                )


def _longer(store: Tensor, dim: int, size: int, filler: int) -> Tensor:
    """A copy that goes on with `filler` along `dim`. Not left empty: 0 * nan is nan (see `SlotCache`)."""
    shape = list(store.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([store, store.new_full(shape, filler)], dim)


def num_kv_heads(config: PreTrainedConfig) -> int:
    """Key/value heads of one layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: PreTrainedConfig) -> int:
    """Size of one head; configs without the field split the hidden size evenly."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
