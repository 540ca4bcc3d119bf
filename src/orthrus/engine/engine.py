"""The engine: every step runs one pass that carries the rows of all requests that are ready.

Each request gets exactly the text that it would get alone. Its rows read only its own history, and its choices are
functions of its own settings, seed and tokens. Our CPU kernels compute a row identically in any pass.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from os import getpid
from secrets import randbits
from threading import Lock, RLock
from time import monotonic, perf_counter

import torch

from orthrus.base.families import context_length
from orthrus.base.memory import available_bytes
from orthrus.config import DecodeConfig
from orthrus.decoding.copies import CopyIndex
from orthrus.decoding.grammar import GrammarState
from orthrus.decoding.policy import Policy
from orthrus.decoding.prices import Prices
from orthrus.decoding.processors import LogitRules
from orthrus.decoding.stopping import StopRules, end_ids
from orthrus.engine.adaptive import compete
from orthrus.engine.costs import Costs, OnMeasure, pass_costs
from orthrus.engine.detokenize import AnswerText, Decoder
from orthrus.engine.limits import check_block_size, check_process, check_prompt, check_token_ids
from orthrus.engine.prefix import PrefixStore
from orthrus.engine.request import Request, Step, Work
from orthrus.engine.round import Observer, run_round
from orthrus.engine.scheduler import Scheduler
from orthrus.engine.work import end_pass, plain_work, wanted
from orthrus.errors import OrthrusError, UserInputError
from orthrus.model.pool import Slots, pages_for, slot_bytes
from orthrus.model.runner import Runner
from orthrus.types import Cycle


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of an engine.

    max_slots: memory for keys and values, in tokens. None takes a fifth of the free memory, for at most 32 whole
    contexts. chunk: limit on the rows of prompts in one pass. max_running: limit on running requests. reuse: keep pages
    of earlier requests for later ones with the same prefix. policy: makes the decisions of `auto`. add_round: see
    `pass_costs`.
    """

    max_slots: int | None = None
    chunk: int = 256
    max_running: int = 64
    reuse: bool = True
    policy: type[Policy] = Policy
    add_round: bool = True


LOOK_SECONDS = 0.005
"""How long a thread waits for the engine before it looks whether another one has stepped for it."""


class Engine:
    """Answers many requests at once. Thread-safe: the thread that steps holds the engine for one pass.

    observers: called after every pass; for audits, benchmarks and metrics.
    """

    def __init__(
        self, runner: Runner, config: EngineConfig | None = None, *, observers: Sequence[Observer] = ()
    ):
        self.runner = runner
        self.config = config or EngineConfig()
        self.observers = list(observers)
        self._pid = getpid()
        self._stepping, self._inbox_lock = RLock(), Lock()
        self._inbox: list[Request] = []
        self._scheduler: Scheduler | None = None
        self._costs: Costs | None = None
        self._prices: dict[bool, Prices] = {}

    @property
    def context_length(self) -> int:
        """Limit on the tokens of a request's prompt and answer together: of the model, or of the pool if smaller."""
        return min(context_length(self.runner.dual.base.config), self.scheduler.pool.num_slots)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler, which owns the requests and their pool. Created with the first request."""
        if self._scheduler is None:
            with self._stepping:
                # Another thread may have made it meanwhile.
                if self._scheduler is None:
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
        on_end: Callable[[Request], None] | None = None,
        deadline: float | None = None,
        grammar: GrammarState | None = None,
    ) -> Request:
        """Submit a request, which `step` answers. Call it from any thread.

        on_cycle: called with each record by the thread that steps. on_end: called once, after the last record, when the
        request is closed: finished, failed or dropped. Neither may raise. should_stop: gets all new token ids after
        every single token and may end the answer there. deadline: time in seconds of `time.monotonic` at which the
        request ends with the tokens it has, with finish "deadline". grammar: the start state of the config's grammar.
        Raises UserInputError for an empty prompt, a prompt as long as the context, unknown ids, a block larger than the
        view's, a config with a grammar but without its start state, and in a process that was forked after the engine
        was made.
        """
        check_process(self._pid)
        dual = self.runner.dual
        if (config.grammar is None) != (grammar is None):
            raise UserInputError("a grammar must be compiled for the model: hand in its state too.")
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
            copies=CopyIndex() if config.copies and config.strategy == "auto" else None,
            grammar=grammar,
            should_stop=should_stop,
            on_cycle=on_cycle,
            on_end=on_end,
            deadline=deadline,
        )
        request.rules.see_prompt(prompt_ids)
        if request.copies is not None:
            request.copies.extend(prompt_ids)
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
        """Run one pass for all requests that are ready, and commit the tokens that it decides.

        An error of a pass ends all requests that took part in it: it becomes their `failure`, and is raised.
        """
        with self._stepping:
            start = perf_counter()
            self._admit()
            scheduler = self.scheduler
            alive = [*scheduler.running, *scheduler.waiting]
            company = scheduler.num_sharing, scheduler.num_prompt_rows
            chosen = scheduler.next_pass(
                partial(self._wanted, company=company), partial(plain_work, dual=self.runner.dual)
            )
            try:
                chosen = compete(chosen, self.runner.dual)
                ended = self._run(chosen) if chosen else []
            except BaseException as error:
                for request, _ in chosen:
                    request.failure = error if isinstance(error, Exception) else RuntimeError("interrupted")
                    self._close(request)
                raise
            elapsed_ms = (perf_counter() - start) * 1e3
            for request in alive:
                request.elapsed_ms += elapsed_ms
                if request.finish is not None and request not in ended:
                    ended.append(request)
            errors: list[BaseException] = []
            for request in ended:
                try:
                    self._record(request)
                except BaseException as error:
                    # An interrupt in one callback must not keep other requests from ending.
                    errors.append(error)
            self._close_failed()
            if errors:
                raise errors[0]

    def step_for(self, request: Request) -> None:
        """Step, unless this request got a record or ended while another thread stepped."""
        check_process(self._pid)
        num_cycles = len(request.cycles)
        while len(request.cycles) == num_cycles and not request.closed:
            # A thread that steps takes the lock again at once. So others look from time to time whether it has stepped
            # for them.
            if self._stepping.acquire(timeout=LOOK_SECONDS):
                try:
                    if len(request.cycles) == num_cycles and not request.closed:
                        self.step()
                finally:
                    self._stepping.release()
                return

    def held(self) -> AbstractContextManager[object]:
        """A context in which no other thread runs a pass of this engine, or of another engine over the same model."""
        return self._stepping

    def drop(self, request: Request) -> None:
        """End a request now, without a record. Its pages are free when this returns."""
        with self._stepping:
            if not request.closed:
                self._admit()
                self._close(request)

    def _close(self, request: Request) -> None:
        """End a request: free its pages, and call `on_end`, once."""
        if request.closed:
            return
        self.scheduler.finish(request)
        request.closed = True
        # A caller may keep many requests that have ended. Noise alone takes megabytes of each.
        request.noise.clear()
        request.drafts = request.next_work = request.copies = request.grammar = None
        if request.on_end is not None:
            request.on_end(request)

    def _admit(self) -> None:
        """Queue new requests, and end those that were cancelled or are overdue."""
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
        """Run one pass, commit its tokens, and return the requests whose cycle has ended."""
        pool = self.scheduler.pool
        p, took = run_round(self.runner, pool, chosen, self.observers)
        is_decoding = all(work.kind != "prefill" for _, work in chosen)
        # The time of a pass with both kinds of requests fits neither table.
        kinds = {request.config.sampling.greedy for request, _ in chosen}
        prices = self._prices.get(kinds.pop()) if len(kinds) == 1 else None
        if prices is not None and is_decoding:
            prices.observe(p.num_ar_rows, p.num_rows - p.num_ar_rows, took.num_guesses, took.ms)
        ended = []
        for request, work in chosen:
            if request.failure is not None:
                continue
            self.scheduler.keep(request)
            try:
                is_over = end_pass(request, self.runner.dual, work)
            except OrthrusError as error:
                request.failure = error
                continue
            if is_over or request.finish is not None:
                ended.append(request)
        return ended

    def _record(self, request: Request) -> None:
        """Write the record of a request's cycle, and close the request if it has ended."""
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
            num_copied=step.num_copied,
            rejected_ids=tuple(step.rejected_ids),
            elapsed_ms=request.elapsed_ms,
            finish_reason=request.finish,
            logprobs=None if request.config.logprobs is None else tuple(step.logprobs),
        )
        request.step, request.elapsed_ms = None, 0.0
        request.cycles.append(cycle)
        try:
            if request.on_cycle is not None:
                request.on_cycle(cycle)
        finally:
            if request.finish is not None:
                self._close(request)

    def _close_failed(self) -> None:
        """Close requests that failed on their own. The others go on."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.failure is not None:
                self._close(request)

    def _wanted(self, request: Request, company: tuple[int, int]) -> Work | None:
        """The work of a request in the next pass, or None if it failed. company: see `Policy.among`."""
        if request.policy is not None:
            request.policy.among(*company)
        try:
            return wanted(request, self.runner.dual)
        except OrthrusError as error:
            request.failure = error
            return None

    def costs(self, on_measure: OnMeasure | None = None) -> Costs:
        """The cost tables of this machine, by which `auto` decides. They are timed once, in some seconds, and kept."""
        # Known costs need no lock, which a busy engine releases only for moments.
        if self._costs is None:
            with self._stepping:
                if self._costs is None:
                    self._costs = self._timed(on_measure)
        return self._costs

    def prices(self, *, greedy: bool) -> Prices:
        """The costs of greedy or of sampled decoding, corrected by the times observed since."""
        if greedy not in self._prices:
            costs = self.costs()
            with self._stepping:
                self._prices.setdefault(greedy, Prices(costs.greedy if greedy else costs.sampled))
        return self._prices[greedy]

    def _timed(self, on_measure: OnMeasure | None) -> Costs:
        """The cost tables from which prices start."""
        return pass_costs(self.runner, on_measure, add_round=self.config.add_round)

    def _num_pages(self) -> int:
        dual, most = self.runner.dual, self.config.max_slots
        if most is None:
            config = dual.base.config
            most = _available(dual.device) // 5 // slot_bytes(config, self.runner.kv_dtype)
            most = min(most, 32 * context_length(config))
        return max(pages_for(most), 4)

    def _policy(self, config: DecodeConfig, block_size: int) -> Policy | None:
        """The policy for `auto`, or None for the fixed strategies. Times the machine if there is no cost table yet."""
        if config.strategy != "auto":
            return None
        dual = self.runner.dual
        return self.config.policy(
            self.prices(greedy=config.sampling.greedy),
            dual.config.num_guesses(block_size),
            config.node_budget,
            config.block_budget,
            own_head=dual.draft_head is not None,
            goes_on=dual.config.goes_on,
        )


def _available(device: torch.device) -> int:
    """Free bytes on the device of the pool."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
