"""Traces: by the SDK's own exporter into memory."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from distributed_llm.api.operations import traces as traces_module
from distributed_llm.api.operations.traces import Traces, traces_of_environment
from distributed_llm.api.register import Entry
from distributed_llm.client.answers import Generation
from distributed_llm.common.errors import ConfigError
from distributed_llm.common.messages import StageTiming, Timings, Usage
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.types import LayerRange

S = 1_000_000_000


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter) -> Iterator[Traces]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = Traces(provider)
    yield traces
    traces.close()


def generation() -> Generation:
    return Generation(
        text="Hi",
        token_ids=[1, 2],
        finish_reason="stop",
        choice=0,
        logprobs=None,
        usage=Usage(prompt_tokens=7, completion_tokens=2, cached_tokens=4),
        timings=Timings(
            queued_s=0.5,
            first_token_s=1.0,
            decode_s=2.0,
            stages=(
                StageTiming(worker="pc", layers=LayerRange(0, 3), tasks=3, compute_s=1.0),
                StageTiming(worker="mac", layers=LayerRange(3, 4), tasks=3, compute_s=0.25),
            ),
        ),
        request_id="r1",
    )


def entry(**fields: object) -> Entry:
    one = Entry(id="req_1", path="/v1/chat/completions", caller="app", model="tiny")
    one.params = SamplingParams(max_new_tokens=5, temperature=0.5)
    one.started_at, one.started, one.first, one.ended = 1000.0, 50.0, 51.0, 54.0
    one.generations, one.prompt_tokens, one.completion_tokens = [generation()], 7, 2
    for name, value in fields.items():
        setattr(one, name, value)
    return one


def spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


def test_a_request_is_a_span_with_one_inside_for_each_stage(
    traces: Traces, exporter: InMemorySpanExporter
) -> None:
    traces.ended(entry())
    request, first, second = spans(exporter)
    assert (request.name, request.kind) == ("chat tiny", SpanKind.SERVER)
    assert (request.start_time, request.end_time) == (1000 * S, 1004 * S)
    told = dict(request.attributes or {})
    assert told["gen_ai.operation.name"] == "chat"
    assert told["gen_ai.request.model"] == "tiny"
    assert told["gen_ai.request.max_tokens"] == 5
    assert told["gen_ai.request.temperature"] == 0.5
    assert told["gen_ai.usage.input_tokens"] == 7
    assert told["gen_ai.usage.output_tokens"] == 2
    assert told["gen_ai.response.finish_reasons"] == ("stop",)
    assert "gen_ai.request.seed" not in told
    assert [one.parent and one.parent.span_id for one in (first, second)] == [
        request.context.span_id
    ] * 2
    assert (first.start_time, first.end_time) == (1000.5 * S, 1001.5 * S)
    assert (second.start_time, second.end_time) == (1001.5 * S, 1001.75 * S)
    assert dict(second.attributes or {}) == {
        "dllm.worker": "mac",
        "dllm.layers": "4",
        "dllm.tasks": 3,
    }


def test_a_failure_is_one(traces: Traces, exporter: InMemorySpanExporter) -> None:
    traces.ended(entry(error="no_capacity", generations=[], first=None, path="/v1/completions"))
    (span,) = spans(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes or {})["error.type"] == "no_capacity"
    assert span.name == "text_completion tiny"


def test_who_traces_the_request_sees_it_inside(
    traces: Traces, exporter: InMemorySpanExporter
) -> None:
    traces.ended(entry(parent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"))
    span = spans(exporter)[0]
    assert span.parent is not None
    assert span.parent.span_id == 0xB7AD6B7169203331
    traces.ended(entry(parent="nonsense", started_at=0.0))
    assert spans(exporter)[0].parent is None


def test_without_an_endpoint_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in traces_module._ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    assert traces_of_environment() is None
    program = (
        "import sys\n"
        "from distributed_llm.api.operations.traces import traces_of_environment\n"
        "assert traces_of_environment() is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_with_an_endpoint_spans_are_exported_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    traces = traces_of_environment()
    assert traces is not None
    traces.close()
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"distributedllm\[traces\]"):
        traces_of_environment()
