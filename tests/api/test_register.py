"""The register of requests: what it keeps, and how much."""

from typing import cast

from distributed_llm.api.callers import Caller
from distributed_llm.api.register import _KEPT, Entry, Register
from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.common.roles import Role
from distributed_llm.common.sampling_params import SamplingParams
from tests.api.test_traces import generation

BOSS = Caller("boss", Role.ADMIN, cast(AsyncDistributedClient, None))


def test_what_ended_is_heard_with_its_answers_and_kept_without() -> None:
    heard: list[tuple[str, int]] = []
    register = Register(lambda entry: heard.append((entry.id, len(entry.generations))))
    for number in range(_KEPT + 10):
        entry = Entry(id=str(number), path="/v1/completions", caller="app")
        entry.params, entry.generations = SamplingParams(), [generation()]
        register.begin(entry)
        register.end(entry, now=1.0)
        register.end(entry, now=2.0)
    assert heard == [(str(number), 1) for number in range(_KEPT + 10)]
    kept = list(register.entries(BOSS))
    assert [one.id for one in kept] == [str(number) for number in range(_KEPT + 9, 9, -1)]
    assert not [one for one in kept if one.generations or one.params]
    assert {one.ended for one in kept} == {1.0}
