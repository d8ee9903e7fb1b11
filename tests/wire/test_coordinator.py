"""A real coordinator of the built-in model, in the event loop of the test."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from distributed_llm import AsyncDistributedClient, CoordinatorLost
from distributed_llm.common import codec
from distributed_llm.common.errors import LocalProtocolError
from distributed_llm.common.messages import StatusReport
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.coordinator.serve import open_to_serve, serve
from tests.wire.test_transport import on_loop

pytestmark = pytest.mark.timeout(60)


ON_LOOPBACK = CoordinatorSettings(bind="127.0.0.1:0")


@asynccontextmanager
async def coordinator(**settings_of_core: Any) -> AsyncIterator[str]:
    """Yield the address of a coordinator."""
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = CoordinatorSettings.model_validate({"bind": "127.0.0.1:0", **settings_of_core})
    opened = open_to_serve(settings)
    serving = asyncio.create_task(serve(settings, *opened, on_listening=listening.set_result))
    try:
        await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
        yield listening.result()
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@on_loop
async def test_a_message_that_cannot_be_sent_ends_one_session_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = codec.encode

    def too_long(message: Any, tensors: Sequence[Any] = ()) -> Any:
        if isinstance(message, StatusReport):
            raise LocalProtocolError("header of 65537 bytes in StatusReport")
        return encode(message, tensors)

    async with (
        coordinator() as address,
        AsyncDistributedClient(address) as one,
        AsyncDistributedClient(address) as other,
    ):
        await other.status()
        session = other._session
        with monkeypatch.context() as patched:
            patched.setattr(codec, "encode", too_long)
            with pytest.raises(CoordinatorLost):
                await one.status()
        await other.status()
        assert other._session is session
