"""Metrics of a running server in the Prometheus format, with vLLM's names and the prefix `orthrus_`."""

from collections.abc import Iterator
from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orthrus.engine.engine import Engine
from orthrus.engine.request import Request
from orthrus.server.calls import Call

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAUGES = {
    "num_requests_running": "Answers that are being written.",
    "num_requests_waiting": "Requests that wait for others to end, or for pages of the cache.",
    "kv_cache_usage_perc": "Share of the cache's pages that answers use, from 0 to 1.",
}
"""Gauges, whose values are read from the engine when Prometheus asks for them."""


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"orthrus_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"orthrus_{name}", text, buckets=buckets, registry=self.registry)

        self.finished = counter("request_success", "Answers, by `finished_reason`.", "finished_reason")
        self.failed = counter("request_failure", "Answers that failed.")
        self.responses = counter("http_responses", "HTTP responses, by `status`.", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens written.")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens of prompts looked up in the cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens of prompts found in the cache.")
        self.preemptions = counter(
            "num_preemptions", "Times that a request was preempted: it gave its pages to others."
        )
        self.spec_steps = counter("spec_decode_num_drafts", "Cycles that verified drafts.")
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens drafted.")
        self.accepted = counter(
            "spec_decode_num_accepted_tokens",
            "Drafts accepted. Divided by the tokens drafted, they give the acceptance rate.",
        )
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos",
            "Drafts accepted, by their `position` among those of a cycle, counted from 0.",
            "position",
        )
        self.passes = counter("passes", "Passes that answers took part in.")
        self.ttft = histogram(
            "time_to_first_token_seconds", "From the arrival of a request to its first token.", _LONG
        )
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Time per token after the first token.", _SHORT
        )
        self.gaps = histogram(
            "inter_token_latency_seconds",
            "Time between two deliveries of tokens. A delivery may have several tokens.",
            _SHORT,
        )
        self.total = histogram(
            "e2e_request_latency_seconds", "From the arrival of a request to its end.", _LONG
        )
        self.queued = histogram(
            "request_queue_time_seconds", "From the arrival of a request to its first pass.", _LONG
        )

    def watch(self, engine: Engine, *others: Collector) -> None:
        """Also export the state of an engine, and the counts of other collectors."""
        for collector in (_EngineState(engine), *others):
            self.registry.register(collector)

    def ended(self, call: Call, index: int, request: Request) -> None:
        """Record an answer that has ended; called once for each."""
        now, times = monotonic(), call.times[index]
        # An answer that a limit of time kept from its first token failed too.
        if request.failure is not None or (request.finish == "deadline" and not request.token_ids):
            self.failed.inc()
        else:
            self.finished.labels(request.finish or "cancelled").inc()
        self.prompt_tokens.inc(len(request.prompt_ids))
        self.prefix_queries.inc(len(request.prompt_ids))
        self.prefix_hits.inc(request.num_cached)
        self.generation_tokens.inc(len(request.token_ids))
        self.preemptions.inc(request.num_preempted)
        for cycle in request.cycles:
            self.passes.inc(cycle.num_passes)
            if cycle.num_drafted:
                self.spec_steps.inc()
                self.drafted.inc(cycle.num_drafted)
                self.accepted.inc(cycle.num_accepted)
            for position in range(cycle.num_accepted):
                self.accepted_at.labels(str(position)).inc()
        self.total.observe(now - call.arrived)
        if request.began is not None:
            self.queued.observe(max(request.began - call.arrived, 0.0))
        if times.first is not None and times.last is not None:
            self.ttft.observe(times.first - call.arrived)
            if len(request.token_ids) > 1:
                self.tpot.observe((times.last - times.first) / (len(request.token_ids) - 1))
        for gap in times.gaps:
            self.gaps.observe(gap)

    def page(self) -> bytes:
        """The metrics in the Prometheus text format."""
        return generate_latest(self.registry)


class _EngineState(Collector):
    """Gauges of an engine, read on demand. The engine's thread goes on, so they are of about the same moment."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        scheduler = self._engine.scheduler
        # Copy the lists first, because the engine's thread may change them.
        running = list(scheduler.running)
        pages = {page for request in running for page in list(request.slots.pages)}
        values = (len(running), len(scheduler.waiting), len(pages) / scheduler.pool.num_pages)
        for (name, text), value in zip(GAUGES.items(), values, strict=True):
            yield GaugeMetricFamily(f"orthrus_{name}", text, value)
