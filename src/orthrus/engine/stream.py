"""One request from prompt to last token: prefill, cycles, stopping; yields a record per cycle."""

from collections.abc import Callable, Generator, Iterator
from time import perf_counter

import torch

from orthrus.config import DecodeConfig
from orthrus.decoding.policy import Policy
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.stats import summarise
from orthrus.decoding.stopping import StopRules
from orthrus.engine.costs import pass_costs
from orthrus.engine.cycles import PLAIN, auto_cycle, decode_cycle, fixed_plan
from orthrus.engine.detokenize import AnswerText, Decoder
from orthrus.engine.passes import prefill_pass
from orthrus.engine.state import DecodeState, Step, num_candidates, reads_are_dear
from orthrus.errors import UserInputError
from orthrus.model.dual_view import DualView
from orthrus.types import Cycle, FinishReason, GenerationResult


class TokenStream(Iterator[Cycle]):
    """Iterate to decode; each item is what one cycle committed. `result` sums them up.

    A model carries one running pass at a time: decode from one thread, or guard it with a lock.

    `should_stop`, if given, sees all new token ids after every single token and may end the stream there.

    Raises UserInputError at construction for an empty prompt, a prompt as long as the context, or a
    block larger than the view's.
    """

    def __init__(
        self,
        dual: DualView,
        prompt_ids: list[int],
        config: DecodeConfig,
        *,
        eos_token_ids: frozenset[int],
        context_length: int,
        tokenizer: Decoder | None = None,
        should_stop: Callable[[list[int]], bool] | None = None,
    ) -> None:
        check_prompt(prompt_ids, context_length)
        check_token_ids(dual, prompt_ids)
        self._prompt_ids = prompt_ids
        self._config = config
        self._context_length = context_length
        self._dual = dual
        self._rules = StopRules(
            eos_token_ids=frozenset() if config.ignore_eos else eos_token_ids,
            max_new_tokens=min(config.max_new_tokens, context_length - len(prompt_ids)),
        )
        self._block_size = check_block_size(dual, config.block_size)
        self._text = AnswerText(tokenizer, config.stop)
        self._should_stop = should_stop
        self._cycles: list[Cycle] = []
        self._token_ids: list[int] = []
        self._cancelled = False
        self._records: Generator[Cycle, None, None] = self._run()

    def __next__(self) -> Cycle:
        return next(self._records)

    def close(self) -> None:
        """Stop at once and free the cache; nothing more will come."""
        self._records.close()

    def cancel(self) -> None:
        """Stop after the cycle in flight; the stream ends with finish_reason 'cancelled'."""
        self._cancelled = True

    def drain(self) -> GenerationResult:
        """Run to the end and return the result."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> GenerationResult:
        """The whole answer so far; complete once the stream has ended, 'cancelled' before."""
        last = self._cycles[-1].finish_reason if self._cycles else None
        return GenerationResult(
            text="".join(c.text for c in self._cycles),
            token_ids=tuple(self._token_ids),
            finish_reason=last or "cancelled",
            stats=summarise(len(self._prompt_ids), self._cycles),
            cycles=tuple(self._cycles),
        )

    def _run(self) -> Generator[Cycle, None, None]:
        clock = perf_counter()
        state = self._new_state()
        try:
            for step in self._steps(state):
                kept, text, finish = self._take(step.token_ids)
                if finish is None and self._cancelled:
                    finish = "cancelled"
                    text += self._text.flush()[0]
                elapsed_ms = (perf_counter() - clock) * 1e3
                cycle = _record(len(self._cycles), step, kept, text, elapsed_ms, finish)
                self._cycles.append(cycle)
                yield cycle
                # What the reader does between two records is not decoding.
                clock = perf_counter()
                if finish is not None:
                    return
        finally:
            self._dual.hand_on(state.cache)

    def _take(self, token_ids: list[int]) -> tuple[int, str, FinishReason | None]:
        """How many of a cycle's tokens stand, the text they release, and why the stream ends (if it does)."""
        shown = ""
        for i, token_id in enumerate(token_ids):
            self._token_ids.append(token_id)
            piece, complete = self._text.push(token_id)
            shown += piece
            finish = "stop" if complete else self._rules.finish_reason(token_id, len(self._token_ids))
            if finish is None and self._should_stop is not None and self._should_stop(self._token_ids):
                finish = "stop"
            if finish is not None and not complete:
                tail, complete = self._text.flush()
                shown, finish = shown + tail, "stop" if complete else finish
            if finish is not None:
                return i + 1, shown, finish
        return len(token_ids), shown, None

    def _steps(self, state: DecodeState) -> Iterator[Step]:
        """The passes themselves: one item per cycle, without an end of its own."""
        size, step = self._config.prefill_chunk, Step("prefill", [], [], 0, 0, 0)
        for start in range(0, len(self._prompt_ids), size):
            last = start + size >= len(self._prompt_ids)
            done = prefill_pass(state, self._prompt_ids[start : start + size], last=last)
            step = step._replace(
                token_ids=done.token_ids,
                is_draft=[False] * len(done.token_ids),
                num_passes=step.num_passes + 1,
                num_rows=step.num_rows + done.num_rows,
            )
            if self._cancelled and not last:
                break
        yield step
        policy = self._policy()
        plan = PLAIN if policy is not None else fixed_plan(self._config, self._block_size)
        while True:
            room = self._rules.max_new_tokens - len(self._token_ids)
            yield decode_cycle(state, plan, room) if policy is None else auto_cycle(state, policy, room)

    def _policy(self) -> Policy | None:
        """What decides for `auto`; None for the fixed strategies."""
        config = self._config
        if config.strategy != "auto":
            return None
        return Policy(
            pass_costs(self._dual, greedy=config.sampling.greedy),
            self._dual.config.num_guesses(self._block_size),
            config.node_budget,
            config.block_budget,
            own_head=self._dual.draft_head is not None,
        )

    def _new_state(self) -> DecodeState:
        dual, config = self._dual, self._config
        seed = config.sampling.seed
        at_first = len(self._prompt_ids) + self._head_room()
        with torch.inference_mode():
            # Most answers end long before their limit: memory follows the text, not what was asked for.
            cache = dual.new_cache(0)
            cache.max_slots = at_first + self._rules.max_new_tokens
            cache.ensure(at_first)
        return DecodeState(
            dual=dual,
            cache=cache,
            sampling=config.sampling,
            seed=torch.seed() if seed is None else seed,
            rules=LogitRules(config.sampling, dual.vocab_size, dual.device),
            block_size=self._block_size,
            floor=config.floor,
            context_length=self._context_length,
            eos_token_ids=self._rules.eos_token_ids,
            num_candidates=num_candidates(dual),
            dear_reads=reads_are_dear(dual.device),
        )

    def _head_room(self) -> int:
        """Slots beyond the text that the largest pass of the strategy scribbles on."""
        config = self._config
        if config.strategy == "auto":
            return config.node_budget + max(1, config.block_budget) * self._block_size
        plan = fixed_plan(config, self._block_size)
        if not plan.num_nodes:
            return 0
        return max(self._block_size, plan.num_nodes + plan.num_blocks * self._block_size)


def _record(
    index: int, step: Step, kept: int, text: str, elapsed_ms: float, finish: FinishReason | None
) -> Cycle:
    is_draft = tuple(step.is_draft[:kept])
    return Cycle(
        index=index,
        kind=step.kind,
        text=text,
        token_ids=tuple(step.token_ids[:kept]),
        is_draft=is_draft,
        num_drafted=step.num_drafted,
        num_accepted=sum(is_draft),
        num_passes=step.num_passes,
        num_rows=step.num_rows,
        elapsed_ms=elapsed_ms,
        finish_reason=finish,
    )


def check_prompt(prompt_ids: list[int], context_length: int) -> None:
    """UserInputError unless there is a prompt and room behind it."""
    if not prompt_ids:
        raise UserInputError("the prompt is empty; give at least one token.")
    if len(prompt_ids) >= context_length:
        raise UserInputError(
            f"the prompt has {len(prompt_ids)} tokens, but the model's context holds {context_length}; "
            "shorten it."
        )


def check_token_ids(dual: DualView, token_ids: list[int]) -> None:
    """UserInputError for an id that the model has no embedding for."""
    num_ids = dual.vocab_size
    wrong = next((i for i in token_ids if not 0 <= i < num_ids), None)
    if wrong is not None:
        raise UserInputError(f"the prompt has token id {wrong}, but the model knows 0 to {num_ids - 1}.")


def check_block_size(dual: DualView, block_size: int | None) -> int:
    """The block size asked for, or the view's own; UserInputError when larger than the view's."""
    trained = dual.config.block_size
    if block_size is None:
        return trained
    if block_size > trained:
        raise UserInputError(
            f"block_size {block_size} is larger than the {trained} of this view; choose 2 to {trained}, "
            "or make a view with larger blocks."
        )
    return block_size
