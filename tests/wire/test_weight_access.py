"""Who gets weights: workers and admins of the coordinator, and of workers those it names."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from distributed_llm.common import codec
from distributed_llm.common.keyring import state_folder
from distributed_llm.common.keys import KeyPair
from distributed_llm.common.messages import (
    DigestsReport,
    GetDigests,
    GetModel,
    GiveWeights,
    ModelReport,
    ModelSource,
    NoChunk,
    ReadChunk,
    Refused,
    ToReader,
    WeightRequest,
    WorkerHello,
)
from distributed_llm.common.model_names import fingerprints, resolve_for_coordinator
from distributed_llm.common.roles import Role
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.transport import Dealer, Login, Rejection, new_key_pair
from distributed_llm.common.types import LayerRange
from distributed_llm.coordinator.inspect_model import served_model
from distributed_llm.coordinator.service import Coordinator
from distributed_llm.coordinator.trust.store import Trust
from tests.weights import library_of
from tests.wire.test_transport import Inbox, on_loop
from tests.wire.test_worker import KEYS, cluster, load

pytestmark = pytest.mark.timeout(60)
SOURCE = ModelSource(kind="builtin", name="")
SHA256 = "0" * 64
REQUESTS: tuple[WeightRequest, ...] = (
    GetModel(source=SOURCE),
    GetDigests(source=SOURCE, layers=LayerRange(0, 1)),
    ReadChunk(sha256=SHA256, offset=0, length=1),
)


class Asking:
    """A connection, and what came over it."""

    def __init__(self, address: str, login: Login) -> None:
        self.heard, self.connects, self.rejections = Inbox(), Inbox(), Inbox()
        self.dealer = Dealer(
            address,
            lambda frames: self.heard.put(codec.to_reader.decode(frames)[0]),
            self.connects.put,
            lambda: None,
            login=login,
            on_rejected=self.rejections.put,
        )

    async def ask(self, request: WeightRequest) -> ToReader:
        """Return the answer."""
        count = len(self.heard)
        self.dealer.send(codec.encode(request))
        await self.heard.until(count + 1)
        (answer,) = self.heard[count]
        return answer  # type: ignore[no-any-return]


@contextmanager
def asking(address: str, login: Login) -> Iterator[Asking]:
    made = Asking(address, login)
    try:
        yield made
    finally:
        made.dealer.close(linger_ms=0)


@asynccontextmanager
async def coordinator(
    roles: dict[Role, KeyPair], token: KeyPair
) -> AsyncIterator[tuple[str, Trust]]:
    """Yield the address of a coordinator of the built-in model, where these keys are enrolled."""
    settings = CoordinatorSettings(bind="127.0.0.1:0")
    source, checkpoint = resolve_for_coordinator("")
    prints = fingerprints(source, checkpoint, LayerRange(0, checkpoint.num_layers))
    trust, now = Trust(state_folder(), 0, now=time.time()), time.time()
    for role, keys in roles.items():
        used = new_key_pair().public
        trust.members.create_token(used, role, uses=1, lifetime_s=None, now=now)
        trust.members.enrol(used, keys.public, role.value, now=now)
    trust.members.create_token(token.public, Role.WORKER, uses=None, lifetime_s=None, now=now)
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    service = Coordinator(
        served_model(source, checkpoint, settings, prints),
        checkpoint.folder,
        settings,
        bind="127.0.0.1:0",
        on_listening=listening.set_result,
        trust=trust,
        library=library_of(source, checkpoint),
    )
    serving = asyncio.create_task(service.run())
    try:
        await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
        yield listening.result(), trust
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        trust.close()


@on_loop
async def test_the_coordinator_gives_weights_to_workers_and_admins_only() -> None:
    roles = {role: new_key_pair() for role in Role}
    token = new_key_pair()
    async with coordinator(roles, token) as (address, trust):
        server = trust.door.keys.public
        for role, keys in [*roles.items(), (None, token)]:
            with asking(address, Login(server, keys)) as connection:
                answers = [await connection.ask(request) for request in REQUESTS]
                if role in (Role.WORKER, Role.ADMIN):
                    assert [type(one) for one in answers] == [ModelReport, DigestsReport, NoChunk]
                    assert answers[2] == NoChunk(sha256=SHA256, offset=0, reason="absent")
                else:
                    assert [type(one) for one in answers] == [Refused] * 3
        with asking(address, Login(server, new_key_pair())) as stranger:
            stranger.dealer.send(codec.encode(REQUESTS[0]))
            await stranger.rejections.until(1)
            assert stranger.rejections == [(Rejection.OUR_KEY,)]
            assert not stranger.heard


@on_loop
async def test_a_worker_gives_weights_to_those_that_the_coordinator_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with cluster(monkeypatch) as boss:
        await load(boss, 1)  # so that "a" may send tasks to "b", by its key
        (address,) = boss.messages_of("b", WorkerHello)[0].peer_addresses
        reader = new_key_pair()
        ask = ReadChunk(sha256=SHA256, offset=0, length=1)
        with asking(address, Login(KEYS.public, reader)) as early:
            await early.rejections.until(1)  # nobody has named it
        with asking(address, Login(KEYS.public, KEYS)) as sender:
            boss.say("b", GiveWeights(readers=(reader.public,)))
            await sender.connects.until(1)
            sender.dealer.send(codec.encode(ask))
            await _admitted(address, reader, ask)
            assert not sender.heard, "who only sends tasks gets no weights"
        with asking(address, Login(KEYS.public, reader)) as named:
            assert await named.ask(ask) == NoChunk(sha256=SHA256, offset=0, reason="absent")
            boss.say("b", GiveWeights(readers=(KEYS.public,)))
            await _admitted(address, KEYS, ask)  # it has been heard
            named.dealer.send(codec.encode(ask))
            await _admitted(address, KEYS, ask)
            assert len(named.heard) == 1, "others are named instead"


async def _admitted(address: str, keys: KeyPair, request: ReadChunk) -> None:
    """Dial until the holder of these keys gets an answer."""
    while True:
        with asking(address, Login(KEYS.public, keys)) as again:
            again.dealer.send(codec.encode(request))
            either = [
                asyncio.ensure_future(box.until(1)) for box in (again.heard, again.rejections)
            ]
            _, pending = await asyncio.wait(
                either, return_when=asyncio.FIRST_COMPLETED, timeout=0.5
            )
            for one in pending:
                one.cancel()
            if again.heard:
                return
