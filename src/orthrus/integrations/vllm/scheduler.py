"""vLLM's scheduler, which leaves room for the block and decides how many tokens a step drafts."""

from collections import Counter
from time import perf_counter
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from orthrus.integrations.vllm.adaptive import DraftPolicy, accepted
from orthrus.integrations.vllm.settings import Settings
from orthrus.integrations.vllm.versions import check_version


class OrthrusScheduler(Scheduler):
    """Reserves the cache slots that the block writes, and decides here, in the one process that all workers
    follow, how many tokens they draft."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_version()
        super().__init__(*args, **kwargs)
        # vLLM reserves none for a drafter of a class of its own; ours writes the anchor's and one for each mask.
        self.num_lookahead_tokens = self.num_spec_tokens + 1
        settings = Settings.of(self.vllm_config.additional_config)
        self.policy = DraftPolicy(self.num_spec_tokens, settings.adaptive)
        self._started = 0.0

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        output = super().schedule(throttle_prefills)
        output.num_spec_tokens_to_schedule = self.policy.choose(len(output.num_scheduled_tokens))
        self._started = perf_counter()
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        if scheduler_output.num_scheduled_tokens:
            self._learn(scheduler_output, model_runner_output, (perf_counter() - self._started) * 1e3)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _learn(self, planned: SchedulerOutput, found: Any, ms: float) -> None:
        scheduled = planned.num_scheduled_tokens
        for request_id, drafts in planned.scheduled_spec_decode_tokens.items():
            index = found.req_id_to_index.get(request_id)
            if index is not None and found.sampled_token_ids:
                self.policy.see_drafts(*accepted(drafts, found.sampled_token_ids[index]))
        num_drafted = planned.num_spec_tokens_to_schedule
        num_drafting = sum(map(bool, found.sampled_token_ids or ())) if num_drafted else 0
        self.policy.see_rows(sum(scheduled.values()), num_drafting * (1 + num_drafted), ms)
        # What a choice takes is known from steps without a part of a prompt.
        verified = Counter(
            len(planned.scheduled_spec_decode_tokens.get(request_id, ())) for request_id in scheduled
        )
        if sum(scheduled.values()) == sum(count * (1 + drafts) for drafts, count in verified.items()):
            usual, count = verified.most_common(1)[0]
            # Requests about to end draft fewer.
            if 4 * count >= 3 * len(scheduled):
                self.policy.see_step(len(scheduled), usual, num_drafted, ms)
