"""What becomes of the API while its coordinator is away, and how it ends."""

import asyncio
import logging
import os
import signal
import subprocess
import sys

import httpx
import pytest

from distributed_llm.api.watching import watch
from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.common.keyring import Keyring, state_folder, text_of_key
from tests.api.http_server import LIMIT_S, NOBODY
from tests.fake_coordinator import FakeCoordinator
from tests.fault_proxy import FaultProxy
from tests.waiting import eventually


def test_it_says_when_the_coordinator_goes_and_comes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    said = [record.message for record in caplog.records]

    def hears(text: str, times: int = 1) -> bool:
        said[:] = [record.message for record in caplog.records]
        return sum(text in line for line in said) == times

    async def soon(text: str, times: int = 1) -> None:
        await asyncio.to_thread(eventually, lambda: hears(text, times), limit_s=LIMIT_S)

    async def check() -> None:
        with FakeCoordinator() as fake, FaultProxy(fake.address) as proxy:
            key = text_of_key(Keyring(state_folder()).login(fake.address))
            client = AsyncDistributedClient(proxy.address, key=key, connect_timeout_s=0.2)
            watching = asyncio.get_running_loop().create_task(watch(client, proxy.address, 0.01))
            await soon(f"looking for the coordinator at {proxy.address}")
            await soon("serves fake")
            proxy.refuse()
            proxy.cut()
            await soon("requests get 503 until there is a coordinator")
            proxy.heal()
            await soon("serves fake", times=2)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await client.close()

    asyncio.run(check())
    assert len(said) == 4, said


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM for children")
def test_without_a_coordinator_it_serves_what_it_can_and_ends_when_told() -> None:
    binds = ["--bind", "127.0.0.1:0", "--bind", "127.0.0.1:0"]
    with subprocess.Popen(
        [sys.executable, "-m", "distributed_llm", "api", "--coordinator", NOBODY, *binds, "--open"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DLLM_CLIENT__CONNECT_TIMEOUT_S": "0.1"},
    ) as process:
        try:
            assert process.stdout
            assert process.stderr
            urls = [process.stdout.readline().strip() for _ in range(2)]
            assert len({*urls}) == 2
            for url in urls:
                refused = httpx.get(f"{url}/v1/models", headers={"x-request-id": "which"})
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "coordinator_unreachable"
                assert refused.headers["retry-after"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) == 0
            said = process.stderr.read()
        finally:
            process.kill()
    assert f"looking for the coordinator at {NOBODY}" in said
    assert "which GET - 503" in said or "which GET /v1/models 503" in said
    assert "Traceback" not in said
