"""Statuses of clusters that are made up."""

from typing import Any

from distributed_llm.common.messages import (
    Capabilities,
    ClusterStatus,
    EventStatus,
    LinkStatus,
    PipelineStatus,
    StageStatus,
    WorkerStatus,
)
from distributed_llm.common.types import Epoch, LayerRange

CAPABILITIES = Capabilities(
    device="cpu",
    device_name="a CPU",
    platform="linux",
    memory_bytes=1000,
    cores=2,
    threads=2,
    memory_bandwidth_bytes_per_s=1e10,
    flops_per_s=1e11,
)


def event(number: int, text: str = "pc joined") -> EventStatus:
    return EventStatus(
        number=number, kind="worker_joined", level="info", text=text, age_s=1.0, epoch=Epoch(0)
    )


def pipeline(epoch: int, **fields: Any) -> PipelineStatus:
    """A pipeline of two stages."""
    values: dict[str, Any] = {
        "epoch": Epoch(epoch),
        "lineage": Epoch(1),
        "state": "serving",
        "stages": (
            StageStatus(worker="pc", layers=LayerRange(0, 3), ready=True, step_s=0.01),
            StageStatus(worker="mac", layers=LayerRange(3, 4), ready=True),
        ),
        "links": (LinkStatus(sender="pc", receiver="mac", how="direct", latency_s=0.002),),
        "kv_tokens": 100,
        **fields,
    }
    return PipelineStatus(**values)


def worker(name: str, **fields: Any) -> WorkerStatus:
    values: dict[str, Any] = {
        "name": name,
        "state": "serving",
        "note": "",
        "layers": LayerRange(0, 3),
        "next_layers": None,
        "epoch": Epoch(1),
        "link": "direct",
        "capabilities": CAPABILITIES,
        "memory_used_bytes": 1,
        "kv_bytes": 2,
        "weight_bytes": 3,
        "tasks_done": 4,
        "compute_s": 5.0,
        "seconds_per_token": 0.01,
        "prediction_error": None,
        "gain": None,
        "advice": "",
        "last_heard_s": 0.5,
        **fields,
    }
    return WorkerStatus(**values)


def status(**fields: Any) -> ClusterStatus:
    values: dict[str, Any] = {
        "model": "org/tiny",
        "state": "serving",
        "note": "",
        "epoch": Epoch(1),
        "num_layers": 4,
        "context_length": 64,
        "kv_tokens": 100,
        "kv_tokens_used": 25,
        "kv_tokens_cached": 10,
        "prefix_hit_tokens": 7,
        "preemptions": 1,
        "moves": 1,
        "move_stall_s": 0.0,
        "answers_running": 2,
        "answers_waiting": 3,
        "requests_finished": 4,
        "requests_cancelled": 5,
        "requests_failed": 6,
        "tokens_generated": 70,
        "rejected": {},
        "workers": (worker("pc"), worker("mac", layers=LayerRange(3, 4))),
        "events": (event(1),),
        "pipelines": (pipeline(1),),
        **fields,
    }
    return ClusterStatus(**values)
