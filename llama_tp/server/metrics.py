"""What /metrics shows: vLLM's names behind our prefix, in a registry of our own, counted where the deltas come in.

Counters count for the life of the server, not of the ranks: theirs begin anew when they are started again.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
disable_created_metrics()       # a second line beside each counter, with the time of its birth: nobody reads it
STATES = ("loading", "ready", "restarting", "stalled", "draining", "dead")


class Metrics:
    """Args: model_name, the label of every sample; the only one that does not come from a short fixed list."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry()
        self._model = model_name
        counter, gauge, histogram = self._maker(Counter), self._maker(Gauge), self._maker(Histogram)
        self.running = gauge("num_requests_running", "Samples that the ranks compute.")
        self.waiting = gauge("num_requests_waiting", "Samples that wait for a row.")
        self.kv_use = gauge("kv_cache_usage_perc", "Part of the KV cache that running samples hold, 0 to 1.")
        self.state = gauge("server_state", "1 for the state that the server is in.", "state")
        self.last_step_age = gauge("last_step_age_seconds", "Time since the ranks were last heard.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of the prompts of requests that got their first token.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.success = counter("request_success", "Samples that ended.", "finished_reason")
        self.preemptions = counter("num_preemptions", "Times a running sample was put back into the queue.")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens of prompts that were looked for there.")
        self.steps = counter("engine_steps", "Steps that the ranks have run.")
        self.restarts = counter("rank_restarts", "Times the ranks were started again.")
        self.rejections = counter("admission_rejections", "Requests refused because of load.", "reason")
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", buckets=LATENCY_S)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a sample.", buckets=STEP_S)
        self.tpot = histogram("request_time_per_output_token_seconds", "Mean of that, a request.", buckets=STEP_S)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", buckets=LATENCY_S)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step.", buckets=LATENCY_S)
        self.prefill = histogram("request_prefill_time_seconds", "From there to the first token.", buckets=LATENCY_S)
        self.decode = histogram("request_decode_time_seconds", "From there to the end.", buckets=LATENCY_S)
        self.step_tokens = histogram("iteration_tokens_total", "Tokens, of prompts and new ones, in a step.", buckets=TOKENS)
        self.prompt_size = histogram("request_prompt_tokens", "Tokens of a prompt.", buckets=TOKENS)
        self.output_size = histogram("request_generation_tokens", "Tokens generated for a request.", buckets=TOKENS)
        self.n = histogram("request_params_n", "Samples asked for.", buckets=(1, 2, 5, 10, 20, 50, 100))
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens, where given.", buckets=TOKENS)
        self.http = Counter("http_requests", "HTTP replies.", ["handler", "method", "status"], registry=self.registry)
        self.http_s = Histogram("http_request_duration_seconds", "Until the last byte.", ["handler"], buckets=LATENCY_S,
                                registry=self.registry)

    def _maker(self, kind):
        def make(name: str, text: str, *labels: str, **options):
            made = kind(f"llama_tp:{name}", text, ["model_name", *labels], registry=self.registry, **options)
            return made if labels else made.labels(self._model)
        return make

    # ------------------------------------------------------------------------------------------ told by the desk

    def gained(self, flight, delta: dict, now: float) -> None:
        """A delta for a flight (desk.Flight) that has not taken it in yet."""
        index, n_ids = delta["index"], len(delta["ids"])
        if n_ids:
            if not flight.first_at:
                flight.first_at = now
                self.ttft.observe(now - flight.arrived)
                self.prompt_tokens.inc(len(flight.request.prompt_ids))
            elif flight.last_at[index]:
                self.itl.observe(now - flight.last_at[index])
            flight.last_at[index] = now
            self.generation_tokens.inc(n_ids)
        if delta["finish_reason"]:
            self.success.labels(self._model, delta["finish_reason"]).inc()
            if flight.n_unfinished == 1:
                self._ended(flight, n_ids, now)

    def finished(self, flight, reason: str) -> None:
        """A flight ends without having reached its end: "abort" or "error"."""
        self.success.labels(self._model, reason).inc(flight.n_unfinished)

    def _ended(self, flight, n_last: int, now: float) -> None:
        n_output, n = flight.n_output + n_last, flight.request.params.n
        first_at = flight.first_at or now                   # without a token: it ended instead of writing the first
        self.e2e.observe(now - flight.arrived)
        self.queue.observe(flight.begun_at - flight.arrived)
        self.prefill.observe(first_at - flight.begun_at)
        self.decode.observe(now - first_at)
        if n_output > n:
            self.tpot.observe((now - flight.first_at) / (n_output / n - 1))
        self.prompt_size.observe(len(flight.request.prompt_ids))
        self.output_size.observe(n_output)
        self.n.observe(n)
        if flight.request.params.max_tokens is not None:
            self.max_tokens.observe(flight.request.params.max_tokens)

    def counted(self, before: dict, after: dict, n_new: int) -> None:
        """What the ranks have counted, last time ({} of new ranks) and now, when they have written `n_new` tokens."""
        n_prefilled = after["prefill_tokens"] - before.get("prefill_tokens", 0)
        hits = after["prefix_hit_tokens"] - before.get("prefix_hit_tokens", 0)
        self.prefix_hits.inc(hits)
        self.prefix_queries.inc(hits + n_prefilled)
        if n_prefilled + n_new:
            self.step_tokens.observe(n_prefilled + n_new)
        self.preemptions.inc(after["n_preemptions"] - before.get("n_preemptions", 0))
        self.steps.inc(after["n_steps"] - before.get("n_steps", 0))

    def rejected(self, reason: str) -> None:
        self.rejections.labels(self._model, reason).inc()

    # -------------------------------------------------------------------------------------------- asked by the page

    def text(self, desk) -> bytes:
        """The page, with the gauges set from the desk (desk.Desk)."""
        self.running.set(desk.stats.get("n_running", 0))
        self.waiting.set(desk.stats.get("n_waiting", 0) if desk.stats else desk.n_samples)
        self.kv_use.set(desk.stats.get("kv_use", 0.0))
        self.last_step_age.set(time.monotonic() - desk.heard_at)
        for state in STATES:
            self.state.labels(self._model, state).set(state == desk.state)
        return generate_latest(self.registry)
