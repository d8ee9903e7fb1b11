"""Whatever the API's own description allows, and what it forbids, no request makes it fail."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from distributed_llm.api.app import application, make_app
from tests.api.conftest import Api
from tests.api.http_server import LIMIT_S, FakeCallers, Served

SLOW = ("/api/v1/events", "/api/model/process")
"""Paths that stay open, or generate as much as they may."""

schema = schemathesis.openapi.from_dict(application(make_app(FakeCallers())).openapi())


LONG = ("/api/model/process",)
"""Paths that answer with as many tokens as they like, which takes a while."""

OPERATIONS = [one.ok() for one in schema.get_all_operations() if isinstance(one, Ok)]


WITHOUT_ANSWERS = [
    one
    for one in OPERATIONS
    if one.path in ("/api/v1/tokens", "/api/v1/keys", "/api/model/process")
]


def try_many(operation: Any, url: str, key: str, fails: Callable[[int], bool]) -> None:
    """Send requests that an operation allows, and what is nearly that."""

    @settings(
        max_examples=1 if operation.path in LONG else 8,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(
        case=operation.as_strategy()
        | operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    )
    def ask(case: Any) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        answer = case.call(base_url=url, headers=headers, timeout=LIMIT_S)
        assert not fails(answer.status_code), answer.text

    ask()


@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.path not in SLOW], ids=lambda one: one.label
)
def test_no_request_makes_it_fail(operation: Any, api: Api) -> None:
    try_many(operation, api.url, api.key, lambda status: status >= 500)


@pytest.fixture(scope="module")
def without_coordinator() -> Iterator[Served]:
    with Served(make_app(FakeCallers(connect_timeout_s=0.01))) as served:
        yield served


@pytest.mark.parametrize("operation", WITHOUT_ANSWERS, ids=lambda one: one.label)
def test_without_a_coordinator_none_does(operation: Any, without_coordinator: Served) -> None:
    try_many(operation, without_coordinator.url, "boss", lambda status: status == 500)
