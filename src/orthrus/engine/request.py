"""A request: pure data, and `commit`, the only way in which tokens become part of the answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from orthrus.config import DecodeConfig
from orthrus.decoding.copies import NO_COPY, Copy, CopyIndex, CopyPromise
from orthrus.decoding.grammar import GrammarState
from orthrus.decoding.policy import Policy
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.stopping import StopRules
from orthrus.decoding.tree import Candidates, DraftTree
from orthrus.engine.detokenize import AnswerText
from orthrus.model.passes import Part
from orthrus.model.pool import Slots
from orthrus.types import Cycle, CycleKind, FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A request's work in the next pass.

    kind: of the cycle that the pass belongs to. tree: drafts to verify. block_rows: AR rows that are anchors of
    diffusion blocks, of block_size rows each, whose first num_guesses guesses count. stale: the drafts' block had not
    seen all of the text. is_view: for each node, whether the diffusion view proposed it. copy: the tokens that copying
    proposes here, verified or not. masks_QV: the tokens that a grammar allows after each judged row. without_floor: the
    paper's draft pass, a block without an AR row. is_last: the last chunk of a prompt, or any other work.
    spares_draft: a copy is verified in place of a draft pass, so the policy was not asked for one.
    """

    kind: CycleKind
    part: Part
    tree: DraftTree
    block_rows: tuple[int, ...] = ()
    block_size: int = 0
    num_guesses: int = 0
    stale: bool = False
    is_view: tuple[bool, ...] = ()
    copy: Copy = NO_COPY
    masks_QV: Tensor | None = None
    without_floor: bool = False
    is_last: bool = True
    spares_draft: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether all drafts were copied or forced by a grammar, and the request has no block in the pass."""
        return bool(self.tree.num_nodes) and not self.block_rows and not any(self.is_view)

    def guess_rows(self, block: int, first: int = 0) -> range:
        """Rows of the part that hold the guesses of one block, from guess `first` on.

        A block's first row makes no guess if the pass has an AR row, because that decides its token.
        """
        start = self.part.num_ar + block * self.block_size + (0 if self.without_floor else 1)
        return range(start + first, start + self.num_guesses)


@dataclass(slots=True)
class Step:
    """The tokens that a cycle has committed so far, and its costs."""

    kind: CycleKind
    token_ids: list[int] = field(default_factory=list)
    is_draft: list[bool] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    rejected_ids: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_copied: int = 0
    num_passes: int = 0
    num_rows: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Settings and state of one request. Only its engine changes it.

    The anchor, the last known token, is not in the cache yet. Its position is slots.length once the prompt has been
    fed. block_size: rows of the next blocks. drafts: the diffusion view's proposal after the anchor, None if there is
    none. stale: the proposal's block is further back, so it has not seen all of the text. next_work: the second pass of
    a cycle, chosen after the first. should_stop: gets all new token ids after every single token. deadline: in seconds
    of `time.monotonic`. began: when it first ran, by the same clock. closed: the request has ended, and `cycles` is
    complete.
    """

    prompt_ids: list[int]
    config: DecodeConfig
    stop: StopRules
    rules: LogitRules
    text: AnswerText
    slots: Slots
    seed: int
    block_size: int
    context_length: int
    policy: Policy | None = None
    copies: CopyIndex | None = None
    copy_promise: CopyPromise = field(default_factory=CopyPromise)
    grammar: GrammarState | None = None
    should_stop: Callable[[list[int]], bool] | None = None
    on_cycle: Callable[[Cycle], None] | None = None
    on_end: "Callable[[Request], None] | None" = None
    deadline: float | None = None
    token_ids: list[int] = field(default_factory=list)
    drafts: Candidates | None = None
    stale: bool = False
    next_work: Work | None = None
    step: Step | None = None
    cycles: list[Cycle] = field(default_factory=list)
    finish: FinishReason | None = None
    failure: Exception | None = None
    cancelled: bool = False
    closed: bool = False
    num_cached: int = 0
    num_preempted: int = 0
    began: float | None = None
    elapsed_ms: float = 0.0
    noise: dict[int, Tensor] = field(default_factory=dict)
    prefix: Any = None

    @property
    def num_known(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt_ids) + len(self.token_ids)

    @property
    def is_answer(self) -> bool:
        """Whether the request has ended with an answer, whole or as far as its limits let it."""
        return self.failure is None and self.finish in ("stop", "length", "deadline")

    @property
    def anchor_id(self) -> int:
        return self.token_ids[-1] if self.token_ids else self.prompt_ids[-1]

    @property
    def num_to_feed(self) -> int:
        """Tokens that must go into the cache before the request can continue; 0 if only its anchor is left.

        The first pass over a prompt's last token decides a token too. After a preemption that token is known.
        """
        return self.num_known - self.slots.length - (1 if self.token_ids else 0)

    @property
    def room(self) -> int:
        """Tokens that may still be committed."""
        return self.stop.max_new_tokens - len(self.token_ids)

    def known(self, start: int, end: int) -> list[int]:
        """Known tokens [start, end), prompt first."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        return (
            (self.prompt_ids[start:] + self.token_ids)[: end - start]
            if start < num_prompt
            else (self.token_ids[start - num_prompt : end - num_prompt])
        )

    def commit(self, token_ids: list[int], num_drafts: int, logprobs: list[TokenLogprob]) -> int:
        """Commit decided tokens one by one until the answer ends. Returns how many were committed.

        The first `num_drafts` of them were drafts. Text, stop strings, penalties and log probs all follow this list.
        """
        assert self.step is not None
        for i, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            self.rules.see([token_id])
            if self.grammar is not None:
                self.grammar.advance(token_id)
            self.step.token_ids.append(token_id)
            self.step.is_draft.append(i < num_drafts)
            if logprobs:
                self.step.logprobs.append(logprobs[i])
            self.finish = self._ended(token_id)
            if self.finish is not None:
                return i + 1
        return len(token_ids)

    def _ended(self, token_id: int) -> FinishReason | None:
        """The reason why the answer ends with this token, or None. A stop takes precedence over the length limit."""
        assert self.step is not None
        may_end = len(self.token_ids) >= self.config.min_tokens
        piece, complete = self.text.push(token_id, may_end=may_end)
        self.step.text += piece
        finish: FinishReason | None = "stop" if complete else None
        finish = finish or self.stop.finish_reason(token_id, len(self.token_ids))
        if finish is None and self.should_stop is not None and self.should_stop(self.token_ids):
            finish = "stop"
        if finish is not None and not complete:
            tail, complete = self.text.flush()
            self.step.text += tail
            finish = "stop" if complete else finish
        return finish
