"""What a request passes before a route: each guard alone, over real connections."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from distributed_llm.api import app as api_app
from distributed_llm.api.app import guarded
from distributed_llm.api.guard import intake
from distributed_llm.api.guard.connections import Connection
from distributed_llm.api.guard.origins import own_names, refusal
from distributed_llm.common.settings import ApiSettings
from tests.api.http_server import LIMIT_S, FakeCallers, Served, rest
from tests.waiting import eventually

SMALL = ApiSettings(max_body=1024, max_requests=3, max_requests_per_key=2)
JSON = json.dumps("x" * 1022).encode()  # 1024 bytes

LIVE = "/health/live"


class Quick(Connection):
    header_timeout_s = 0.2
    max_connections = 4


class Routes:
    """Echoes bodies; holds /hold until it is let go; fails at /fail."""

    def __init__(self) -> None:
        self.held = 0
        self.left = 0
        self.go = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return
        path = scope["path"]
        if path == "/fail":
            raise ValueError(f"the prompt was {path!r}")
        if path == "/hold":
            self.held += 1
            try:
                await asyncio.to_thread(self.go.wait, LIMIT_S)
            finally:
                self.held -= 1
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            self.left += 1
            return
        await Response(body, media_type="application/json")(scope, receive, send)


@pytest.fixture(scope="module")
def routes() -> Routes:
    return Routes()


@pytest.fixture(scope="module")
def small(routes: Routes) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(intake, "BODY_TIMEOUT_S", 0.2)
        patched.setattr(api_app, "PUBLIC", frozenset({LIVE}))
        app = guarded(routes, FakeCallers(), SMALL)
        with Served(app, connection=Quick) as served:
            yield served


# ------------------------------------------------------------------------ ids, headers, faults


def test_every_response_has_an_id_which_clients_may_choose_if_it_is_harmless(small: Served) -> None:
    mine = small.ask("GET", "/", x_request_id="mine-1.2:3")
    assert mine.headers["x-request-id"] == "mine-1.2:3"
    for wrong in ("a b", "x" * 65, "\x1b[31m", "a%s{}", ""):
        told = small.ask("GET", "/", key=None, x_request_id=wrong)
        assert told.status in (400, 401)  # what is no header is no request either
        if told.status == 401:
            assert told.headers["x-request-id"].startswith("req_")
    assert (
        small.ask("GET", "/").headers["x-request-id"]
        != small.ask("GET", "/").headers["x-request-id"]
    )


def test_what_the_api_tells_is_no_page(small: Served) -> None:
    for answer in (small.ask("GET", "/"), small.ask("GET", "/", key=None)):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-store"
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert "server" not in answer.headers


def test_a_fault_is_told_by_its_id_and_its_message_is_not_logged(
    small: Served, caplog: pytest.LogCaptureFixture
) -> None:
    failed = small.ask("GET", "/fail", x_request_id="id-of-it")
    assert (failed.status, failed.code) == (500, "internal")
    assert failed.headers["x-should-retry"] == "false"
    assert "id-of-it" in failed.json()["error"]["message"]
    assert "ValueError" in caplog.text
    assert "test_guard.py" in caplog.text
    assert "the prompt was '/fail'" not in caplog.text


def test_a_request_is_one_line_without_what_it_says(
    small: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    small.ask("POST", "/secret%0d%0apath%1b[31m?q=secret", b'"secret"', x_request_id="line-1")
    small.ask("GET", "/", key="wrong-secret", x_request_id="line-2")
    small.ask("GET", LIVE, key=None, x_request_id="line-3")
    said = [record.message for record in caplog.records if "line-" in record.message]
    assert [line.split() for line in said] == [
        ["line-1", "POST", "-", "200", *said[0].split()[4:6], "key=app"],
        ["line-2", "GET", "-", "401", *said[1].split()[4:6]],
    ]
    assert said[0].split()[5] == "ms"
    assert "secret" not in caplog.text


# ------------------------------------------------------------------------ pages of others

NAMES = {"localhost", "pc", "llm.example.org"}


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "pc:80", "127.0.0.1:8000", "[::1]:8000", "10.0.0.7",
             "llm.example.org", "llm.example.org.:443"],
)  # fmt: skip
def test_our_names_and_all_addresses_are_answered(host: str) -> None:
    assert refusal(Headers({"host": host}), NAMES) is None
    assert refusal(Headers({"host": host, "origin": f"http://{host}"}), NAMES) is None
    assert refusal(Headers({"host": host, "origin": f"https://{host}"}), NAMES) is None


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:8000", "", "localhost.evil.com", "127.0.0.1.evil.com", "pc@evil",
             "localhost@127.0.0.1", "evil.com/localhost", "[::1", "pc:port", "evil.com#localhost"],
)  # fmt: skip
def test_other_names_are_refused(host: str) -> None:
    error = refusal(Headers({"host": host}), NAMES)
    assert error
    assert (error.status, error.code) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "origin",
    ["http://evil.com", "null", "http://localhost:3000", "file://", "http://pc", "http://["],
)
def test_pages_of_others_are_refused(origin: str) -> None:
    error = refusal(Headers({"host": "localhost:8000", "origin": origin}), NAMES)
    assert error
    assert (error.status, error.code) == (403, "origin_not_allowed")


def test_this_machine_has_names() -> None:
    assert {"localhost", "host.docker.internal"} < own_names()
    assert all(name == name.lower() for name in own_names())


# ------------------------------------------------------------------------ bodies


def chunked(*parts: bytes, end: bool = True) -> bytes:
    sent = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return sent + (b"0\r\n\r\n" if end else b"")


def head(*lines: str) -> bytes:
    all_lines = ("POST / HTTP/1.1", "Host: localhost", "Authorization: Bearer key",
                 "Content-Type: application/json", "Connection: close", *lines)  # fmt: skip
    return "\r\n".join((*all_lines, "", "")).encode()


def test_a_body_may_be_as_large_as_it_may(small: Served) -> None:
    assert small.ask("POST", "/", JSON).body == JSON
    answer = small.say(head("Transfer-Encoding: chunked") + chunked(JSON[:500], JSON[500:]))
    assert (answer.status, answer.body) == (200, JSON)


def test_larger_bodies_are_refused_before_they_are_read(small: Served) -> None:
    declared = small.say(head("Content-Length: 1025"))
    assert (declared.status, declared.code) == (413, "request_too_large")
    counted = small.say(head("Transfer-Encoding: chunked") + chunked(JSON, b"x", end=False))
    assert (counted.status, counted.code) == (413, "request_too_large")
    huge = small.say(head(f"Content-Length: {10**30}"))
    assert huge.status in (400, 413)


def test_ollamas_clients_need_not_say_that_they_send_json(small: Served) -> None:
    own = f"http://127.0.0.1:{small.port}"
    for kind in ("", "application/x-www-form-urlencoded"):
        assert small.ask("POST", "/api/chat", b"{}", content_type=kind).status == 200
        for page in ({"origin": own}, {"sec_fetch_site": "cross-site"}):
            answer = small.ask("POST", "/api/chat", b"{}", content_type=kind, **page)
            assert answer.status == 415


def test_bodies_that_are_no_json_are_refused(small: Served) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = small.ask("POST", "/", b"{}", content_type=kind)
        assert (answer.status, answer.code) == (415, "unsupported_media_type")
    assert small.ask("POST", "/", b"{}", content_encoding="gzip").status == 415
    for kind in ("application/json; charset=utf-8", "application/vnd.api+json", "Application/JSON"):
        assert small.ask("POST", "/", b"{}", content_type=kind).status == 200


def test_a_body_that_does_not_come_is_not_waited_for(small: Served) -> None:
    slow = small.say(head("Content-Length: 10") + b"{")
    assert slow.status == 408
    assert "did not come within 0.2 s" in slow.json()["error"]["message"]


def test_who_leaves_within_a_body_leaves_nothing(small: Served) -> None:
    with small.connect() as connection:
        connection.sendall(head("Content-Length: 10") + b"{")
    assert small.ask("POST", "/", b"{}").status == 200
    eventually(lambda: not small.server.server_state.tasks)


def test_all_bodies_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_ALL_BODIES", 1)
    routes = Routes()
    with Served(guarded(routes, FakeCallers(), SMALL)) as served:
        with served.connect() as first:
            first.sendall(b"POST /hold" + head("Content-Length: 1024")[6:] + JSON)
            eventually(lambda: routes.held)
            busy = served.ask("POST", "/", b"{}")
            assert (busy.status, busy.code) == (503, "overloaded")
            assert busy.headers["retry-after"] == "1"
            routes.go.set()
            assert b"200" in rest(first)[:20]
        assert served.ask("POST", "/", b"{}").status == 200


# ------------------------------------------------------------------------ how many at a time


@contextmanager
def held(served: Served, routes: Routes, *keys: str) -> Iterator[None]:
    """Have requests under way, one of each key, and end them well."""
    routes.go.clear()
    before = routes.held
    with ExitStack() as stack:
        every = [stack.enter_context(served.connect()) for _ in keys]
        for connection, key in zip(every, keys, strict=True):
            ask = (
                head()
                .replace(b"POST /", b"GET /hold")
                .replace(b"Bearer key", f"Bearer {key}".encode())
            )
            connection.sendall(ask)
        eventually(lambda: routes.held == before + len(keys))
        yield
        routes.go.set()
        assert all(rest(connection).startswith(b"HTTP/1.1 200") for connection in every)


def test_a_key_has_its_share_and_others_are_served(small: Served, routes: Routes) -> None:
    with held(small, routes, "key", "key"):
        over = small.ask("GET", "/")
        assert (over.status, over.code) == (429, "too_many_requests")
        assert over.json()["error"]["type"] == "rate_limit_error"
        assert over.headers["retry-after"] == "1"
        assert small.ask("GET", "/", key="other").status == 200
    assert small.ask("GET", "/").status == 200


def test_who_is_too_many_is_told_at_once_and_the_others_end_well(
    small: Served, routes: Routes
) -> None:
    with held(small, routes, "key", "key", "other"):
        began = time.monotonic()
        busy = small.ask("GET", "/", key="other")
        assert time.monotonic() - began < 0.1
        assert (busy.status, busy.code) == (503, "overloaded")
        assert busy.headers["retry-after"] == "1"
        assert small.ask("GET", LIVE, key=None).status == 200
    assert small.ask("GET", "/").status == 200


# ------------------------------------------------------------------------ connections


def test_a_header_that_does_not_come_ends_its_connection(small: Served) -> None:
    for begun in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A"):
        with small.connect() as connection:
            connection.sendall(begun)
            assert rest(connection) == b""


def test_a_second_request_that_stays_half_ends_its_connection_too(small: Served) -> None:
    ask = head().replace(b"Connection: close\r\n", b"").replace(b"POST", b"GET")
    with small.connect() as connection:
        connection.sendall(ask + ask[:20])
        assert rest(connection).startswith(b"HTTP/1.1 200")


def test_a_body_that_nobody_reads_is_not_received_for_ever(small: Served) -> None:
    kept = head("Content-Length: 100000000").replace(b"Connection: close\r\n", b"")
    with small.connect() as connection:
        connection.sendall(kept + b"x" * 1000)
        assert b"request_too_large" in rest(connection)


def test_idle_connections_make_room_for_new_ones(small: Served) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(small.connect()) for _ in range(3 * Quick.max_connections)]
        assert small.ask("GET", "/").status == 200
        assert rest(idle[0]) == b""
        eventually(lambda: len(small.server.server_state.connections) <= Quick.max_connections)


def test_small_pieces_are_sent_at_once(small: Served) -> None:
    with small.connect():
        connections = small.server.server_state.connections
        eventually(lambda: len(connections) == 1)  # those of earlier tests may just be ending
        (one,) = connections
        heard = one.transport.get_extra_info("socket")
        assert heard.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_connections_at_work_are_not_closed_for_new_ones(routes: Routes) -> None:
    class Two(Connection):
        max_connections = 2

    with (
        Served(guarded(routes, FakeCallers(), SMALL), connection=Two) as served,
        held(served, routes, "key", "key"),
    ):
        assert served.ask("GET", "/", key="other").status == 0


def test_what_is_no_http_is_refused_and_ends_its_connection(small: Served) -> None:
    for wrong in (
        b"GET /\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
        head("Transfer-Encoding: chunked") + b"zz\r\n",
    ):
        with small.connect() as connection:
            try:
                connection.sendall(wrong)
            except (BrokenPipeError, ConnectionResetError):
                continue
            told = rest(connection)
        assert told == b"" or told.startswith(b"HTTP/1.1 400"), wrong[:80]
    assert small.ask("GET", "/").status == 200


def test_headers_that_are_too_many_or_mean_two_things_are_refused(small: Served) -> None:
    assert small.say(head(*["X: y"] * 100)).status == 200
    assert small.say(head(*["X: y"] * 10_000)).status in (400, 431)
    assert small.say(head("X: " + "y" * 70_000)).status in (400, 431)
    smuggled = b"GET /hold HTTP/1.1\r\nHost: localhost\r\n\r\n"
    kept = head("Content-Length: 5", "Transfer-Encoding: chunked").replace(
        b"Connection: close", b"X: y"
    )
    answer = small.say(kept + b"0\r\n\r\n" + smuggled)
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert answer.body.count(b"HTTP/1.1") == 0, "one answer"
    assert small.ask("GET", "/", upgrade="websocket", connection="upgrade, close").status == 426


def test_half_a_request_does_not_hold_the_end_back(routes: Routes) -> None:
    served = Served(guarded(routes, FakeCallers(), SMALL), grace_s=1)
    with served:
        connection = served.connect()
        connection.sendall(head("Content-Length: 10") + b"{")
        eventually(lambda: served.server.server_state.tasks)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    connection.close()
