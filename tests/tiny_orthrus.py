"""A whole `Orthrus` around a tiny random model, with a tokenizer of one character per token."""

import torch
from tests.tiny import VOCAB, tiny_dual

from orthrus.api import Orthrus
from orthrus.base.families import context_length
from orthrus.base.loading import Base
from orthrus.base.resolve import Source
from orthrus.engine.engine import EngineConfig


class TinyTokenizer:
    """Character c is token 3 + ord(c) modulo the free ids; decoding gives one letter per id."""

    chat_template = None
    bos_token_id = bos_token = None
    eos_token_id = 2
    bos_token_id = bos_token = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % (VOCAB - 4) for c in text]}

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(ord("A") + i) for i in token_ids if not (skip_special_tokens and i < 3))

    def __len__(self) -> int:
        return VOCAB


def tiny_orthrus(
    name: str = "llama",
    *,
    seed: int = 0,
    block_size: int = 8,
    disturb: float = 0.3,
    dtype: torch.dtype = torch.float32,
    config: EngineConfig | None = None,
) -> Orthrus:
    """Instant, offline; `disturb` makes the view's drafts partly wrong, so that cycles differ in length."""
    dual = tiny_dual(name, seed=seed, block_size=block_size, disturb=disturb).to(dtype)
    base = Base(
        name=f"tiny-{name}",
        model=dual.base,
        tokenizer=TinyTokenizer(),  # type: ignore[arg-type]
        eos_token_ids=frozenset({2}),
        context_length=context_length(dual.base.config),
        family=dual.family,
        source=Source("folder", f"tiny-{name}"),
    )
    return Orthrus(base, dual, config=config)
