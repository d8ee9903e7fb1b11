"""Requests that are under way: who sees them, and who may cancel them. And the seed's own route."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from starlette.types import Message

from distributed_llm.api.app import make_app
from distributed_llm.api.errors import ApiError
from distributed_llm.api.operations import administration
from distributed_llm.api.streaming import CANCELLED, EventStream
from distributed_llm.common.messages import Cancel, DrainWorker, WorkerDrained
from tests.api.http_server import Answer, FakeCallers, Served
from tests.fake_coordinator import FakeCoordinator, failed, finished, piece
from tests.waiting import eventually

BODY = b'{"text": "Once", "metadata": {"type": "text_generation"}}'


@dataclass
class Bench:
    fake: FakeCoordinator
    served: Served

    def process(self, body: bytes = BODY, **headers: str) -> Answer:
        return self.served.ask("POST", "/api/model/process", body, **headers)

    def requests(self, key: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.served.ask("GET", "/api/v1/requests", key=key).json()[
            "requests"
        ]
        return found

    def cancel(self, key: str, request_id: str) -> int:
        return self.served.ask("POST", f"/api/v1/requests/{request_id}/cancel", key=key).status


@pytest.fixture
def bench() -> Iterator[Bench]:
    with FakeCoordinator() as fake, Served(make_app(FakeCallers(fake.address))) as served:
        yield Bench(fake, served)


def test_a_text_is_processed_as_the_seed_says(bench: Bench) -> None:
    bench.fake.script = lambda asked: [
        piece(asked, " upon a time", 7, 8, end="stop"),
        finished(asked),
    ]
    answer = bench.process().json()
    assert answer.keys() == {"text", "processingTime", "nodeCount"}
    assert answer["text"] == " upon a time"
    assert answer["processingTime"] > 0
    assert answer["nodeCount"] == 1  # a stage that computed, by what the coordinator tells
    assert bench.process(b'{"metadata": {}}').json()["error"]["param"] == "text"


def test_one_sees_its_own_requests_and_an_admin_all(bench: Bench) -> None:
    bench.fake.script = lambda asked: [piece(asked, "a", 7, 8, end="stop"), finished(asked)]
    assert bench.process(x_request_id="mine").status == 200
    bench.fake.script = lambda asked: [failed(asked, "no_capacity")]
    assert bench.process(key="other", x_request_id="theirs").status == 503
    (own,) = bench.requests("key")
    assert own["id"] == "mine"
    assert (own["path"], own["name"], own["state"]) == ("/api/model/process", "app", "finished")
    assert (own["prompt_tokens"], own["cached_tokens"], own["completion_tokens"]) == (3, 2, 2)
    assert own["took_s"] >= own["first_token_s"] >= 0
    assert own["error"] is None
    (others,) = bench.requests("other")
    assert (others["state"], others["error"]) == ("failed", "no_capacity")
    assert [one["id"] for one in bench.requests("boss")] == ["theirs", "mine"]


def test_a_request_is_cancelled_by_whoever_asked_it_and_nobody_else(bench: Bench) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(bench.process, x_request_id="mine")
        eventually(lambda: bench.fake.requests)
        (request,) = bench.fake.requests
        assert bench.requests("key")[0]["state"] == "waiting"
        bench.fake.say(piece(request, "a", 7))
        eventually(lambda: bench.requests("key")[0]["state"] == "running")
        assert bench.cancel("other", "mine") == 404
        assert bench.cancel("key", "another") == 404
        assert not waiting.done()
        assert bench.cancel("key", "mine") == 200
        answer = waiting.result()
    assert (answer.status, answer.code) == (499, "cancelled")
    eventually(lambda: Cancel(request_id=request.request_id) in bench.fake.heard)
    assert bench.requests("key")[0]["state"] == "cancelled"
    assert bench.cancel("key", "mine") == 404


def test_a_stream_that_is_cancelled_says_so() -> None:
    sent: list[Message] = []
    closed: list[bool] = []

    async def main() -> None:
        begun = asyncio.Event()

        async def parts() -> AsyncGenerator[bytes, None]:
            try:
                yield b"one"
                await asyncio.Event().wait()
            finally:
                closed.append(True)

        async def receive() -> Message:
            await begun.wait()
            return CANCELLED

        async def send(message: Message) -> None:
            sent.append(message)
            if message.get("body") == b"one":
                begun.set()

        def on_error(error: ApiError) -> list[bytes]:
            return [json.dumps({"code": error.code}).encode()]

        await EventStream(parts(), on_error=on_error)({}, receive, send)

    asyncio.run(main())
    assert [message.get("body") for message in sent] == [
        None,
        b"one",
        b'{"code": "cancelled"}',
        b"",
    ]
    assert sent[-1]["more_body"] is False
    assert closed


def test_a_drain_is_answered_when_the_worker_has_left(bench: Bench) -> None:
    with ThreadPoolExecutor() as pool:
        draining = pool.submit(
            bench.served.ask, "POST", "/api/v1/workers/pc/drain", b"", key="boss"
        )
        eventually(lambda: DrainWorker(worker="pc") in bench.fake.heard)
        bench.fake.say(WorkerDrained(worker="pc"))
        answer = draining.result()
    assert (answer.status, answer.json()) == (200, {"worker": "pc", "state": "left"})


def test_a_drain_that_takes_long_goes_on_by_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(administration, "_DRAIN_WAIT_S", 0.01)
    answer = bench.served.ask("POST", "/api/v1/workers/pc/drain", b"", key="boss")
    assert (answer.status, answer.json()) == (202, {"worker": "pc", "state": "leaving"})


def test_a_worker_that_must_stay_is_said_to(bench: Bench) -> None:
    with ThreadPoolExecutor() as pool:
        draining = pool.submit(
            bench.served.ask, "POST", "/api/v1/workers/pc/drain", b"", key="boss"
        )
        eventually(lambda: DrainWorker(worker="pc") in bench.fake.heard)
        bench.fake.say(WorkerDrained(worker="pc", code="no_capacity", message="No room."))
        answer = draining.result()
    assert answer.status == 503
    assert answer.json()["error"]["message"] == "No room."
