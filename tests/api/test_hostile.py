"""Hostile requests, row by row, to a real API; beside each stands one that is right."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import psutil
import pytest

from distributed_llm.api.app import application, is_public, make_app
from tests.api.conftest import LIMIT_S, Api, serving_api
from tests.api.http_server import Answer, FakeCallers, rest

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def http(api: Api) -> Iterator[httpx.Client]:
    """Asks without a key."""
    with httpx.Client(base_url=api.url, timeout=LIMIT_S) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def operations() -> list[tuple[str, str]]:
    """Return method and path of all that the API does, as it describes itself."""
    paths = application(make_app(FakeCallers())).openapi()["paths"]
    found = [(method.upper(), path) for path, item in paths.items() for method in item]
    return [*found, ("GET", "/openapi.json"), ("GET", "/nothing/here"), ("POST", "/v1/nothing")]


def at(path: str) -> str:
    """Return a path with something in place of its parameters."""
    return path.replace("{", "").replace("}", "").replace(":path", "")


def chat(
    api: Api, http: httpx.Client, body: bytes, key: str = "", **headers: str
) -> httpx.Response:
    told = {"Content-Type": "application/json", **bearer(key or api.key), **headers}
    return http.post(CHAT, content=body, headers=told)


def asked(**changes: Any) -> dict[str, Any]:
    right = {"model": "default", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    return {**right, **changes}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error, whose shape is OpenAI's."""
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(answer.content) < 2048, "what is wrong is quoted in part only"
    return error


def test_what_is_right_is_answered(api: Api, http: httpx.Client) -> None:
    answer = chat(api, http, json.dumps(asked()).encode())
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 2


# ------------------------------------------------------------------------ H1, H2: keys


@pytest.mark.parametrize(("method", "path"), operations())
def test_every_route_needs_a_key(api: Api, http: httpx.Client, method: str, path: str) -> None:
    if is_public(method, path):
        assert http.request(method, path).status_code in (200, 503)
        return
    for wrong in (
        {},
        bearer("wrong"),
        {"x-api-key": "wrong"},
        {"Authorization": api.key},
        {"Authorization": f"Basic {api.key}"},
    ):
        refused = http.request(
            method, at(path), headers=wrong, json={} if method == "POST" else None
        )
        assert refused.status_code == 401, (wrong, refused.text)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]
    for query in ("api_key", "key", "access_token", "token"):
        assert http.request(method, f"{at(path)}?{query}={quote(api.key)}").status_code == 401


def test_the_word_before_a_key_may_be_written_as_one_likes(api: Api, http: httpx.Client) -> None:
    for told in (
        {"Authorization": f"bearer {api.key}"},
        {"authorization": f"BEARER  {api.key}"},
        {"X-API-Key": api.key},
    ):
        assert http.get("/v1/models", headers=told).status_code == 200, told


def test_keys_that_are_no_text_are_unknown_keys(api: Api, http: httpx.Client) -> None:
    for wrong in (b"\xff\xfe", "schlüssel".encode(), b"a.b", b".", b"%s{}", b"x" * 10_000):
        headers = [(b"Authorization", b"Bearer " + wrong)]
        assert http.get("/v1/models", headers=headers).status_code == 401, wrong[:20]


# ------------------------------------------------------------------------ H3 to H7: bodies


def test_a_body_that_is_too_large_is_not_read(api: Api, http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(80):
            yield b"x" * (1 << 16)

    for content in (b"x" * (5 << 20), chunks()):
        told = {"Content-Type": "application/json", **bearer(api.key)}
        try:
            refused = http.post(CHAT, content=content, headers=told)
        except (httpx.WriteError, httpx.ReadError):  # the connection was closed within the body
            continue
        assert refused.status_code == 413
        assert error_of(refused)["code"] == "request_too_large"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", '"1"', "true", "[]"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty"])
def test_numbers_that_are_none(api: Api, http: httpx.Client, field: str, number: str) -> None:
    body = json.dumps(asked(**{field: 0})).replace(f'"{field}": 0', f'"{field}": {number}')
    refused = chat(api, http, body.encode())
    assert refused.status_code == 400
    error = error_of(refused)
    assert error["param"] == field or "is no JSON number" in error["message"]


@pytest.mark.parametrize("number", ["-0", "1e-400", "0.0"])
def test_numbers_that_are_unusual(api: Api, http: httpx.Client, number: str) -> None:
    body = json.dumps(asked(temperature=7)).replace("7", number)
    assert chat(api, http, body.encode()).status_code == 200


@pytest.mark.parametrize(
    "text",
    ['"\\ud800"', '"a\\u0000b"',
     '"' + "\u0301" * 1000 + '"', '"\\u202e\\u2066x"', '"\\r\\n\\u001b[31m"'],
    ids=["surrogate", "NUL", "combining", "bidi", "control"],
)  # fmt: skip
def test_texts_that_are_unusual(api: Api, http: httpx.Client, text: str) -> None:
    body = json.dumps(asked()).replace('"Hi"', text)
    answer = chat(api, http, body.encode())
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert error_of(answer)["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"Hi", b"[]", b"null", b"[" * 200_000, b'{"a":' * 50_000, b"\xff\xfe{}",
     b'{"model": ' + b"9" * 5000 + b"}", b'{"model": "default", "model": "x", "messages": []}',
     b"{'model': 1}", b'{"messages": 1}' + b"{}", b"{}"],
    ids=range(13),
)  # fmt: skip
def test_bodies_that_are_no_request(api: Api, http: httpx.Client, body: bytes) -> None:
    refused = chat(api, http, body)
    assert refused.status_code == 400, refused.text
    assert error_of(refused)["type"] == "invalid_request_error"


def test_bodies_that_say_they_are_something_else(api: Api, http: httpx.Client) -> None:
    right = json.dumps(asked()).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml"):
        told = {"Content-Type": kind, **bearer(api.key)}
        refused = http.post(CHAT, content=right, headers=told)
        assert (refused.status_code, error_of(refused)["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**9),
        ("n", True),
        ("n", 0),
        ("max_tokens", -1),
        ("max_completion_tokens", 10**12),
        ("top_logprobs", 10**6),
        ("stop", ["x"] * 10_000),
        ("stop", ["x" * 100_000]),
        ("logit_bias", {str(number): 1 for number in range(100_000)}),
        ("logit_bias", {"x": 1}),
        ("temperature", -1),
        ("temperature", 1e30),
        ("seed", 2**128),
        ("frequency_penalty", 1e300),
        ("messages", []),
        ("messages", [{"role": "wizard", "content": "Hi"}]),
        ("tools", [{}]),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(
    api: Api, http: httpx.Client, field: str, value: object
) -> None:
    body = asked(logprobs=True) | {field: value}
    if field == "max_completion_tokens":
        del body["max_tokens"]
    refused = chat(api, http, json.dumps(body).encode())
    assert refused.status_code == 400, refused.text
    assert (error_of(refused)["param"] or "").startswith(field.removesuffix("s")), refused.text


# ------------------------------------------------------------------------ H8, H9: what is asked for


def test_what_is_longer_than_the_context_is_told_with_both_numbers(
    api: Api, http: httpx.Client
) -> None:
    words = [{"role": "user", "content": "a b c d e f g h " * 4000}]
    refused = chat(api, http, json.dumps(asked(messages=words)).encode())
    assert (refused.status_code, error_of(refused)["code"]) == (400, "context_length_exceeded")
    assert len([word for word in error_of(refused)["message"].split() if word[0].isdigit()]) >= 2


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "http://169.254.169.254/", "a\\b", "CON", "x" * 1_000_000, "x\n", "", "*",
     "hf.co/x/y", "file:///etc/passwd"],
    ids=range(10),
)  # fmt: skip
def test_models_that_are_not_served(api: Api, http: httpx.Client, name: str) -> None:
    before = others_connected(api)
    refused = chat(api, http, json.dumps(asked(model=name)).encode())
    assert (refused.status_code, error_of(refused)["code"]) == (404, "model_not_found")
    if len(name) < 1000:
        refused = http.get(f"/v1/models/{quote(name, safe='')}", headers=bearer(api.key))
        assert refused.status_code == 404 or name == ""
    assert others_connected(api) == before


def others_connected(api: Api) -> set[str]:
    """Return the addresses that the API's process is connected to, but for its own clients."""
    port = urlsplit(api.url).port
    every = psutil.Process(api.process.pid).net_connections("inet")
    return {
        f"{one.raddr.ip}:{one.raddr.port}"
        for one in every
        if one.raddr and one.laddr.port != port and one.raddr.ip != "127.0.0.1"
    }


# ------------------------------------------------------------------------ H15 to H17


def test_pages_of_others_change_nothing(api: Api, http: httpx.Client) -> None:
    for wrong in ({"Host": "evil.com"}, {"Origin": "http://evil.com"}, {"Origin": "null"}):
        for method in ("GET", "POST", "OPTIONS"):
            refused = http.request(method, CHAT, headers={**wrong, **bearer(api.key)})
            assert refused.status_code == 403
            assert not [name for name in refused.headers if name.startswith("access-control")]
    right = {"Origin": api.url, **bearer(api.key)}
    assert http.get("/v1/models", headers=right).status_code == 200


def test_nothing_is_changed_by_get(api: Api, http: httpx.Client) -> None:
    every = operations()
    changing = {path for method, path in every if method not in ("GET", "HEAD")}
    reading = {path for method, path in every if method == "GET"}
    for path in changing - reading:
        answer = http.get(at(path), headers=bearer(api.admin_key))
        assert answer.status_code in (404, 405), path


@pytest.mark.parametrize(
    "content",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
    ],
)
def test_what_would_have_to_be_fetched_is_refused(
    api: Api, http: httpx.Client, content: object
) -> None:
    before = others_connected(api)
    body = asked(messages=[{"role": "user", "content": [content]}])
    refused = chat(api, http, json.dumps(body).encode())
    assert refused.status_code == 400, refused.text
    assert others_connected(api) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ ''.__class__.__mro__ }}"),
        ("trust_remote_code", True),
        ("base_url", "http://169.254.169.254/"),
        ("webhook", "http://169.254.169.254/"),
    ],
)
def test_fields_that_would_change_how_it_runs_are_not_used(
    api: Api, http: httpx.Client, field: str, value: object
) -> None:
    plain = chat(api, http, json.dumps(asked(temperature=0)).encode()).json()
    answer = chat(api, http, json.dumps(asked(temperature=0, **{field: value})).encode())
    if answer.status_code == 400:
        assert error_of(answer)["param"] == field
        return
    assert field in answer.headers["x-dllm-warning"]
    assert answer.json()["choices"] == plain["choices"]


# ------------------------------------------------------------------------ H20, H22, H23


def test_neither_log_nor_command_line_has_prompts_or_keys(api: Api, http: httpx.Client) -> None:
    said = "my secret prompt \r\nINFO forged \x1b[31m %s{}"
    told = {"x-request-id": "forged%s{}", "User-Agent": "secret agent"}
    for body in (asked(messages=[{"role": "user", "content": said}]), asked(model=said), {said: 1}):
        chat(api, http, json.dumps(body).encode(), **told)
    chat(api, http, b'{"my secret prompt', **told)
    http.get(f"/my%20secret%20prompt%0d%0aforged?key={api.key}", headers=bearer(api.key))
    answer = chat(api, http, json.dumps(asked()).encode(), **{"x-request-id": "control-1"})
    assert answer.headers["x-request-id"] == "control-1"
    log = api.process.log.read_text()
    assert f"control-1 POST {CHAT} 200" in log
    for secret in ("secret", "forged", "\x1b", api.key, api.admin_key, api.key.split(".")[1]):
        assert secret not in log
    for process in psutil.process_iter(["cmdline"]):
        assert api.key not in " ".join(process.info["cmdline"] or ())


def test_nobody_sees_or_ends_the_requests_of_another_key(api: Api, http: httpx.Client) -> None:
    body = json.dumps(asked()).encode()
    mine = chat(api, http, body, **{"x-request-id": "mine-1"})
    assert mine.status_code == 200
    seen = http.get("/api/v1/requests", headers=bearer(api.key)).json()["requests"]
    assert "mine-1" in [one["id"] for one in seen]
    from distributed_llm.common.roles import Role
    from tests.api.conftest import new_key

    other = new_key(api.cluster.address, "stranger", Role.CLIENT)
    seen = http.get("/api/v1/requests", headers=bearer(other)).json()["requests"]
    assert seen == []
    refused = http.post("/api/v1/requests/mine-1/cancel", headers=bearer(other))
    assert (refused.status_code, error_of(refused)["code"]) == (404, "request_not_found")


def raw(api: Api, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", urlsplit(api.url).port or 0), LIMIT_S) as one:
        one.sendall(data)
        return rest(one)


def test_requests_that_mean_two_things(api: Api) -> None:
    key = f"Host: localhost\r\nAuthorization: Bearer {api.key}\r\n".encode()
    right = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n" + key + b"\r\n"
    assert Answer(raw(api, right)).status == 200
    for wrong, statuses in (
        (b"GET /v1/models\r\n\r\n", (400,)),
        (right[:-2] + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400,)),
        (right[:-2] + b"X: y\r\n" * 10_000 + b"\r\n", (0, 400, 431)),
        (right[:-2] + b"X: " + b"y" * (1 << 20) + b"\r\n\r\n", (0, 400, 431)),
        (right[:-2].replace(b"close", b"close, upgrade") + b"Upgrade: websocket\r\n\r\n", (426,)),
    ):
        try:
            assert Answer(raw(api, wrong)).status in statuses, wrong[:300]
        except (BrokenPipeError, ConnectionResetError):
            assert 0 in statuses
    assert Answer(raw(api, right)).status == 200


def test_afterwards_it_serves_as_before_and_is_not_much_larger(api: Api, tmp_path: Path) -> None:
    """A process of its own, whose memory no other test has shaped."""
    body = json.dumps(asked()).encode()
    with serving_api(api.cluster.address, tmp_path / "api.log") as (url, process):
        http = httpx.Client(base_url=url, timeout=LIMIT_S)
        assert chat(api, http, body).status_code == 200
        grown = psutil.Process(process.pid).memory_info().rss
        threads = [
            threading.Thread(target=lambda: [chat(api, http, b"[" * 100_000) for _ in range(5)])
            for _ in range(4)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join(LIMIT_S)
        assert chat(api, http, body).status_code == 200
        assert psutil.Process(process.pid).memory_info().rss - grown < 32 << 20
        http.close()
