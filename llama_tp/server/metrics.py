"""What /metrics shows: vLLM's names behind our prefix or vLLM's, in a registry of our own, counted
where the deltas come in.

Counters count for the life of the server, not of the ranks: theirs begin anew when they are started
again.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.openmetrics import exposition as openmetrics

from llama_tp.engine.request import Request

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
OPENMETRICS = openmetrics.CONTENT_TYPE_LATEST
# a second line beside each counter, with the time of its birth: nobody reads it
disable_created_metrics()
REASONS = ("stop", "length", "abort", "error")
STATES = ("loading", "ready", "restarting", "stalled", "draining", "dead")


class InFlight(Protocol):
    """What is measured of a request (request_manager.InFlightRequest); a time of 0.0 has not
    come."""

    request: Request
    arrived: float
    begun_at: float
    first_at: float
    last_at: list[float]
    outputs: list[list[int] | None]
    n_output: int
    n_longest: int

    @property
    def n_unfinished(self) -> int: ...


class Gauged(Protocol):
    """Whose state the gauges show (request_manager.RequestManager)."""

    stats: dict[str, Any]
    heard_at: float

    @property
    def n_samples(self) -> int: ...

    @property
    def state(self) -> str: ...


class Metrics:
    """The Prometheus series of one server.

    Args:
        model_name: a label of every sample; the only one that does not come from a short fixed
            list.
        prefix: "llama_tp", or "vllm" for dashboards that were made for vLLM: those look for its
            label `engine`, too, and for HTTP statuses by class.
    """

    def __init__(self, model_name: str, prefix: str = "llama_tp"):
        self.registry = CollectorRegistry()
        self._prefix, self._labels = (
            prefix,
            {"model_name": model_name} | ({"engine": "0"} if prefix == "vllm" else {}),
        )
        counter, gauge, histogram = self._maker(Counter), self._maker(Gauge), self._maker(Histogram)
        self.running = gauge("num_requests_running", "Samples that the ranks compute.")
        self.waiting = gauge("num_requests_waiting", "Samples that wait for a row.")
        self.waiting_why = gauge(
            "num_requests_waiting_by_reason", "The same, by what they wait for.", "reason"
        )
        self.kv_use = gauge(
            "kv_cache_usage_perc", "Part of the KV cache that running samples hold, 0 to 1."
        )
        self.state = gauge("server_state", "1 for the state that the server is in.", "state")
        self.last_step_age = gauge("last_step_age_seconds", "Time since the ranks were last heard.")
        self.prompt_tokens = counter(
            "prompt_tokens", "Tokens of the prompts of requests that got their first token."
        )
        self.prompt_tokens_cached = counter(
            "prompt_tokens_cached", "Tokens of prompts that the prefix cache spared."
        )
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.success = counter("request_success", "Samples that ended.", "finished_reason")
        self.preemptions = counter(
            "num_preemptions", "Times a running sample was put back into the queue."
        )
        self.prefix_hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.prefix_queries = counter(
            "prefix_cache_queries", "Tokens of prompts that were looked for there."
        )
        self.steps = counter("engine_steps", "Steps that the ranks have run.")
        self.restarts = counter("rank_restarts", "Times the ranks were started again.")
        self.rejections = counter(
            "admission_rejections", "Requests refused because of load.", "reason"
        )
        self.ttft = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", buckets=LATENCY_S
        )
        self.itl = histogram(
            "inter_token_latency_seconds", "Between two tokens of a sample.", buckets=STEP_S
        )
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean of that, a request.", buckets=STEP_S
        )
        self.e2e = histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", buckets=LATENCY_S
        )
        self.queue = histogram(
            "request_queue_time_seconds", "From arrival to the first step.", buckets=LATENCY_S
        )
        self.prefill = histogram(
            "request_prefill_time_seconds", "From there to the first token.", buckets=LATENCY_S
        )
        self.decode = histogram(
            "request_decode_time_seconds", "From there to the end.", buckets=LATENCY_S
        )
        self.inference = histogram(
            "request_inference_time_seconds", "From the first step to the end.", buckets=LATENCY_S
        )
        self.step_tokens = histogram(
            "iteration_tokens_total", "Tokens, of prompts and new ones, in a step.", buckets=TOKENS
        )
        self.prompt_size = histogram("request_prompt_tokens", "Tokens of a prompt.", buckets=TOKENS)
        self.output_size = histogram(
            "request_generation_tokens", "Tokens generated for a request.", buckets=TOKENS
        )
        self.longest = histogram(
            "request_max_num_generation_tokens",
            "Tokens of the longest of its samples.",
            buckets=TOKENS,
        )
        self.n = histogram(
            "request_params_n", "Samples asked for.", buckets=(1, 2, 5, 10, 20, 50, 100)
        )
        self.max_tokens = histogram(
            "request_params_max_tokens", "max_tokens, where given.", buckets=TOKENS
        )
        self.http = Counter(
            "http_requests",
            "HTTP replies.",
            ["handler", "method", "status"],
            registry=self.registry,
        )
        self.http_s = Histogram(
            "http_request_duration_seconds",
            "Until the last byte.",
            ["handler"],
            buckets=LATENCY_S,
            registry=self.registry,
        )
        for reason in REASONS:  # a series that begins with its first event has no rate of it
            self.success.labels(**self._labels, finished_reason=reason)

    def _maker(self, kind: Any) -> Callable[..., Any]:
        """`kind` is a class of prometheus_client's; -> what makes one, without labels of its own
        ready to be told values."""

        def make(name: str, text: str, *labels: str, **options: Any) -> Any:
            made = kind(
                f"{self._prefix}:{name}",
                text,
                [*self._labels, *labels],
                registry=self.registry,
                **options,
            )
            return made if labels else made.labels(**self._labels)

        return make

    # ------------------------------------------------------------------ told by the request manager

    def gained(self, inflight: InFlight, delta: dict[str, Any], now: float) -> None:
        """A delta for a request that has not taken it in yet."""
        index, n_ids = delta["index"], len(delta["ids"])
        if n_ids:
            if not inflight.first_at:
                inflight.first_at = now
                self.ttft.observe(now - inflight.arrived)
                self.prompt_tokens.inc(len(inflight.request.prompt_ids))
            elif inflight.last_at[index]:
                self.itl.observe(now - inflight.last_at[index])
            inflight.last_at[index] = now
            self.generation_tokens.inc(n_ids)
        if delta["finish_reason"]:
            self.success.labels(**self._labels, finished_reason=delta["finish_reason"]).inc()
            inflight.n_longest = max(inflight.n_longest, len(inflight.outputs[index] or ()) + n_ids)
            if inflight.n_unfinished == 1:
                self._ended(inflight, n_ids, now)

    def finished(self, inflight: InFlight, reason: str) -> None:
        """A request in flight ends without having reached its end: "abort" or "error"."""
        self.success.labels(**self._labels, finished_reason=reason).inc(inflight.n_unfinished)

    def _ended(self, inflight: InFlight, n_last: int, now: float) -> None:
        n_output, n = inflight.n_output + n_last, inflight.request.params.n
        first_at = (
            inflight.first_at or now
        )  # without a token: it ended instead of writing the first
        self.e2e.observe(now - inflight.arrived)
        self.queue.observe(inflight.begun_at - inflight.arrived)
        self.prefill.observe(first_at - inflight.begun_at)
        self.decode.observe(now - first_at)
        self.inference.observe(now - inflight.begun_at)
        if n_output > n:
            self.tpot.observe((now - inflight.first_at) / (n_output / n - 1))
        self.prompt_size.observe(len(inflight.request.prompt_ids))
        self.output_size.observe(n_output)
        self.longest.observe(inflight.n_longest)
        self.n.observe(n)
        if inflight.request.params.max_tokens is not None:
            self.max_tokens.observe(inflight.request.params.max_tokens)

    def counted(self, before: dict[str, Any], after: dict[str, Any], n_new: int) -> None:
        """What the ranks have counted, last time ({} of new ranks) and now, when they have written
        `n_new` tokens."""
        n_prefilled = after["prefill_tokens"] - before.get("prefill_tokens", 0)
        hits = after["prefix_hit_tokens"] - before.get("prefix_hit_tokens", 0)
        self.prefix_hits.inc(hits)
        self.prompt_tokens_cached.inc(hits)
        self.prefix_queries.inc(hits + n_prefilled)
        if n_prefilled + n_new:
            self.step_tokens.observe(n_prefilled + n_new)
        self.preemptions.inc(after["n_preemptions"] - before.get("n_preemptions", 0))
        self.steps.inc(after["n_steps"] - before.get("n_steps", 0))

    def rejected(self, reason: str) -> None:
        self.rejections.labels(**self._labels, reason=reason).inc()

    def replied(self, handler: str, method: str, status: int, seconds: float) -> None:
        """An HTTP reply has gone out."""
        told = f"{status // 100}xx" if self._prefix == "vllm" else status
        self.http.labels(handler, method, told).inc()
        self.http_s.labels(handler).observe(seconds)

    # ---------------------------------------------------------------------------- asked by the page

    def text(self, manager: Gauged, accept: str = "") -> bytes:
        """The page in the format that an Accept header asks for (`content_type`), with the gauges
        set from the request manager."""
        n_waiting = manager.stats.get("n_waiting", 0) if manager.stats else manager.n_samples
        self.running.set(manager.stats.get("n_running", 0))
        self.waiting.set(n_waiting)
        self.waiting_why.labels(**self._labels, reason="capacity").set(n_waiting)
        self.kv_use.set(manager.stats.get("kv_use", 0.0))
        self.last_step_age.set(time.monotonic() - manager.heard_at)
        for state in STATES:
            self.state.labels(**self._labels, state=state).set(state == manager.state)
        # unless told so, it writes llama_tp_ in the place of llama_tp:
        if content_type(accept) == OPENMETRICS:
            page: bytes = openmetrics.generate_latest(self.registry, escaping=openmetrics.ALLOWUTF8)
            return page
        return generate_latest(self.registry)


def content_type(accept: str) -> str:
    """OpenMetrics where an Accept header names it, as Prometheus' does; else the older text, which
    everybody reads."""
    kinds = [each.partition(";")[0].strip().lower() for each in accept.split(",")]
    return (
        OPENMETRICS
        if "application/openmetrics-text" in kinds
        else "text/plain; version=0.0.4; charset=utf-8"
    )
