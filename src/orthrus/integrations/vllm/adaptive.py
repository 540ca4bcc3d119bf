"""Chooses how many tokens a cycle drafts, 0 included, from the observed acceptance and times.

A cycle commits 1 + the accepted drafts for each request. The gain of D drafts is the mean number of accepted ones.
Their cost is the time of steps that verified D drafts and drafted D more, kept by the number of requests in a step.
The choice with the best rate wins. Other choices get trials from time to time, ever more rarely while they keep losing.
With many requests a trial costs as much as many plain steps. So a trial is made if drafts with the first expected
acceptance would pay, by the times of the steps so far, and otherwise only after the longest pause. The diffusion view
reads the served model's own cache, so drafting resumes at once after any pause. None of this can change a text.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orthrus.decoding.average import Average
from orthrus.decoding.block_lengths import first_expected
from orthrus.integrations.vllm.step_times import StepTimes

RUN, PLAIN_RUN = 4, 8
"""RUN: steps of a trial. PLAIN_RUN: steps of a trial of plain decoding, which are short. The first step still verifies
older drafts, and a few more steps after a change are slow."""
RECENT = 24
"""Steps of a choice whose times are kept; see `_usual`."""
WORTH = 1.15
"""How much faster drafting must be for each token. Requests that draft end at different times. So their successors'
prompts come one by one, and the last steps of a burst carry few requests. A step's own time does not show this cost.
With four requests at a time, a seventh was measured."""
PATIENCE, MAX_PATIENCE = 48, 1536
"""Steps until the next trial of another choice; doubled, up to MAX_PATIENCE, after each trial that it loses."""
LONGER = 8
"""How often a trial may be extended because its own drafts are accepted better than earlier ones."""
MARGIN = 1.03
"""How much better another choice must be to take over."""
MEMORY = 0.99
"""Weight of the past in the averages of acceptance. It is high because many requests bring many observations."""


@dataclass(slots=True)
class _Company:
    """The state for steps of about as many requests.

    step_ms: the last times in ms, by the number of drafts. accepted: accepted drafts in the current trial.
    """

    step_ms: dict[int, deque[float]]
    current: int
    trial: int | None = None
    left: int = 0
    longer: int = 0
    patience: int = PATIENCE
    until_trial: int = PATIENCE
    next_trial: int = 0
    accepted: Average = field(default_factory=lambda: Average(0.0, num_observed=0, memory=MEMORY))


@dataclass(slots=True)
class DraftPolicy:
    """Decides for all requests of a step together.

    most: limit on the drafts of a cycle. adaptive: False means always `most` drafts. goes_on: the view's own, see
    `ViewConfig`.
    """

    most: int
    adaptive: bool = True
    goes_on: float | None = None
    choices: tuple[int, ...] = field(init=False)
    _accepted: list[Average] = field(init=False)
    _companies: dict[int, _Company] = field(default_factory=dict)
    _times: StepTimes = field(default_factory=StepTimes)

    def __post_init__(self) -> None:
        # All drafts, none, and half. The time of plain steps is learnt cheaply, so they come second.
        self.choices = tuple(dict.fromkeys((self.most, 0, (self.most + 1) // 2)))
        self._accepted = [Average(0.0, num_observed=0, memory=MEMORY) for _ in range(self.most)]

    def choose(self, num_requests: int) -> int:
        """The number of drafts for each request in the next step."""
        if not self.adaptive or num_requests == 0:
            return self.most
        company = self._company(num_requests)
        if company.trial is None:
            company.until_trial -= 1
            unknown = [c for c in self.choices if not company.step_ms[c]]
            if unknown:
                # The current choice is timed first.
                if company.current not in unknown:
                    self._try(company, unknown[0], num_requests)
            elif company.until_trial <= 0:
                others = [c for c in self.choices if c != company.current]
                company.next_trial += 1
                self._try(company, others[company.next_trial % len(others)], num_requests)
        return company.current if company.trial is None else company.trial

    def _try(self, company: _Company, choice: int, num_requests: int) -> None:
        """Begin a trial, unless it would lose even with the first expected acceptance and the least observed time.

        After the longest pause a trial is made in any case, because acceptance may be better than expected.
        """
        company.left, company.longer = RUN if choice else PLAIN_RUN, 0
        company.accepted = Average(0.0, num_observed=0, memory=MEMORY)
        ms = self._expected_ms(company, choice, num_requests)
        if choice == 0 or ms is None or company.patience == MAX_PATIENCE:
            company.trial = choice
            return
        hoped = max(self.tokens_per_cycle(choice), 1.0 + first_expected(choice, self.goes_on)) / (WORTH * ms)
        if hoped > MARGIN * max(self._rates(company).values(), default=0.0):
            company.trial = choice
        else:
            # Without a trial, the expected time is stored as the choice's time.
            company.step_ms[choice].append(ms)
            company.until_trial = company.patience = min(2 * company.patience, MAX_PATIENCE)

    def _expected_ms(self, company: _Company, choice: int, num_requests: int) -> float | None:
        """The least time of a step with so many drafts: as timed, or else estimated from its rows; None if unknown."""
        if company.step_ms[choice]:
            return min(company.step_ms[choice])
        return self._times.of_drafts(num_requests, choice)

    def see_rows(self, num_ar_rows: int, num_draft_rows: int, ms: float) -> None:
        """Record the time of a step, with or without parts of prompts."""
        if self.adaptive:
            self._times.see(num_ar_rows, num_draft_rows, ms)

    def see_drafts(self, num_requests: int, num_drafts: int, num_accepted: int) -> None:
        """Record the acceptance of one request's drafts in a step of so many requests."""
        for position in range(min(num_drafts, self.most)):
            self._accepted[position].add(float(position < num_accepted))
        company = self._company(num_requests)
        # The first step of a trial still verifies older drafts.
        if num_drafts == company.trial:
            company.accepted.add(float(num_accepted))

    def see_step(self, num_requests: int, verified: int, drafted: int, ms: float) -> None:
        """Record the time of a step in which each request verified so many drafts, and drafted so many more."""
        if not self.adaptive or num_requests == 0:
            return
        company = self._company(num_requests)
        if verified == drafted and drafted in company.step_ms:
            company.step_ms[drafted].append(ms)
        if company.trial is None:
            self._switch(company)
        if company.trial is None or drafted != company.trial:
            return
        company.left -= 1
        if company.left <= 0:
            self._judge(company)

    def tokens_per_cycle(self, num_drafts: int) -> float:
        """Tokens that a cycle commits with so many drafts, the model's own included."""
        # Each average counts a draft only if all before it are accepted, so their sum needs no products.
        return 1.0 + sum(average.value for average in self._accepted[:num_drafts])

    def rates(self, num_requests: int) -> dict[int, float]:
        """Tokens per ms and request, by number of drafts, for timed choices. With drafts, divided by `WORTH`."""
        return self._rates(self._company(num_requests))

    def _rates(self, company: _Company) -> dict[int, float]:
        timed = {c: _usual(times) for c, times in company.step_ms.items() if times}
        return {c: self._rate(c, ms) for c, ms in timed.items() if ms > 0}

    def _rate(self, choice: int, ms: float) -> float:
        return self.tokens_per_cycle(choice) / (ms * (WORTH if choice else 1.0))

    def _company(self, num_requests: int) -> _Company:
        # Powers of two: 1, 2, 3-4, 5-8, ...
        key = (num_requests - 1).bit_length()
        if key not in self._companies:
            self._companies[key] = _Company(
                {c: deque(maxlen=RECENT) for c in self.choices},
                current=self._first_choice(num_requests),
            )
        return self._companies[key]

    def _first_choice(self, num_requests: int) -> int:
        """The best choice by the times of steps with other numbers of requests; `most` drafts if these are unknown."""
        rates = {}
        for choice in self.choices:
            ms = self._times.of_drafts(num_requests, choice)
            if ms is None:
                return self.most
            rates[choice] = self._rate(choice, ms)
        return max(rates, key=rates.__getitem__)

    def _switch(self, company: _Company) -> None:
        """Switch to a choice that has become clearly better than the current one, without a trial."""
        rates = self._rates(company)
        best = max(rates, key=rates.__getitem__, default=company.current)
        if _beats(rates, best, company.current):
            company.current = best

    def _judge(self, company: _Company) -> None:
        """End a trial with the better of the two choices, and double the patience if it was lost. Or extend it."""
        trial = company.trial
        assert trial is not None, "there is no trial to judge"
        rates = self._rates(company)
        won = _beats(rates, trial, company.current)
        if not won and company.longer < LONGER and self._fares_well(company, trial, rates):
            company.left, company.longer = RUN, company.longer + 1
            return
        if won:
            company.current, company.patience = trial, PATIENCE
        else:
            company.patience = min(2 * company.patience, MAX_PATIENCE)
        company.trial, company.until_trial = None, company.patience

    def _fares_well(self, company: _Company, trial: int, rates: dict[int, float]) -> bool:
        """Whether a trial would win with the acceptance of its own drafts, without that of earlier ones."""
        if trial == 0 or trial not in rates:
            return False
        own = rates[trial] * (1.0 + company.accepted.value) / self.tokens_per_cycle(trial)
        return _beats(rates | {trial: own}, trial, company.current)


def _usual(times_ms: Iterable[float]) -> float:
    """The lower quartile, because a machine that is busy for a second slows many successive steps."""
    ascending = sorted(times_ms)
    return ascending[len(ascending) // 4]


def _beats(rates: dict[int, float], choice: int, current: int) -> bool:
    """Whether a choice is clearly better than the current one. False if one of them has not been timed."""
    return choice in rates and current in rates and rates[choice] > MARGIN * rates[current]


def accepted(drafts: Sequence[int], sampled: Sequence[int]) -> tuple[int, int]:
    """(drafts, accepted drafts) of a request's step. vLLM returns the accepted drafts and one more token."""
    num_drafts = sum(token >= 0 for token in drafts)
    return num_drafts, min(num_drafts, max(0, len(sampled) - 1))
