"""Traces of requests for OpenTelemetry: a span each, with one inside for each stage.

The extra `traces` has what it needs; none of it is imported unless an endpoint is set.
"""

import os
from typing import TYPE_CHECKING, Any

from distributed_llm.api.register import Entry
from distributed_llm.client.answers import Generation
from distributed_llm.common.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_NS = 1_000_000_000

_CHATS = ("/v1/chat/", "/v1/messages", "/v1/responses", "/api/chat")


class Traces:
    """Makes the spans of requests that ended. Prompts and answers are not in them.

    A stage's span is as long as it computed for the request, and begins where the stage before it
    ends: it shows how much of the time each machine needed, not when it was at work.

    Args:
        provider: that exports the spans.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("distributed_llm")

    def ended(self, entry: Entry) -> None:
        """Trace a request that ended."""
        from opentelemetry import trace

        assert entry.ended is not None
        begin = round(entry.started_at * _NS)
        operation = "chat" if entry.path.startswith(_CHATS) else "text_completion"
        span = self._tracer.start_span(
            f"{operation} {entry.model}",
            context=_context(entry.parent),
            kind=trace.SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, **_attributes(entry)},
            start_time=begin,
        )
        if entry.state in ("failed", "cancelled"):
            why = entry.error or entry.state
            span.set_attribute("error.type", why)
            span.set_status(trace.StatusCode.ERROR, why)
        inside = trace.set_span_in_context(span)
        for generation in entry.generations:
            if generation.choice == 0:
                self._stages(generation, begin, inside)
        span.end(begin + round((entry.ended - entry.started) * _NS))

    def close(self) -> None:
        """Export what was not yet; takes as long as the endpoint lets it."""
        self._provider.shutdown()

    def _stages(self, generation: Generation, begin: int, inside: "Context") -> None:
        at = begin + round(generation.timings.queued_s * _NS)
        for number, stage in enumerate(generation.timings.stages):
            span = self._tracer.start_span(
                f"stage {number + 1}: {stage.worker}",
                context=inside,
                attributes={
                    "dllm.worker": stage.worker,
                    "dllm.layers": str(stage.layers),
                    "dllm.tasks": stage.tasks,
                },
                start_time=at,
            )
            at += round(stage.compute_s * _NS)
            span.end(at)


def traces_of_environment() -> Traces | None:
    """Return traces that are exported by OTLP to where the environment says; None if nowhere.

    Raises:
        ConfigError: it says where, and the extra `traces` is not installed.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise ConfigError(
            f"{_ENDPOINTS[0]} asks for traces, and what they need is not installed ({exc}). "
            "Install it with `pip install 'distributedllm[traces]'`, or unset the variable."
        ) from exc
    named = "OTEL_SERVICE_NAME" in os.environ
    provider = TracerProvider(
        resource=Resource.create({} if named else {"service.name": "dllm-api"}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Traces(provider)


def _context(parent: str) -> "Context | None":
    """Return the context of whoever traces the request, by its header; None for nobody."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None


def _attributes(entry: Entry) -> dict[str, Any]:
    """Return what the conventions for generative AI have names for."""
    params = entry.params
    found = {
        "gen_ai.provider.name": "distributed_llm",
        "gen_ai.request.model": entry.model,
        "gen_ai.response.model": entry.model,
        "gen_ai.response.id": entry.id,
        "gen_ai.response.finish_reasons": [one.finish_reason for one in entry.generations],
        "gen_ai.usage.input_tokens": entry.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": entry.cached_tokens,
        "gen_ai.usage.output_tokens": entry.completion_tokens,
        "dllm.key": entry.caller,
        "url.path": entry.path,
    }
    if entry.first is not None:
        found["gen_ai.response.time_to_first_chunk"] = entry.first - entry.started
    if params is not None:
        asked = {
            "choice.count": params.n,
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": params.seed,
            "stop_sequences": list(params.stop_strings) or None,
            "presence_penalty": params.presence_penalty or None,
            "frequency_penalty": params.frequency_penalty or None,
        }
        found |= {f"gen_ai.request.{name}": one for name, one in asked.items() if one is not None}
    return found
