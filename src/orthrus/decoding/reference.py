"""The slow oracle: decoding as the textbook says it, with the whole sequence recomputed for each token."""

from collections.abc import Callable

import torch
from torch import Tensor

from orthrus.config import SamplingParams
from orthrus.decoding.sampling import filtered_probs


def reference_decode(
    logits_of: Callable[[Tensor], Tensor],
    prompt_ids: list[int],
    max_new_tokens: int,
    params: SamplingParams | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """Decode with `logits_of(token_ids_T) -> logits_TV`, no cache and no drafts; returns the new ids."""
    params = params or SamplingParams()
    generator = torch.Generator().manual_seed(params.seed or 0)
    token_ids = list(prompt_ids)
    while len(token_ids) < len(prompt_ids) + max_new_tokens and not eos_token_ids & {
        *token_ids[len(prompt_ids) :]
    }:
        logits_V = logits_of(torch.tensor(token_ids))[-1]
        if params.greedy:
            token_ids.append(int(logits_V.argmax()))
        else:
            probs_V = filtered_probs(logits_V[None], params)[0]
            token_ids.append(int(torch.multinomial(probs_V, 1, generator=generator)))
    return token_ids[len(prompt_ids) :]


def reference_law(
    logits_of: Callable[[Tensor], Tensor], prompt_ids: list[int], depth: int, params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """The exact law of the next `depth` tokens, by enumeration: {token ids: probability}."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        longer: dict[tuple[int, ...], float] = {}
        for ids, mass in law.items():
            probs_V = filtered_probs(logits_of(torch.tensor([*prompt_ids, *ids]))[-1:], params)[0]
            longer |= {(*ids, v): mass * float(p) for v, p in enumerate(probs_V) if p > 0}
        law = longer
    return law
