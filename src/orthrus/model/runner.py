"""Runners run passes. The eager runner is the stock forward, and the slow reference for all others."""

from typing import Any, Protocol

import torch
from torch import Tensor

from orthrus.base.families import layer_windows
from orthrus.model import attention
from orthrus.model.attention import RunningPass
from orthrus.model.drafting import RepairTables
from orthrus.model.dual_view import DualView
from orthrus.model.passes import Pass
from orthrus.model.pool import SlotPool
from orthrus.model.shadow import shadow


class Runner(Protocol):
    """Runs passes of one model. An engine owns its runner; one thread runs passes at a time.

    name: "eager" or "compiled". dual: the model. repair_tables: precomputed products of the view's repair head, if the
    runner has them. kv_dtype: the dtype of keys and values in its pools.
    """

    name: str
    dual: DualView
    kv_dtype: torch.dtype
    repair_tables: RepairTables | None

    def new_pool(self, num_pages: int) -> SlotPool:
        """An empty pool that fits this runner's passes."""
        ...

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        """Run a pass. Returns the final hidden states hidden_RC of all its rows, before the head."""
        ...

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        """logits_RV of hidden states. drafts: as in `DualView.head`."""
        ...


class RunnerAround:
    """A runner that delegates to another one. Subclasses override what they observe or change."""

    def __init__(self, runner: Runner) -> None:
        self.name, self.dual, self.repair_tables = runner.name, runner.dual, runner.repair_tables
        self.kv_dtype = runner.kv_dtype
        self._runner = runner

    def new_pool(self, num_pages: int) -> SlotPool:
        return self._runner.new_pool(num_pages)

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        return self._runner.hidden(p, pool)

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        return self._runner.head(hidden_RC, drafts=drafts)


class EagerRunner:
    """The stock transformers forward, with twins and with attention span by span. For any device and dtype.

    It shares its weights with the model, so training takes effect at once. kv_dtype: by default the model's dtype.
    """

    name = "eager"
    repair_tables: RepairTables | None = None

    def __init__(self, dual: DualView, kv_dtype: torch.dtype | None = None) -> None:
        self.dual, self.kv_dtype = dual, kv_dtype or dual.dtype
        self._decoder = decoder_with_attention(dual, attention.NAME)
        self._windows = layer_windows(dual.base.config)

    def new_pool(self, num_pages: int) -> SlotPool:
        return SlotPool(self.dual.base.config, num_pages, dtype=self.kv_dtype, device=self.dual.device)

    def hidden(self, p: Pass, pool: SlotPool) -> Tensor:
        dual, running = self.dual, RunningPass(p, pool, self._windows)
        with dual.split.at(p.num_ar_rows):
            out = self._decoder(
                inputs_embeds=dual.embed(p.token_ids_R[None]),
                attention_mask=no_mask(dual),
                position_ids=p.position_ids_R[None],
                past_key_values=running,
                use_cache=True,
                running=running,
            )
        hidden_RC: Tensor = out.last_hidden_state[0]
        return hidden_RC

    def head(self, hidden_RC: Tensor, *, drafts: bool = False) -> Tensor:
        return self.dual.head(hidden_RC, drafts=drafts)


def decoder_with_attention(dual: DualView, name: str) -> torch.nn.Module:
    """The stock decoder, with shared weights, whose attention modules call the attention function of that name."""
    configs: dict[int, Any] = {}

    def change(path: str, module: torch.nn.Module) -> dict[str, Any] | None:
        if not path.endswith("self_attn"):
            return None
        config: Any = module.config
        if id(config) not in configs:
            ours = object.__new__(type(config))
            ours.__dict__.update(config.__dict__)
            ours._attn_implementation = name
            configs[id(config)] = ours
        return {"config": configs[id(config)]}

    return shadow(dual.base.get_decoder(), change)


def no_mask(dual: DualView) -> Tensor | dict[str, Tensor]:
    """A dummy mask (1, 1, 1, 1), so that the stock code builds none. Our attention takes visibility from the pass."""
    unused = torch.zeros((1, 1, 1, 1), device=dual.device)
    return dual.mask_argument(unused, unused)
