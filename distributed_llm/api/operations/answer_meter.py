"""Metrics of the answers that pass this API; the coordinator's are of all clients."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from distributed_llm.api.register import Entry

_TIMES = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_PER_TOKEN = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10, 40)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 50_000, 200_000)
_ANSWERS = (1, 2, 5, 10, 20, 64)


class AnswerMeter:
    """Hears of requests that ended.

    Args:
        registry: that the metrics are added to.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._success = Counter(
            "dllm_request_success_total",
            "Answers that were completed through this API, by why they ended.",
            ("finished_reason",),
            registry=registry,
        )
        for reason in ("stop", "length"):
            self._success.labels(reason)
        self._unfinished = Counter(
            "dllm_request_unfinished_total",
            "Requests through this API that failed or were cancelled.",
            ("state",),
            registry=registry,
        )
        for state in ("failed", "cancelled"):
            self._unfinished.labels(state)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"dllm_request_{name}", about, buckets=buckets, registry=registry)

        self._prefill = histogram(
            "prefill_time_seconds", "From admission to the first token.", _TIMES
        )
        self._decode = histogram(
            "decode_time_seconds", "From the first token of an answer to its last.", _TIMES
        )
        self._inference = histogram(
            "inference_time_seconds", "From admission to the last token.", _TIMES
        )
        self._per_token = histogram(
            "time_per_output_token_seconds", "Mean from token to token of a request.", _PER_TOKEN
        )
        self._prompt = histogram("prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._generation = histogram("generation_tokens", "Tokens of an answer.", _TOKENS)
        self._n = histogram("params_n", "Answers that a request asks for.", _ANSWERS)
        self._max_tokens = histogram(
            "params_max_tokens", "Most tokens of an answer, of requests that say it.", _TOKENS
        )

    def ended(self, entry: Entry) -> None:
        """Count a request that ended."""
        if entry.params is not None:
            self._n.observe(entry.params.n)
            if isinstance(entry.params.max_new_tokens, int):
                self._max_tokens.observe(entry.params.max_new_tokens)
        if entry.state in ("failed", "cancelled"):
            self._unfinished.labels(entry.state).inc()
        for one in entry.generations:
            self._success.labels(one.finish_reason).inc()
            self._generation.observe(one.usage.completion_tokens)
            if one.choice == 0:
                times = one.timings
                self._prompt.observe(one.usage.prompt_tokens)
                self._prefill.observe(times.first_token_s)
                self._decode.observe(times.decode_s)
                self._inference.observe(times.first_token_s + times.decode_s)
                if (followed := one.usage.completion_tokens - 1) > 0:
                    self._per_token.observe(times.decode_s / followed)


def build_info(registry: CollectorRegistry, version: str) -> None:
    """Add the metric that tells the program's version."""
    Gauge("dllm_build_info", "The API's version.", ("version",), registry=registry).labels(
        version
    ).set(1)
