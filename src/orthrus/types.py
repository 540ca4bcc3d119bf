"""Values that travel between the layers.

A tensor's name ends in its shape, one letter per dimension; a digit is a size. Letters of the whole package:

B batch, R rows (of a pass, or those projected to logits), T tokens of one sequence, S slots of the cache, K block size,
H heads, C hidden size, V vocabulary, D draft rows or head dimension, P parents, pages or a pass's plan. Where a letter
has two meanings, the file says which. A file explains further letters itself.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
CycleKind = Literal["prefill", "ar", "chain", "tree", "fused", "fused_tree"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural log probability of a committed token, which is finite, and those of the most probable tokens.

    They come from the model's own distribution, before temperature, penalties, bias and grammar. `top`: pairs (id, log
    probability), most probable first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Cycle:
    """The record of one cycle: one round of drafting and verifying, in one or two passes.

    Streams, results and benchmarks all consist of these records. `text`: the text that became printable with this
    cycle. It has whole characters only, so it may lag behind `token_ids`. `is_draft[i]` says whether `token_ids[i]` was
    drafted; all other tokens are the AR view's own. `num_copied`: accepted drafts that only a copy or a grammar
    proposed; the others came from the diffusion view. `rejected_ids`: the rejected drafts after the accepted ones; for
    a tree, those of its first branch. `elapsed_ms`: the wall time of the cycle. `logprobs`: one entry per token if the
    request asked for them.
    """

    index: int
    kind: CycleKind
    text: str
    token_ids: tuple[int, ...]
    is_draft: tuple[bool, ...]
    num_drafted: int
    num_accepted: int
    num_passes: int
    num_rows: int
    elapsed_ms: float
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    num_copied: int = 0
    rejected_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """Counters of one request. docs/metrics.md defines every number."""

    num_prompt_tokens: int
    num_tokens: int
    num_passes: int
    num_prefill_passes: int
    num_rows: int
    num_cycles: int
    num_drafted: int
    num_accepted: int
    accepted_histogram: tuple[int, ...]
    ttft_ms: float
    decode_ms: float
    num_copied: int = 0
    num_cached_tokens: int = 0

    @property
    def tokens_per_cycle(self) -> float:
        """Tokens committed by cycles / cycles. The AR view's own tokens count, the prefill's token does not."""
        return (self.num_tokens - 1) / self.num_cycles if self.num_cycles else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Committed tokens / all passes: prefill, draft and verify passes all count."""
        return self.num_tokens / self.num_passes if self.num_passes else 0.0

    @property
    def rows_per_pass(self) -> float:
        """Rows / passes, both views, without the prefill."""
        num_passes = self.num_passes - self.num_prefill_passes
        return self.num_rows / num_passes if num_passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts / proposed drafts; 0 when nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else 0.0

    @property
    def seconds(self) -> float:
        """Time to first token + decoding time."""
        return (self.ttft_ms + self.decode_ms) / 1e3

    @property
    def tokens_per_second(self) -> float:
        """New tokens / (time to first token + decoding time)."""
        total_ms = self.ttft_ms + self.decode_ms
        return 1e3 * self.num_tokens / total_ms if total_ms else 0.0

    @property
    def tpot_ms(self) -> float:
        """Decoding time / (tokens - 1), in ms. Tokens of a cycle arrive together, so single gaps mean little."""
        return self.decode_ms / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        derived = (
            "tokens_per_cycle",
            "tokens_per_forward",
            "rows_per_pass",
            "acceptance_rate",
            "tokens_per_second",
            "tpot_ms",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The whole answer. `token_ids` holds only new tokens, the end-of-sequence token included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: DecodeStats
    cycles: tuple[Cycle, ...]
