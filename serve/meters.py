"""What the server counts, under vLLM's names where it has one, so that dashboards and alerts made for vLLM work as they are.

Every series carries `model_name`. What vLLM does not count begins with `r1q:`. Buckets are vLLM's, but begin lower: small models
on a laptop answer in milliseconds.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from r1q.serve.jobs import Job

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
ENDINGS = ("stop", "length", "abort", "error")
_REFUSALS = (
    400,
    401,
    403,
    404,
    413,
    429,
    500,
    503,
)  # there from the beginning, so that an alert's rate sees the first one


class Meters:
    """The series of one server, in a registry of its own."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self.running = self._gauge("vllm:num_requests_running", "Requests being answered.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests in the queue.")
        self.cache = self._gauge("vllm:kv_cache_usage_perc", "Part of the context in use by running requests, 0 to 1.")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts, those still held included.")
        self.answer_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.cache_queries = self._counter("vllm:prefix_cache_queries", "Tokens of prompts looked for in the cache.")
        self.cache_hits = self._counter("vllm:prefix_cache_hits", "Tokens of prompts found there.")
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "From arrival to first token.", _SECONDS)
        self.between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens of a request.", _BETWEEN)
        self.per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "A request's mean time for a token after its first.", _BETWEEN
        )
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to last token.", _REQUEST)
        self.queued = self._histogram("vllm:request_queue_time_seconds", "Waiting in the queue.", _REQUEST)
        self.prefill = self._histogram("vllm:request_prefill_time_seconds", "Reading the prompt.", _REQUEST)
        self.decode = self._histogram("vllm:request_decode_time_seconds", "From first to last token.", _REQUEST)
        ended = Counter(
            "vllm:request_success", "Requests ended.", ["model_name", "finished_reason"], registry=self.registry
        )
        refused = Counter(
            "r1q:requests_refused", "Requests turned away.", ["model_name", "status"], registry=self.registry
        )
        self._ended = {reason: ended.labels(model, reason) for reason in ENDINGS}
        self._refused = refused
        for status in _REFUSALS:
            refused.labels(model, str(status))

    def ended(self, job: Job, reason: str) -> None:
        """Count a request that ended: stop, length, abort (its client left) or error."""
        self._ended[reason].inc()
        if reason not in ("stop", "length"):
            return
        self.whole.observe(job.latest - job.arrived)
        self.decode.observe(job.latest - job.first)
        if job.said > 1:
            self.per_token.observe((job.latest - job.first) / (job.said - 1))

    def refused(self, status: int) -> None:
        """Count a request that was turned away with an HTTP status."""
        self._refused.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(name, about, ["model_name"], registry=self.registry).labels(self._model)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, about, ["model_name"], buckets=buckets, registry=self.registry).labels(self._model)
