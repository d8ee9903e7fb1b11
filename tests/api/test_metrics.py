"""Metrics: what is exported, that labels are closed sets, and that nothing asks for others."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from fastapi import FastAPI, HTTPException
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message

from distributed_llm.api.operations.cluster_metrics import families
from distributed_llm.api.operations.http_meter import HttpMeter
from distributed_llm.api.operations.metrics import ClusterCollector
from distributed_llm.common.messages import Counters, Histogram, Latencies
from tests.api.conftest import LIMIT_S, Api
from tests.api.statuses import pipeline, status, worker

DEPLOY = Path(__file__).parents[2] / "deploy"

_NAME = re.compile(r"\b(?:dllm|http)_[a-z0-9_]+\b")


def scrape(api: Api) -> str:
    headers = {"Authorization": f"Bearer {api.key}"}
    answer = httpx.get(f"{api.url}/metrics", headers=headers, timeout=LIMIT_S)
    assert answer.status_code == 200
    return answer.text


def of_status(**fields: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families(status(**fields))
        for sample in family.samples
    }


def value(found: Any, name: str, **labels: str) -> float:
    number: float = found[name, frozenset(labels.items())]
    return number


def test_a_status_in_numbers() -> None:
    found = of_status(
        counters=Counters(replans={"recovery": 2}, retries={"step_lost": 3}, prompt_tokens=9),
        rejected={"stale_epoch": 4, "not_allowed": 5},
        workers=(worker("pc"), worker("mac", state="unfit")),
        pipelines=(pipeline(1), pipeline(2, state="loading", stages=(), links=())),
    )
    assert value(found, "dllm_num_requests_running", model_name="org/tiny") == 2
    assert value(found, "dllm_num_requests_waiting", model_name="org/tiny") == 3
    assert value(found, "dllm_kv_cache_usage_perc", model_name="org/tiny") == 0.25
    assert value(found, "dllm_generation_tokens_total", model_name="org/tiny") == 70
    assert value(found, "dllm_replans_total", reason="recovery") == 2
    assert value(found, "dllm_task_retries_total", reason="step_lost") == 3
    assert value(found, "dllm_late_results_total") == 4
    assert value(found, "dllm_auth_failures_total") == 5
    assert value(found, "dllm_worker_up", worker="pc") == 1
    assert value(found, "dllm_worker_up", worker="mac") == 0
    assert value(found, "dllm_worker_step_seconds", worker="pc", phase="compute") == 0.01
    assert value(found, "dllm_link_rtt_seconds", sender="pc", receiver="mac") == 0.004


def test_without_attention_no_positions_are_told() -> None:
    """What is kept of texts has no positions, and room for it is counted in texts and bytes."""
    found = of_status(kv_tokens=10**9, kv_tokens_used=10**8, most_texts=1000)
    names = {name for name, _ in found}
    assert value(found, "dllm_most_texts") == 1000
    assert value(found, "dllm_state_bytes") == 10**9
    assert value(found, "dllm_kv_cache_usage_perc", model_name="org/tiny") == 0.1
    assert not {"dllm_kv_cache_tokens", "dllm_kv_cache_prefix_tokens"} & names


def test_histograms_are_cumulative() -> None:
    times = Histogram(bounds_s=(0.1, 1.0), counts=(1, 2, 3), sum_s=40.0)
    found = of_status(latencies=Latencies(first_token=times))
    buckets = [
        value(found, "dllm_time_to_first_token_seconds_bucket", model_name="org/tiny", le=le)
        for le in ("0.1", "1.0", "+Inf")
    ]
    assert buckets == [1, 3, 6]
    assert value(found, "dllm_time_to_first_token_seconds_sum", model_name="org/tiny") == 40.0
    assert value(found, "dllm_time_to_first_token_seconds_count", model_name="org/tiny") == 6


def test_without_a_coordinator_that_is_told() -> None:
    registry = CollectorRegistry()
    registry.register(ClusterCollector())
    assert registry.get_sample_value("dllm_coordinator_up") == 0


def test_metrics_need_a_key(api: Api) -> None:
    assert httpx.get(f"{api.url}/metrics").status_code == 401


def test_what_clients_send_makes_no_series() -> None:
    registry = CollectorRegistry()
    app = FastAPI(openapi_url=None)

    @app.get("/v1/models/{name}")
    async def model(name: str) -> None:
        raise HTTPException(404)

    metered = HttpMeter(app, registry)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        pass

    async def ask(method: str, path: str) -> None:
        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
        await metered(scope, receive, send)

    async def main() -> None:
        for number in range(1000):
            await ask("GET", f"/v1/models/bogus-{number}")
            await ask("GET", f"/bogus/{number}")
            await ask(f"BOGUS{number}", "/")

    asyncio.run(main())
    counted = {
        tuple(sample.labels.values()): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "http_requests_total"
    }
    assert counted == {
        ("/v1/models/{name}", "GET", "404"): 1000,
        ("none", "GET", "404"): 1000,
        ("none", "other", "404"): 1000,
    }


def expressions() -> Iterator[str]:
    for panel in json.loads((DEPLOY / "grafana" / "dllm.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["expr"]


def test_every_name_in_the_dashboard_and_the_alerts_is_exported(api: Api) -> None:
    told = {family.name: family for family in text_string_to_metric_families(scrape(api))}
    names = {name for text in expressions() for name in _NAME.findall(text)}
    assert len(names) > 30
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    exported = {
        name + suffix for name, family in told.items() for suffix in suffixes.get(family.type, ())
    }
    assert names <= exported


def test_alerts_and_scraping_are_wired_together() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for name in config["rule_files"]:
        assert (DEPLOY / "prometheus" / name).exists()


_OF_VLLM = """
num_requests_running
num_requests_waiting
kv_cache_usage_perc
prefix_cache_queries
prefix_cache_hits
num_preemptions
prompt_tokens
generation_tokens
request_success
time_to_first_token_seconds
inter_token_latency_seconds
request_time_per_output_token_seconds
e2e_request_latency_seconds
request_queue_time_seconds
request_prefill_time_seconds
request_decode_time_seconds
request_inference_time_seconds
request_prompt_tokens
request_generation_tokens
request_params_n
request_params_max_tokens
worker_last_progress_seconds
plan_version
requests_recovered
build_info
"""


def test_the_names_of_vllm_are_there(api: Api) -> None:
    told = {family.name for family in text_string_to_metric_families(scrape(api))}
    assert {f"dllm_{name}" for name in _OF_VLLM.split()} <= told
