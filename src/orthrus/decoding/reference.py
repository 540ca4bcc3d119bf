"""The slow oracle for tests: textbook decoding, which recomputes the whole sequence for each token."""

from collections.abc import Callable

import torch
from torch import Tensor

from orthrus.config import SamplingParams
from orthrus.decoding.noise import exponential_noise
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.sampling import draw_with_noise, filtered_probs, greedy_tokens


def reference_decode(
    logits_of: Callable[[Tensor], Tensor],
    prompt_ids: list[int],
    max_new_tokens: int,
    params: SamplingParams | None = None,
    eos_token_ids: frozenset[int] = frozenset(),
    *,
    min_tokens: int = 0,
    mask_after: Callable[[list[int]], Tensor] | None = None,
) -> list[int]:
    """Decode with `logits_of(token_ids_T) -> logits_TV`, without cache and drafts. Returns the new ids.

    Every strategy must give these ids, also when sampling. A token is drawn with the noise of the seed (0 for None) and
    of its own position; the prompt's first token has position 0. eos_token_ids: all tokens that end the text, stop
    token ids included. mask_after(new ids) -> mask_V bool: the tokens that a grammar allows after them.
    """
    params = params or SamplingParams()
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens and not eos_token_ids & {*new_ids}:
        logits_1V = logits_of(torch.tensor([*prompt_ids, *new_ids]))[-1:]
        # New rules for each token, which get the whole text as the row's path.
        rules = LogitRules(
            params, logits_1V.shape[-1], logits_1V.device, min_tokens=min_tokens, end_ids=eos_token_ids
        )
        rules.see_prompt(prompt_ids)
        logits_1V = rules(logits_1V, [new_ids], None if mask_after is None else mask_after(new_ids)[None])
        if params.greedy:
            new_ids.append(int(greedy_tokens(logits_1V)))
            continue
        probs_1V = filtered_probs(logits_1V, params)
        position = len(prompt_ids) + len(new_ids)
        noise_1V = exponential_noise(params.seed or 0, [position], probs_1V.shape[-1], probs_1V.device)
        new_ids.append(int(draw_with_noise(probs_1V, noise_1V)))
    return new_ids


def reference_distribution(
    logits_of: Callable[[Tensor], Tensor], prompt_ids: list[int], depth: int, params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """The exact distribution of the next `depth` tokens, by enumeration: {token ids: probability}.

    Filters only: no logit bias, no penalties.
    """
    masses: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        longer: dict[tuple[int, ...], float] = {}
        for ids, mass in masses.items():
            probs_V = filtered_probs(logits_of(torch.tensor([*prompt_ids, *ids]))[-1:], params)[0]
            longer |= {(*ids, v): mass * float(p) for v, p in enumerate(probs_V) if p > 0}
        masses = longer
    return masses
