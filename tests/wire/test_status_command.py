"""What `dllm status` and `dllm drain` show of a cluster that a test made up."""

import json
import threading
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from distributed_llm import console
from distributed_llm.cli import app
from distributed_llm.common.errors import InvalidRequest, NotEnoughMemory
from distributed_llm.common.messages import (
    Capabilities,
    ClusterStatus,
    DrainWorker,
    EventStatus,
    WorkerDrained,
    WorkerStatus,
)
from distributed_llm.common.types import Epoch, LayerRange
from tests.fake_coordinator import FakeCoordinator
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(60)
GIB = 2**30


SERVING = EventStatus(
    number=7, kind="plan_serving", level="info", text="serving plan 3", age_s=9.0, epoch=Epoch(3)
)


def worker(name: str, **more: Any) -> WorkerStatus:
    capabilities = Capabilities(
        device="cpu",
        device_name="CPU",
        platform="",
        memory_bytes=8 * GIB,
        cores=4,
        threads=4,
        memory_bandwidth_bytes_per_s=1e10,
        flops_per_s=1e11,
    )
    known: dict[str, Any] = {
        "state": "serving",
        "note": "",
        "layers": None,
        "next_layers": None,
        "epoch": 3,
        "link": "direct",
        "capabilities": capabilities,
        "memory_used_bytes": 0,
        "kv_bytes": GIB,
        "weight_bytes": 2 * GIB,
        "tasks_done": 12345,
        "compute_s": 1.0,
        "seconds_per_token": None,
        "prediction_error": None,
        "gain": None,
        "advice": "",
        "last_heard_s": 0.1,
    }
    return WorkerStatus(name=name, **{**known, **more})


def status(*workers: WorkerStatus, **more: Any) -> ClusterStatus:
    known: dict[str, Any] = {
        "model": "Qwen/Qwen3-8B",
        "state": "serving",
        "note": "",
        "epoch": 3,
        "num_layers": 36,
        "context_length": 4096,
        "kv_tokens": 65536,
        "kv_tokens_used": 1024,
        "kv_tokens_cached": 0,
        "prefix_hit_tokens": 0,
        "preemptions": 0,
        "moves": 0,
        "move_stall_s": 0.0,
        "answers_running": 1,
        "answers_waiting": 0,
        "requests_finished": 2,
        "requests_cancelled": 0,
        "requests_failed": 0,
        "tokens_generated": 77,
        "rejected": {},
        "events": (SERVING,),
    }
    return ClusterStatus(workers=workers, **{**known, **more})


MOVING = status(
    worker(
        "gaming-pc",
        layers=LayerRange(0, 20),
        next_layers=LayerRange(0, 24),
        seconds_per_token=0.01234,
        prediction_error=0.062,
        gain=0.5,
        advice="serves 20 of 36 layers; 8.1 tokens/s with it, 5.4 without",
    ),
    worker("old-server", state="leaving", layers=LayerRange(20, 36), link=""),
    worker("pi", state="idle", link="", advice="left out: the model runs fastest on 2 others"),
    moves=3,
    move_stall_s=0.0421,
)


def dllm(coordinator: FakeCoordinator, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--coordinator", coordinator.address])


def lines_at(width: int, monkeypatch: pytest.MonkeyPatch, shown: ClusterStatus) -> list[str]:
    """Return what `dllm status` prints on a terminal of this width."""
    monkeypatch.setattr(console._out, "_width", width)
    with FakeCoordinator(status=shown) as coordinator:
        done = dllm(coordinator, "status")
    assert done.exit_code == 0
    return [line.rstrip() for line in done.stdout.splitlines()]


# ------------------------------------------------------------------ status


def test_status_says_where_layers_go_and_how_sure_the_speeds_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = lines_at(200, monkeypatch, MOVING)
    rows = {line.split()[0]: " ".join(line.split()) for line in lines[1:5]}
    assert rows == {
        "worker": "worker state plan layers link memory weights KV cache tasks speed",
        "gaming-pc": "gaming-pc serving 3 1-20 -> 1-24 direct 8.0 GiB 2.0 GiB 1.0 GiB 12,345 "
        "12.34 ms/token ±6 %",
        "old-server": "old-server leaving 3 21-36 - 8.0 GiB 2.0 GiB 1.0 GiB 12,345 -",
        "pi": "pi idle - - - 8.0 GiB 2.0 GiB 1.0 GiB 12,345 -",
    }
    assert lines[6:] == [
        "layers moved 3 times; the latest move stopped answers for 42 ms",
        "gaming-pc: serves 20 of 36 layers; 8.1 tokens/s with it, 5.4 without",
        "pi: left out: the model runs fastest on 2 others",
        "  serving plan 3",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_status_breaks_no_word_in_a_narrow_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = lines_at(width, monkeypatch, MOVING)
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    assert (
        "gaming-pc: state serving, plan 3, layers 1-20 -> 1-24, link direct, memory 8.0 GiB, "
        "weights 2.0 GiB, KV cache 1.0 GiB, tasks 12,345, speed 12.34 ms/token ±6 %"
    ) in words
    assert "the latest move stopped answers for 42 ms" in words


def test_status_of_a_cluster_whose_layers_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = status(worker("pc", layers=LayerRange(0, 36), seconds_per_token=0.5))
    lines = lines_at(200, monkeypatch, calm)
    assert lines[2].split()[-2:] == ["500.00", "ms/token"]
    assert not any("moved" in line or "->" in line for line in lines)
    moved = status(worker("pc"), moves=1, move_stall_s=1.5)
    assert any(
        "moved once" in line and "1.5 s" in line for line in lines_at(200, monkeypatch, moved)
    )


def test_status_that_goes_to_a_file_is_a_table_of_any_width() -> None:
    with FakeCoordinator(status=MOVING) as coordinator:
        lines = dllm(coordinator, "status").stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("gaming-pc ")]
    assert row.split()[1:4] == ["serving", "3", "1-20"]
    assert row.endswith("12.34 ms/token ±6 %")


def test_status_as_json_has_all_there_is() -> None:
    with FakeCoordinator(status=MOVING) as coordinator:
        done = dllm(coordinator, "status", "--json")
    assert msgspec.json.decode(done.stdout, type=ClusterStatus) == MOVING


# ------------------------------------------------------------------ drain


def drained(
    *answers: WorkerDrained, arguments: tuple[str, ...], status: ClusterStatus = MOVING
) -> Result:
    """Return what `dllm drain` does when the coordinator answers it so."""
    results = []
    with FakeCoordinator(status=status) as coordinator:
        command = threading.Thread(
            target=lambda: results.append(dllm(coordinator, "drain", *arguments))
        )
        command.start()
        eventually(lambda: coordinator.heard or results)
        if coordinator.heard:
            assert coordinator.heard == [DrainWorker(worker=arguments[0])]
            coordinator.say(*answers)
        command.join(30)
    (result,) = results
    return result


def test_drain_tells_that_the_worker_has_left() -> None:
    done = drained(WorkerDrained(worker="gaming-pc"), arguments=("gaming-pc",))
    assert (done.exit_code, done.stdout) == (0, "gaming-pc has left, and others serve its layers\n")
    assert done.stderr == "waiting until others serve layers 1-20 of gaming-pc ...\n"
    translator = msgspec.structs.replace(MOVING, encoder_layers=12)
    done = drained(WorkerDrained(worker="gaming-pc"), arguments=("gaming-pc",), status=translator)
    assert done.stderr == (
        "waiting until others serve encoder 1-12 and decoder 1-8 of gaming-pc ...\n"
    )
    idle = drained(WorkerDrained(worker="pi"), arguments=("pi",))
    assert (idle.stdout, idle.stderr) == ("pi, which had no layers, has left\n", "")


def test_drain_as_json() -> None:
    done = drained(WorkerDrained(worker="gaming-pc"), arguments=("gaming-pc", "--json"))
    layers = {"start": 0, "stop": 20}
    assert json.loads(done.stdout) == {"worker": "gaming-pc", "layers": layers}
    idle = drained(WorkerDrained(worker="pi"), arguments=("pi", "--json"))
    assert json.loads(idle.stdout) == {"worker": "pi", "layers": None}


@pytest.mark.parametrize(
    ("code", "kind"), [("invalid_request", InvalidRequest), ("not_enough_memory", NotEnoughMemory)]
)
def test_drain_fails_with_what_the_coordinator_says(code: str, kind: type[Exception]) -> None:
    refusal = WorkerDrained(worker="pc", code=code, message="It cannot.")
    done = drained(refusal, arguments=("pc",))
    assert type(done.exception) is kind
    assert str(done.exception) == "It cannot."
    assert done.stdout == ""


def test_drain_of_what_is_no_name() -> None:
    done = drained(arguments=("my pc",))
    assert type(done.exception) is InvalidRequest
