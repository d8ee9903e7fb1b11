"""What those who run a cluster ask of the API, over a real one."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from distributed_llm import DistributedClient
from tests.api.conftest import LIMIT_S, Api


@pytest.fixture
def http(api: Api) -> Iterator[httpx.Client]:
    """A client with the key of a client."""
    with httpx.Client(base_url=api.url, headers=_key(api.key), timeout=LIMIT_S) as client:
        yield client


@pytest.fixture
def admin(api: Api) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=api.url, headers=_key(api.admin_key), timeout=LIMIT_S) as client:
        yield client


def _key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_health_needs_no_key_and_is_ready_once_a_token_has_passed(api: Api) -> None:
    assert httpx.get(f"{api.url}/health/live").json() == {"status": "ok"}
    ready = httpx.get(f"{api.url}/health/ready", timeout=LIMIT_S)
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")


def test_me_says_who_asks(api: Api, http: httpx.Client, admin: httpx.Client) -> None:
    assert http.get("/api/v1/me").json() == {"name": "app", "role": "client", "model": api.model}
    assert admin.get("/api/v1/me").json()["role"] == "admin"
    assert httpx.get(f"{api.url}/api/v1/me").status_code == 401


def test_the_cluster_is_as_the_client_sees_it(api: Api, http: httpx.Client) -> None:
    told = http.get("/api/v1/cluster").json()
    with DistributedClient(api.cluster.address) as client:
        status = client.status()
    assert [one["name"] for one in told["workers"]] == [one.name for one in status.workers]
    stages = told["pipelines"][0]["stages"]
    layers = [stage["layers"] for stage in stages]
    assert layers[0]["start"] == 0
    assert layers[-1]["stop"] == told["num_layers"] == status.num_layers


def test_events_come_as_they_happen(http: httpx.Client) -> None:
    with http.stream("GET", "/api/v1/events") as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = response.iter_lines()
        assert next(lines) == "event: status"
        status = json.loads(next(lines).removeprefix("data: "))
    assert status["state"] == "serving"


def test_only_admins_change_the_cluster(http: httpx.Client) -> None:
    for method, path, body in (
        ("POST", "/api/v1/workers/pc/drain", None),
        ("GET", "/api/v1/members", None),
        ("POST", "/api/v1/tokens", {}),
        ("DELETE", "/api/v1/tokens/abc", None),
        ("DELETE", "/api/v1/machines/boss", None),
        ("POST", "/api/v1/machines/boss/readmit", None),
        ("POST", "/api/v1/keys", {"name": "x"}),
    ):
        answer = http.request(method, path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "not_allowed"), path


def test_keys_and_tokens_come_and_go(api: Api, admin: httpx.Client) -> None:
    token = admin.post("/api/v1/tokens", json={"role": "worker", "uses": None}).json()
    assert token["line"].startswith("dllm://")
    key = admin.post("/api/v1/keys", json={"name": "phone"}).json()
    assert key["role"] == "client"
    me = f"{api.url}/api/v1/me"
    assert httpx.get(me, headers=_key(key["key"])).json()["name"] == key["name"]

    found = admin.get("/api/v1/members").json()
    assert token["id"] in [one["id"] for one in found["tokens"]]
    assert key["name"] in [one["name"] for one in found["machines"]]

    assert admin.delete(f"/api/v1/tokens/{token['id']}").json() == {"id": token["id"]}
    assert admin.delete(f"/api/v1/machines/{key['name']}").json() == {"name": key["name"]}
    assert httpx.get(me, headers=_key(key["key"])).status_code == 401
    found = admin.get("/api/v1/members").json()
    assert token["id"] not in [one["id"] for one in found["tokens"]]


@pytest.mark.parametrize(
    ("body", "param"),
    [({"role": "god"}, "role"), ({"uses": 0}, "uses"), ({"lifetime_s": "1"}, "lifetime_s")],
)
def test_wrong_tokens_are_refused(admin: httpx.Client, body: Any, param: str) -> None:
    answer = admin.post("/api/v1/tokens", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_worker_that_is_none_cannot_be_drained(admin: httpx.Client) -> None:
    answer = admin.post("/api/v1/workers/nobody/drain")
    assert answer.status_code == 400
    assert "nobody" in answer.json()["error"]["message"]
