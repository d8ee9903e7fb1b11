"""Keys on the wire: who is heard, who is turned away and how, and what others can read.

Tests wait for events, never for time. What must not happen is ruled out by something that comes
later on the same way: once that is heard, so would the other have been.
"""

import asyncio
import contextlib
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import psutil
import pytest
import zmq

from distributed_llm.common import codec
from distributed_llm.common.connection import Connection, rejection_error
from distributed_llm.common.errors import NotAllowed, NotEnrolled, WrongServerKey
from distributed_llm.common.keys import KeyPair, PublicKey, fingerprint
from distributed_llm.common.messages import Generate, Ping, TokenChunk
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import frame_of_bytes
from distributed_llm.common.transport import (
    Dealer,
    Delivery,
    Door,
    Login,
    Rejection,
    Router,
    authenticator,
    key_pair_of,
    new_key_pair,
    sockets,
)
from distributed_llm.common.types import PeerId
from tests.own_process import in_own_process
from tests.wire.test_transport import ANY, Inbox, come_true, on_loop, raw_sockets

pytestmark = pytest.mark.timeout(60)


class Server:
    """A ROUTER with keys, and what it heard as (peer, key, frames)."""

    def __init__(self, *admitted: PublicKey, keyed: bool = True) -> None:
        self.keys = new_key_pair()
        self.admitted = set(admitted)
        self.asked: list[PublicKey] = []
        self.heard = Inbox()
        door = Door(self.keys, self.admits) if keyed else None
        self.router = Router(
            ANY,
            lambda peer, key, frames: self.heard.put(peer, key, [bytes(one) for one in frames]),
            lambda: None,
            door=door,
        )

    def admits(self, key: PublicKey) -> bool:
        self.asked.append(key)
        return key in self.admitted


class Client:
    """A DEALER, and what it was told."""

    def __init__(self, address: str, login: Login | None) -> None:
        self.heard, self.connects, self.losses, self.rejections = (Inbox() for _ in range(4))
        self.dealer = Dealer(
            address,
            lambda frames: self.heard.put([bytes(frame) for frame in frames]),
            self.connects.put,
            self.losses.put,
            login=login,
            on_rejected=self.rejections.put,
        )


@contextmanager
def serving(*admitted: PublicKey, keyed: bool = True) -> Iterator[Server]:
    server = Server(*admitted, keyed=keyed)
    try:
        yield server
    finally:
        server.router.close()


@contextmanager
def calling(address: str, login: Login | None) -> Iterator[Client]:
    client = Client(address, login)
    try:
        yield client
    finally:
        client.dealer.close(linger_ms=0)


class Known:
    """A peer with an admitted key."""

    def __init__(self, server: Server, client: Client, key: PublicKey) -> None:
        self.server = server
        self.client = client
        self.key = key

    async def talks(self) -> PeerId:
        """Check that it is heard and answered; return by what name the ROUTER knows it."""
        server, client = self.server, self.client
        word, count = secrets.token_bytes(8), len(client.heard)
        client.dealer.send([word])
        peer, key = await hears(server, word)
        assert key == self.key
        assert server.router.send(peer, [word]) is Delivery.SENT
        await client.heard.until(count + 1)
        assert client.heard[-1] == ([word],)
        return peer


async def hears(server: Server, word: bytes) -> tuple[PeerId, PublicKey]:
    """Return who said `word`, once it is heard."""
    while not (said := [(peer, key) for peer, key, frames in server.heard if frames == [word]]):
        await server.heard.until(len(server.heard) + 1)
    return said[0]


def words(server: Server) -> list[bytes]:
    """Return the first frame of all that was heard."""
    return [frames[0] for _, _, frames in server.heard]


@asynccontextmanager
async def known_peer(server: Server) -> AsyncIterator[Known]:
    """A peer with an admitted key, which notices nothing of what goes on beside it."""
    keys = new_key_pair()
    server.admitted.add(keys.public)
    with calling(server.router.address, Login(server.keys.public, keys)) as client:
        known = Known(server, client, keys.public)
        await known.talks()
        yield known
        await known.talks()
        assert client.losses == client.rejections == []


# ------------------------------------------------------------------ who is heard


@on_loop
async def test_who_holds_the_right_keys_is_heard_and_known_by_its_key() -> None:
    one, other = new_key_pair(), new_key_pair()
    with serving(one.public, other.public) as server:
        address, login = server.router.address, Login(server.keys.public, one)
        with (
            calling(address, login) as first,
            calling(address, Login(server.keys.public, other)) as second,
            calling(address, login) as third,
        ):
            for client, word in ((first, b"first"), (second, b"second"), (third, b"third")):
                client.dealer.send([word, b"more"])
            await server.heard.until(3)
            keys = {frames[0]: key for _, key, frames in server.heard}
            assert keys == {b"first": one.public, b"second": other.public, b"third": one.public}
            for peer, _, frames in list(server.heard):
                assert server.router.send(peer, frames) is Delivery.SENT
            await third.heard.until(1)
            assert third.heard[0] == ([b"third", b"more"],)
            assert first.rejections == second.rejections == third.rejections == []


async def turned_away(server: Server, login: Login | None) -> Rejection:
    """Return why a peer is turned away that has something to say, and check that nobody hears."""
    async with known_peer(server) as known:
        with calling(server.router.address, login) as client:
            client.dealer.send([b"unheard"])
            await client.rejections.until(1)
            await known.talks()
            assert client.connects == client.heard == []
            assert len(client.rejections) == 1
            assert b"unheard" not in words(server)
            (why,) = client.rejections[0]
            assert isinstance(why, Rejection)
            return why


@on_loop
async def test_who_has_no_admitted_key_is_turned_away() -> None:
    with serving() as server:
        why = await turned_away(server, Login(server.keys.public, new_key_pair()))
        assert why is Rejection.OUR_KEY


@on_loop
async def test_who_expects_another_coordinator_tells_it_nothing() -> None:
    keys = new_key_pair()
    with serving(keys.public) as server:
        why = await turned_away(server, Login(new_key_pair().public, keys))
        assert why is Rejection.SERVER_KEY
        assert keys.public not in server.asked


@on_loop
async def test_who_uses_no_keys_is_turned_away() -> None:
    with serving() as server:
        assert await turned_away(server, None) is Rejection.NO_KEYS


@on_loop
async def test_who_uses_keys_does_not_talk_to_one_without() -> None:
    with serving(keyed=False) as server:
        login = Login(server.keys.public, new_key_pair())
        with (
            calling(server.router.address, login) as client,
            calling(server.router.address, None) as plain,
        ):
            client.dealer.send([b"unheard"])
            await client.rejections.until(1)
            # Which of the two depends on who hangs up first.
            assert client.rejections[0] in ((Rejection.NO_KEYS,), (Rejection.SERVER_KEY,))
            plain.dealer.send([b"plain"])
            await server.heard.until(1)
            assert [one[2] for one in server.heard] == [[b"plain"]]
            assert client.connects == []


@on_loop
async def test_a_public_key_alone_is_not_enough() -> None:
    """Who knows the public key of an admitted machine still lacks the secret."""
    admitted, own = new_key_pair(), new_key_pair()
    with serving(admitted.public) as server:
        async with known_peer(server) as known:
            with raw_sockets() as raw:
                liar = raw(zmq.DEALER)
                Login(server.keys.public, KeyPair(admitted.public, own.secret)).put_on(liar)
                monitor = liar.get_monitor_socket(
                    zmq.EVENT_HANDSHAKE_SUCCEEDED
                    | zmq.EVENT_DISCONNECTED
                    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
                    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
                )
                liar.connect(f"tcp://{server.router.address}")
                liar.send(b"unheard")
                event = await asyncio.to_thread(monitor.recv_multipart)
                assert struct.unpack("=hi", event[0])[0] != zmq.EVENT_HANDSHAKE_SUCCEEDED
                liar.disable_monitor()
                await known.talks()
            assert b"unheard" not in words(server)


# ------------------------------------------------------------------ it fails closed


@on_loop
async def test_nobody_is_admitted_while_nobody_says_who_may() -> None:
    """ZeroMQ lets everybody in when nobody answers, unless it is told not to."""
    keys = new_key_pair()
    with serving(keys.public) as server:
        async with known_peer(server) as known:
            assert server.router._authenticator
            server.router._authenticator.close()
            with calling(server.router.address, Login(server.keys.public, keys)) as client:
                client.dealer.send([b"unheard"])
                await client.rejections.until(1)
                await known.talks()  # who was admitted stays
                assert client.connects == []
            assert b"unheard" not in words(server)


@on_loop
async def test_nobody_is_admitted_when_nobody_can_say_who_may(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(authenticator.logger, "exception", said.append)
    keys = new_key_pair()
    with serving(keys.public) as server:
        admitted = server.admitted

        class Broken(set[PublicKey]):
            def __contains__(self, key: object) -> bool:
                raise RuntimeError("a bug")

        async with known_peer(server) as known:
            login = Login(server.keys.public, keys)
            server.admitted = Broken()
            with calling(server.router.address, login) as client:
                await client.rejections.until(1)
                assert client.rejections[0] == (Rejection.OUR_KEY,)
                assert client.connects == []
            server.admitted = admitted
            await known.talks()
            with calling(server.router.address, login) as client:  # it goes on answering
                await client.connects.until(1)
    assert said == ["nobody could say whether a peer may connect: it may not"]


@on_loop
async def test_who_is_not_admitted_any_more_is_not_heard_though_its_connection_lives() -> None:
    keys = new_key_pair()
    with serving(keys.public) as server:
        async with known_peer(server) as known:
            with calling(server.router.address, Login(server.keys.public, keys)) as client:
                client.dealer.send([b"before"])
                await hears(server, b"before")
                server.admitted.discard(keys.public)
                asked = server.asked.count(keys.public)
                client.dealer.send([b"after"])
                await come_true(lambda: server.asked.count(keys.public) > asked)
                await known.talks()
                assert client.losses == []
                assert b"after" not in words(server)


# ------------------------------------------------------------------ strangers


def open_sockets(count: int, address: str) -> list[socket.socket]:
    host, _, port = address.rpartition(":")
    return [socket.create_connection((host, int(port))) for _ in range(count)]


async def ended(raw: socket.socket) -> None:
    def read() -> None:
        with contextlib.suppress(ConnectionError):
            while raw.recv(65536):
                pass

    await asyncio.to_thread(read)


@on_loop
async def test_silent_connections_change_nothing_for_who_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets, "_HANDSHAKE_MS", 500)
    with serving() as server:
        async with known_peer(server) as known:
            silent = open_sockets(200, server.router.address)
            await known.talks()
            async with known_peer(server):  # another one gets in beside them
                await known.talks()
            for one in silent:
                await ended(one)  # they are closed
                one.close()
            await known.talks()


def test_what_strangers_send_takes_no_memory() -> None:
    in_own_process(bytes_of_strangers)


def bytes_of_strangers() -> None:
    random_bytes_change_nothing_for_who_is_known()
    an_unfinished_message_of_a_stranger_never_gets_in()


@on_loop
async def random_bytes_change_nothing_for_who_is_known() -> None:
    """Through the whole state machine of the handshake: raw, after a greeting, as commands."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    with serving() as server:
        async with known_peer(server) as known:
            before, asked = len(server.heard), set(server.asked)
            memory = psutil.Process().memory_info().rss
            for number in range(150):
                (raw,) = open_sockets(1, server.router.address)
                noise = secrets.token_bytes(1 + secrets.randbelow(8192))
                command = b"\x04" + bytes([200]) + b"\x05HELLO" + secrets.token_bytes(194)
                with contextlib.suppress(ConnectionError):
                    raw.sendall([noise, greeting + noise, greeting + command + noise][number % 3])
                raw.close()
                if number % 10 == 0:
                    await known.talks()
            await known.talks()
            assert {one[1] for one in server.heard[before:]} == {server.heard[0][1]}
            assert set(server.asked) == asked  # no handshake came as far as a key
            assert psutil.Process().memory_info().rss - memory < 32 << 20


@on_loop
async def an_unfinished_message_of_a_stranger_never_gets_in() -> None:
    """Without keys, frames of a message that never ends pile up in memory; see the reference."""
    with serving() as server:
        async with known_peer(server) as known:
            memory = psutil.Process().memory_info().rss
            raw = open_sockets(1, server.router.address)[0]
            greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
            ready = b"\x04\x05\x05READY"
            part = b"\x03" + struct.pack(">Q", 1 << 20) + bytes(1 << 20)  # long, and more to come

            def flood() -> int:
                sent = 0
                with contextlib.suppress(ConnectionError):
                    raw.sendall(greeting + ready)
                    for _ in range(200):
                        raw.sendall(part)
                        sent += 1
                return sent

            assert await asyncio.to_thread(flood) < 200
            raw.close()
            await known.talks()
            assert psutil.Process().memory_info().rss - memory < 32 << 20


@on_loop
async def test_who_takes_the_routing_id_of_another_gets_nothing_of_it() -> None:
    with serving() as server, raw_sockets() as raw:
        thief_keys = new_key_pair()
        server.admitted.add(thief_keys.public)
        async with known_peer(server) as known:
            victim = await known.talks()
            thief = raw(zmq.DEALER)
            thief.routing_id = bytes(victim)
            Login(server.keys.public, thief_keys).put_on(thief)
            monitor = thief.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
            thief.connect(f"tcp://{server.router.address}")
            thief.send(b"from the thief")
            await asyncio.to_thread(monitor.recv_multipart)
            thief.disable_monitor()
            for number in range(20):
                assert server.router.send(victim, [b"%d" % number]) is Delivery.SENT
            await known.client.heard.until(2 + 20)
            assert await known.talks() == victim
            assert not thief.poll(0)
            keys = {key for peer, key, _ in server.heard if peer == victim}
            assert keys == {known.key}


@on_loop
async def test_who_chooses_a_routing_id_is_still_known_by_its_key() -> None:
    with serving() as server, raw_sockets() as raw:
        keys = new_key_pair()
        server.admitted.add(keys.public)
        async with known_peer(server) as known:
            named = raw(zmq.DEALER)
            named.routing_id = b"owner"
            Login(server.keys.public, keys).put_on(named)
            named.connect(f"tcp://{server.router.address}")
            named.send(b"hello")
            assert await hears(server, b"hello") == (b"owner", keys.public)
            await known.talks()


# ------------------------------------------------------------------ what others can read

PROMPT, ANSWER = b"the prompt that nobody else may read", "the answer that nobody else may read"


class Wire:
    """A TCP relay that writes down all that passes, either way."""

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")
        self.seen = bytearray()
        self.address = ""

    async def __aenter__(self) -> "Wire":
        self._writers: list[asyncio.StreamWriter] = []
        self._carried: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.gather(*self._carried, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self._carried.add(asyncio.create_task(self._carry(reader, writer)))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        self._writers.append(far_writer)
        await asyncio.gather(self._copy(reader, far_writer), self._copy(far_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.seen += data
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@pytest.mark.parametrize("keyed", [True, False], ids=["with keys", "without"])
@on_loop
async def test_who_listens_on_the_wire_reads_nothing(keyed: bool) -> None:
    """Neither prompts nor answers nor what kind of message passes; without keys, all of it."""
    spec, frame = frame_of_bytes(PROMPT)
    params = SamplingParams(stop_strings=("a stop string",))
    ask = codec.encode(
        Generate(request_id="a name", prompt="text", params=params, tensors=(spec,)), (frame,)
    )
    chunk = TokenChunk(request_id="a name", index=0, text=ANSWER, token_ids=())
    keys = new_key_pair()
    with serving(keys.public, keyed=keyed) as server:
        login = Login(server.keys.public, keys) if keyed else None
        async with Wire(server.router.address) as wire:
            with calling(wire.address, login) as client:
                client.dealer.send(ask)
                await server.heard.until(1)
                peer, _, frames = server.heard[0]
                assert frames[-1] == PROMPT
                assert server.router.send(peer, codec.encode(chunk)) is Delivery.SENT
                await client.heard.until(1)
                client.dealer.send(codec.encode(Ping()))
                await server.heard.until(2)
            seen = bytes(wire.seen)
    secret = (PROMPT, ANSWER.encode(), b"a stop string", b"a name", b"generate", b"token_chunk")
    assert [word in seen for word in (*secret, b"ping")] == [not keyed] * (len(secret) + 1)
    assert len(seen) > len(PROMPT) + len(ANSWER)


# ------------------------------------------------------------------ what people are told


async def told(server: Server, login: Login | None) -> NotAllowed:
    """Return what somebody is told who connects with `login`."""
    why: asyncio.Future[Rejection] = asyncio.get_running_loop().create_future()
    address = server.router.address
    connection = Connection(
        address,
        [address],
        lambda _: None,
        lambda: None,
        lambda: None,
        login=login,
        on_rejected=why.set_result,
    )
    try:
        return rejection_error(address, login, await why)
    finally:
        connection.close()


@on_loop
async def test_who_is_turned_away_is_told_why_and_what_to_do() -> None:
    keys, wrong = new_key_pair(), new_key_pair().public
    with serving(keys.public) as server, serving(keyed=False) as plain:
        at = server.router.address
        unknown = await told(server, Login(server.keys.public, new_key_pair()))
        assert isinstance(unknown, NotEnrolled)
        assert f"The coordinator at {at} does not know the key of this machine" in str(unknown)
        assert "dllm token create" in str(unknown)
        other = await told(server, Login(wrong, keys))
        assert isinstance(other, WrongServerKey)
        assert f"does not hold the key {fingerprint(wrong)}" in str(other)
        assert "somebody is in between" in str(other)
        without = await told(server, None)
        assert f"The coordinator at {at} uses keys" in str(without)
        assert "Leave --insecure out." in str(without)
        assert "it uses no keys any more" in str(other)
        with_keys = await told(plain, Login(plain.keys.public, keys))  # whoever hangs up first
        assert "uses no keys" in str(with_keys)
        assert "give --insecure here as well" in str(with_keys) or (
            isinstance(with_keys, WrongServerKey) and "give that here as well" in str(with_keys)
        )
        for error in (unknown, other, without, with_keys):
            assert error.exit_code == 3
            assert keys.secret not in str(error)


# ------------------------------------------------------------------ the keys themselves


def test_a_pair_is_known_by_its_secret() -> None:
    pair = new_key_pair()
    assert key_pair_of(pair.secret) == pair
    assert new_key_pair() != pair
    assert pair.secret not in repr(pair)
    assert pair.secret not in repr(Login(pair.public, pair))
    for text in ("", pair.secret[:-1], pair.secret + "A", pair.secret[:-1] + "!", "é" * 43):
        with pytest.raises(ValueError, match="43 letters"):
            key_pair_of(text)
