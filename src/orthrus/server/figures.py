"""Statistics of an answer: in the format that load tools read, and Orthrus's own metrics."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orthrus.decoding.stats import summarise
from orthrus.server.tokens import TokenBytes
from orthrus.types import Cycle


@dataclass(slots=True)
class TextRecords:
    """The records of one text, in the order of their arrival."""

    num_prompt_tokens: int
    strategy: str
    cycles: list[Cycle] = field(default_factory=list)
    num_cached: int = 0
    stop_string: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(cycle.token_ids) for cycle in self.cycles)

    @property
    def finish(self) -> str | None:
        return self.cycles[-1].finish_reason if self.cycles else None

    @property
    def text(self) -> str:
        return "".join(cycle.text for cycle in self.cycles)


def finish_reason(finish: str | None) -> str | None:
    """OpenAI's word for a finish reason. OpenAI has none for a deadline, so that becomes "length"."""
    return "length" if finish == "deadline" else finish


def usage(texts: Sequence[TextRecords], num_prompts: int) -> dict[str, Any]:
    """Token counts of all texts. A prompt counts once, however many texts follow it."""
    per_prompt = len(texts) // num_prompts
    firsts = texts[::per_prompt]
    prompt = sum(text.num_prompt_tokens for text in firsts)
    completion = sum(text.num_tokens for text in texts)
    cached = sum(text.num_cached for text in firsts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def metrics(texts: Sequence[TextRecords], seed: int) -> dict[str, Any]:
    """`speculative_decoding` (not for plain decoding) and `orthrus`, over all texts of a request."""
    stats = [summarise(t.num_prompt_tokens, t.cycles, t.num_cached) for t in texts]
    num_passes, num_tokens = sum(s.num_passes for s in stats), sum(s.num_tokens for s in stats)
    strategy = texts[0].strategy
    ours = {
        "strategy": strategy,
        "seed": seed,
        "passes": num_passes,
        "cycles": sum(s.num_cycles for s in stats),
        "tokens_per_forward": round(num_tokens / num_passes, 4) if num_passes else 0.0,
        "copied_tokens": sum(s.num_copied for s in stats),
        "cached_tokens": sum(s.num_cached_tokens for s in stats),
        "finish_reasons": [t.finish for t in texts],
    }
    if strategy == "ar":
        return {"orthrus": ours}
    return {"speculative_decoding": speculative([c for t in texts for c in t.cycles]), "orthrus": ours}


def provenance(cycle: Cycle, token_bytes: TokenBytes) -> dict[str, Any]:
    """The origin of the tokens of a record: `draft` says whether a token was drafted.

    `rejected`: the rejected drafts after the accepted ones; for a tree, those of its first branch.
    """
    return {
        "cycle": cycle.kind,
        "tokens": [
            {
                "id": token_id,
                "text": token_bytes.text(token_id),
                "special": token_bytes.is_special(token_id),
                "draft": is_draft,
            }
            for token_id, is_draft in zip(cycle.token_ids, cycle.is_draft, strict=True)
        ],
        "rejected": [{"id": token_id, "text": token_bytes.text(token_id)} for token_id in cycle.rejected_ids],
        "num_drafted": cycle.num_drafted,
        "passes": cycle.num_passes,
    }


def speculative(cycles: Sequence[Cycle]) -> dict[str, Any]:
    """Acceptance over the cycles that verified drafts."""
    steps = [cycle for cycle in cycles if cycle.num_drafted]
    accepted, drafted = sum(c.num_accepted for c in steps), sum(c.num_drafted for c in steps)
    counts = Counter(c.num_accepted for c in steps)
    return {
        "mean_acceptance_length": round(1.0 + accepted / len(steps), 4) if steps else 0.0,
        "draft_acceptance_rate": round(accepted / drafted, 4) if drafted else 0.0,
        "acceptance_histogram": [counts[n] for n in range(max(counts) + 1)] if counts else [],
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": max((c.num_drafted for c in steps), default=0),
    }
