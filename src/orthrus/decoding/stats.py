"""Sums up the cycle records of a request."""

from collections import Counter
from collections.abc import Sequence

from orthrus.types import Cycle, DecodeStats


def summarise(num_prompt_tokens: int, cycles: Sequence[Cycle], num_cached_tokens: int = 0) -> DecodeStats:
    """Add up a request's records; the first is the prefill's. docs/metrics.md has the definitions.

    num_cached_tokens: tokens of the prompt that an earlier request had left in the cache.
    """
    prefill = [c for c in cycles if c.kind == "prefill"]
    decode = [c for c in cycles if c.kind != "prefill"]
    histogram = Counter(c.num_accepted for c in decode if c.num_drafted)
    return DecodeStats(
        num_prompt_tokens=num_prompt_tokens,
        num_tokens=sum(len(c.token_ids) for c in cycles),
        num_passes=sum(c.num_passes for c in cycles),
        num_prefill_passes=sum(c.num_passes for c in prefill),
        num_rows=sum(c.num_rows for c in decode),
        # The last record of a request that was cancelled, or found no room, has no pass, so it is no cycle.
        num_cycles=sum(c.num_passes > 0 for c in decode),
        num_drafted=sum(c.num_drafted for c in decode),
        num_accepted=sum(c.num_accepted for c in decode),
        accepted_histogram=tuple(histogram[n] for n in range(max(histogram) + 1)) if histogram else (),
        ttft_ms=sum(c.elapsed_ms for c in prefill),
        decode_ms=sum(c.elapsed_ms for c in decode),
        num_copied=sum(c.num_copied for c in decode),
        num_cached_tokens=num_cached_tokens,
    )
