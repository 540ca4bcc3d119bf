"""The engine: every step runs one pass that carries the rows of all requests that are ready.

Each request gets exactly the text that it would get alone: its rows read its own history, its choices are
functions of its own settings, seed and tokens, and our CPU kernels compute a row alike in any company.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from secrets import randbits
from threading import Lock, RLock
from time import monotonic, perf_counter

import torch
from torch import Tensor

from orthrus.base.families import context_length
from orthrus.base.memory import available_bytes
from orthrus.config import DecodeConfig
from orthrus.decoding.cost_table import CostTable, joint_guesses
from orthrus.decoding.logprobs import token_logprobs
from orthrus.decoding.policy import Policy
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.stopping import StopRules, end_ids
from orthrus.engine.choices import Guessed, Judged, choose, rank
from orthrus.engine.costs import OnMeasure, pass_costs
from orthrus.engine.detokenize import AnswerText, Decoder
from orthrus.engine.limits import check_block_size, check_prompt, check_token_ids
from orthrus.engine.prefix import PrefixStore
from orthrus.engine.request import Request, Step, Work
from orthrus.engine.scheduler import Scheduler
from orthrus.engine.work import end_pass, settle, settle_draft, wanted
from orthrus.model.passes import Pass, join
from orthrus.model.pool import SlotPool, Slots, pages_for, slot_bytes
from orthrus.model.runner import Runner
from orthrus.types import Cycle, TokenLogprob

Observer = Callable[[Pass, SlotPool, Tensor], None]
"""Called after every pass, before its tokens are committed, with the pass, the pool and hidden_RC of its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of an engine. max_slots: memory for keys and values, in tokens; None takes a fifth of what is
    available, at most 32 whole contexts. chunk: rows of prompts in one pass. max_running: requests that run at
    once. reuse: keep pages of earlier requests for later ones that begin alike."""

    max_slots: int | None = None
    chunk: int = 256
    max_running: int = 64
    reuse: bool = True


class Engine:
    """Answers many requests at once. Thread-safe: whoever steps holds the engine for one pass.

    observers: see every pass; for audits, benchmarks and metrics.
    """

    def __init__(
        self, runner: Runner, config: EngineConfig | None = None, *, observers: Sequence[Observer] = ()
    ):
        self.runner = runner
        self.config = config or EngineConfig()
        self.observers = list(observers)
        self._stepping, self._inbox_lock = RLock(), Lock()
        self._inbox: list[Request] = []
        self._scheduler: Scheduler | None = None
        self._costs: dict[bool, CostTable] = {}

    @property
    def context_length(self) -> int:
        """Tokens that a request's prompt and answer may have together."""
        return context_length(self.runner.dual.base.config)

    @property
    def scheduler(self) -> Scheduler:
        """The requests, and the pool that they share; made with the first of them."""
        if self._scheduler is None:
            with self._stepping:
                pool = self.runner.new_pool(self._num_pages())
                prefixes = PrefixStore(pool) if self.config.reuse else None
                self._scheduler = Scheduler(pool, self.config.chunk, self.config.max_running, prefixes)
        return self._scheduler

    def submit(
        self,
        prompt_ids: list[int],
        config: DecodeConfig,
        *,
        eos_token_ids: frozenset[int],
        tokenizer: Decoder | None = None,
        should_stop: Callable[[list[int]], bool] | None = None,
        on_cycle: Callable[[Cycle], None] | None = None,
        deadline: float | None = None,
    ) -> Request:
        """Hand in a request; steps answer it. From any thread.

        on_cycle: called with each record by the thread that steps. should_stop: sees all new token ids after
        every single token and may end the answer there. deadline: seconds of `time.monotonic` at which the
        request ends as it stands, with finish "deadline". Raises UserInputError for an empty prompt, a prompt
        as long as the context, unknown ids, or a block larger than the view's.
        """
        dual = self.runner.dual
        check_prompt(prompt_ids, self.context_length)
        check_token_ids(dual, prompt_ids)
        ends = end_ids(config, eos_token_ids, dual.vocab_size)
        seed, block_size = config.sampling.seed, check_block_size(dual, config.block_size)
        request = Request(
            prompt_ids=list(prompt_ids),
            config=config,
            stop=StopRules(ends, min(config.max_new_tokens, self.context_length - len(prompt_ids))),
            rules=LogitRules(
                config.sampling, dual.vocab_size, dual.device, min_tokens=config.min_tokens, end_ids=ends
            ),
            text=AnswerText(tokenizer, config.stop),
            slots=Slots(self.scheduler.pool),
            seed=randbits(63) if seed is None else seed,
            block_size=block_size,
            context_length=self.context_length,
            policy=self._policy(config, block_size),
            should_stop=should_stop,
            on_cycle=on_cycle,
            deadline=deadline,
        )
        request.rules.see_prompt(prompt_ids)
        with self._inbox_lock:
            self._inbox.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request before the next pass, with finish "cancelled". From any thread."""
        request.cancelled = True

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._inbox or self.scheduler.waiting or self.scheduler.running)

    @torch.inference_mode()
    def step(self) -> None:
        """Run one pass for all requests that are ready, and record what it decided.

        An error of a pass ends the requests that took part in it, as their `failure`, and is raised.
        """
        with self._stepping:
            start = perf_counter()
            self._take_in()
            scheduler = self.scheduler
            alive = [*scheduler.running, *scheduler.waiting]
            chosen = scheduler.next_pass(self._wanted)
            try:
                ended = self._run(chosen) if chosen else []
            except BaseException as error:
                for request, _ in chosen:
                    request.failure = error if isinstance(error, Exception) else RuntimeError("interrupted")
                    scheduler.finish(request)
                    request.closed = True
                raise
            elapsed_ms = (perf_counter() - start) * 1e3
            for request in alive:
                request.elapsed_ms += elapsed_ms
                if request.finish is not None and request not in ended:
                    ended.append(request)
            for request in ended:
                self._record(request)

    def step_for(self, request: Request) -> None:
        """Step unless this request has got a record, or has ended, while another thread stepped."""
        num_cycles = len(request.cycles)
        with self._stepping:
            if len(request.cycles) == num_cycles and not request.closed:
                self.step()

    def drop(self, request: Request) -> None:
        """End a request now, without a record; its pages are free when this returns."""
        with self._stepping:
            if not request.closed:
                self._take_in()
                self.scheduler.finish(request)
                request.closed = True

    def _take_in(self) -> None:
        """New requests line up; those that were cancelled or are overdue end."""
        with self._inbox_lock:
            arrived, self._inbox = self._inbox, []
        for request in arrived:
            self.scheduler.add(request)
        now = monotonic()
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            overdue = request.deadline is not None and now >= request.deadline
            if request.cancelled or overdue:
                request.finish = "cancelled" if request.cancelled else "deadline"
                self._record(request)

    def _run(self, chosen: list[tuple[Request, Work]]) -> list[Request]:
        """One pass and all that follows from it; returns the requests whose cycle has ended."""
        dual, runner, pool = self.runner.dual, self.runner, self.scheduler.pool
        p = join([(work.part, request.slots) for request, work in chosen], dual.device)
        hidden_RC = runner.hidden(p, pool)
        for observe in self.observers:
            observe(p, pool, hidden_RC)

        judged_rows: list[int] = []
        judged: list[Judged] = []
        for (request, work), span in zip(chosen, p.spans, strict=True):
            rows = work.part.judged
            if len(rows):
                first = len(judged_rows)
                judged_rows += [span.ar_first + row for row in rows]
                places = [span.length + work.part.offsets[row] + 1 for row in rows]
                paths = work.tree.paths_of_tokens() if work.tree.num_nodes else [[] for _ in rows]
                judged.append(Judged(request, slice(first, len(judged_rows)), places, paths))
        sure = self._sure_guesses(chosen, p)
        rows = [*judged_rows, *(row for some in sure.values() for row in some)]
        logits_RV = runner.head(hidden_RC[rows]) if rows else hidden_RC.new_empty((0, dual.vocab_size))
        own_ids = dict(
            zip((id(j.request) for j in judged), choose(logits_RV[: len(judged_rows)], judged), strict=True)
        )
        logprobs = self._logprobs(logits_RV, judged, own_ids)

        wishes: list[tuple[Request, Work, int, int]] = []
        for request, work in chosen:
            key = id(request)
            serving = settle(request, dual, work, own_ids.get(key, []), logprobs.get(key, []))
            if serving is not None:
                wishes.append((request, work, *serving))
        self._draft(chosen, p, hidden_RC, logits_RV, len(judged_rows), sure, wishes)
        ended = []
        for request, work in chosen:
            self.scheduler.keep(request)
            if end_pass(request, dual, work) or request.finish is not None:
                ended.append(request)
        return ended

    def _sure_guesses(self, chosen: list[tuple[Request, Work]], p: Pass) -> dict[int, list[int]]:
        """Rows of the pass, by request, whose guesses are projected with the AR rows.

        Of few rows all: they cost less than reading the head a second time. Of many those that are needed
        whatever stands: of blocks that are drafted alone. The others wait until it is known which block serves.
        """
        if self.runner.dual.draft_head is not None:
            return {}
        found = {}
        every = sum(len(work.block_rows) * work.num_guesses for _, work in chosen)
        few = joint_guesses(every, own_head=False) > 0
        for (request, work), span in zip(chosen, p.spans, strict=True):
            if work.block_rows and (few or not work.tree.num_nodes):
                blocks = range(len(work.block_rows))
                found[id(request)] = [
                    span.draft_first + row - work.part.num_ar for b in blocks for row in work.guess_rows(b)
                ]
        return found

    def _draft(
        self,
        chosen: list[tuple[Request, Work]],
        p: Pass,
        hidden_RC: Tensor,
        logits_RV: Tensor,
        num_judged: int,
        sure: dict[int, list[int]],
        wishes: list[tuple[Request, Work, int, int]],
    ) -> None:
        """New drafts for the requests whose text goes on from a block of this pass."""
        if not wishes:
            return
        spans = {id(request): span for (request, _), span in zip(chosen, p.spans, strict=True)}
        starts, at = {}, num_judged
        for key, some in sure.items():
            starts[key], at = at, at + len(some)
        rows: list[int] = []
        places: list[int | None] = []
        guessed = []
        for request, work, index, first in wishes:
            span = spans[id(request)]
            mine = [span.draft_first + row - work.part.num_ar for row in work.guess_rows(index, first)]
            here = slice(len(rows), len(rows) + len(mine))
            rows += mine
            start = starts.get(id(request))
            places += (
                [None] * len(mine)
                if start is None
                else range(start + index * work.num_guesses + first, start + (index + 1) * work.num_guesses)
            )
            guessed.append(Guessed(request, here, request.slots.length + 1))
        hidden_DC = hidden_RC[rows]
        missing = [i for i, place in enumerate(places) if place is None]
        if not missing:
            first_place = places[0]
            assert first_place is not None
            in_a_row = places == list(range(first_place, first_place + len(places)))
            logits_DV = logits_RV[first_place : first_place + len(places)] if in_a_row else logits_RV[places]
        elif len(missing) == len(places):
            logits_DV = self.runner.head(hidden_DC, drafts=True)
        else:
            late_V = iter(self.runner.head(hidden_DC[missing], drafts=True))
            logits_DV = torch.stack([next(late_V) if at is None else logits_RV[at] for at in places])
        for (request, work, _, first), candidates in zip(
            wishes, rank(self.runner, hidden_DC, logits_DV, guessed), strict=True
        ):
            settle_draft(request, work, candidates, first)

    def _logprobs(
        self, logits_RV: Tensor, judged: list[Judged], own_ids: dict[int, list[int]]
    ) -> dict[int, list[TokenLogprob]]:
        """By request that asked for them, of the AR view's own token after each judged row."""
        return {
            id(j.request): token_logprobs(
                logits_RV[j.rows], own_ids[id(j.request)], j.request.config.logprobs
            )
            for j in judged
            if j.request.config.logprobs is not None
        }

    def _record(self, request: Request) -> None:
        """Close a request's cycle, and the request itself where it has ended."""
        step = request.step or Step("ar" if request.token_ids else "prefill")
        if request.finish in ("cancelled", "deadline"):
            step.text += request.text.flush()[0]
        cycle = Cycle(
            index=len(request.cycles),
            kind=step.kind,
            text=step.text,
            token_ids=tuple(step.token_ids),
            is_draft=tuple(step.is_draft),
            num_drafted=step.num_drafted,
            num_accepted=sum(step.is_draft),
            num_passes=step.num_passes,
            num_rows=step.num_rows,
            elapsed_ms=request.elapsed_ms,
            finish_reason=request.finish,
            logprobs=None if request.config.logprobs is None else tuple(step.logprobs),
        )
        request.step, request.elapsed_ms = None, 0.0
        request.cycles.append(cycle)
        if request.finish is not None:
            self.scheduler.finish(request)
            request.closed = True
        if request.on_cycle is not None:
            request.on_cycle(cycle)

    def _wanted(self, request: Request) -> Work:
        if request.policy is not None:
            request.policy.among(len(self.scheduler.running))
        return wanted(request, self.runner.dual)

    def costs(self, on_measure: OnMeasure | None = None, *, greedy: bool = True) -> CostTable:
        """What passes cost on this machine, which `auto` decides by: timed once (some seconds), then kept.

        Sampled decoding has a table of its own.
        """
        with self._stepping:
            if greedy not in self._costs:
                self._costs[greedy] = pass_costs(self.runner, on_measure, greedy=greedy)
            return self._costs[greedy]

    def _num_pages(self) -> int:
        dual, most = self.runner.dual, self.config.max_slots
        if most is None:
            config = dual.base.config
            most = available_bytes(dual.device) // 5 // slot_bytes(config, dual.dtype)
            most = min(most, 32 * self.context_length)
        return max(pages_for(most), 4)

    def _policy(self, config: DecodeConfig, block_size: int) -> Policy | None:
        """What decides for `auto`; None for the fixed strategies. Times the machine where nobody has."""
        if config.strategy != "auto":
            return None
        dual = self.runner.dual
        return Policy(
            self.costs(greedy=config.sampling.greedy),
            dual.config.num_guesses(block_size),
            config.node_budget,
            config.block_budget,
            own_head=dual.draft_head is not None,
        )
