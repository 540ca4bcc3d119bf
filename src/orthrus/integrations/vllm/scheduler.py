"""vLLM's scheduler, which leaves room for the block and decides how many tokens a step drafts."""

from collections import Counter
from collections.abc import Iterable
from time import perf_counter
from typing import Any, NamedTuple

from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from orthrus.integrations.vllm.adaptive import DraftPolicy, accepted
from orthrus.integrations.vllm.settings import Settings, view_config
from orthrus.integrations.vllm.versions import check_version


class _Step(NamedTuple):
    """Rows of a step's two passes, requests by how many drafts they verified, and drafts that each was asked for."""

    num_rows: int
    num_draft_rows: int
    verified: Counter[int]
    num_drafted: int


class OrthrusScheduler(Scheduler):
    """Reserves the cache slots that the block writes, and decides here, in the one process that all workers
    follow, how many tokens they draft."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_version()
        super().__init__(*args, **kwargs)
        # vLLM reserves none for a drafter of a class of its own; ours writes the anchor's and one for each mask.
        self.num_lookahead_tokens = self.num_spec_tokens + 1
        settings = Settings.of(self.vllm_config.additional_config)
        view = view_config(self.vllm_config.model_config.hf_config)
        self.policy = DraftPolicy(self.num_spec_tokens, settings.adaptive, view.goes_on)
        self._started = 0.0
        self._pending: _Step | None = None

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        # Drafts are made after a step's tokens have been returned: a step lasts until the next one begins.
        if self._pending is not None and self.running:
            self._see(self._pending, (perf_counter() - self._started) * 1e3)
        self._pending = None
        self._started = perf_counter()
        output = super().schedule(throttle_prefills)
        output.num_spec_tokens_to_schedule = self.policy.choose(len(output.num_scheduled_tokens))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        if scheduler_output.num_scheduled_tokens:
            self._pending = self._step(scheduler_output, model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _step(self, planned: SchedulerOutput, found: Any) -> _Step:
        """What the step did; what became of its drafts is noted at once."""
        scheduled = planned.num_scheduled_tokens
        sampled = found.sampled_token_ids or ()
        judged = planned.scheduled_spec_decode_tokens
        if not sampled or self._leaves_drafts_aside(scheduled):
            judged = {}
        for request_id, drafts in judged.items():
            index = found.req_id_to_index.get(request_id)
            if index is not None:
                self.policy.see_drafts(len(scheduled), *accepted(drafts, sampled[index]))
        verified = Counter(
            len(planned.scheduled_spec_decode_tokens.get(request_id, ())) for request_id in scheduled
        )
        num_drafted = planned.num_spec_tokens_to_schedule
        return _Step(
            num_rows=sum(scheduled.values()),
            num_draft_rows=sum(map(bool, sampled)) * (1 + num_drafted) if num_drafted else 0,
            verified=verified,
            num_drafted=num_drafted,
        )

    def _leaves_drafts_aside(self, request_ids: Iterable[str]) -> bool:
        """Whether nobody judges the drafts of a step with these requests: see `cpu.py`."""
        if not current_platform.is_cpu():
            return False
        requests = (self.requests.get(request_id) for request_id in request_ids)
        params = (each.sampling_params for each in requests if each is not None)
        return any(each is not None and each.sampling_type != SamplingType.GREEDY for each in params)

    def _see(self, step: _Step, ms: float) -> None:
        self.policy.see_rows(step.num_rows, step.num_draft_rows, ms)
        num_requests = step.verified.total()
        # What a choice takes is known from steps without a part of a prompt.
        if step.num_rows == sum(count * (1 + drafts) for drafts, count in step.verified.items()):
            usual, count = step.verified.most_common(1)[0]
            # Requests about to end draft fewer.
            if 4 * count >= 3 * num_requests:
                self.policy.see_step(num_requests, usual, step.num_drafted, ms)
