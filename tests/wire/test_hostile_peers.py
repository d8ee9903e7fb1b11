"""What enrolled peers and strangers may send to a live coordinator: nothing of it does harm."""

import asyncio
import os
import pickle
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from distributed_llm import AsyncDistributedClient
from distributed_llm.common import codec
from distributed_llm.common.codec import MAX_HEADER_BYTES, PREAMBLE
from distributed_llm.common.keyring import Keyring, state_folder
from distributed_llm.common.messages import (
    MAX_TENSORS,
    ClientHello,
    DrainWorker,
    Generate,
    GetStatus,
    Heartbeat,
    LinkReport,
    MayLeave,
    Message,
    Pong,
    RequestFailed,
    StageTime,
    Task,
    TaskResult,
    Welcome,
    WorkerHello,
)
from distributed_llm.common.sampling_params import SamplingParams
from distributed_llm.common.tensors import Frame, frame_of_token_ids
from distributed_llm.common.transport import Dealer, Login, new_key_pair
from distributed_llm.common.types import Epoch, StepNumber
from tests.own_process import in_own_process
from tests.unit.coordinator_parts import capabilities
from tests.wire.strategies import example
from tests.wire.test_coordinator import coordinator
from tests.wire.test_transport import Inbox, on_loop

pytestmark = pytest.mark.timeout(60)

Frames = Sequence[Frame]

_SPEC, _IDS = frame_of_token_ids([1, 2, 3])
GENERATE = Generate(
    request_id="r", prompt="token_ids", params=SamplingParams(timeout_s=9.0), tensors=(_SPEC,)
)
BEAT = Heartbeat(epochs=(), progress_age_s=0.0, tasks_waiting=0, memory_used_bytes=0, kv_bytes=0)


class Peer:
    """A connection with keys that says whatever it is told to."""

    def __init__(self, address: str, login: Login | None, *, to_worker: bool = False) -> None:
        self.heard, self.let_in_or_not = Inbox(), Inbox()
        decode: Callable[[Frames], Any] = (
            codec.to_worker.decode if to_worker else codec.to_client.decode
        )
        self.dealer = Dealer(
            address,
            lambda frames: self.heard.put(decode([bytes(frame) for frame in frames])[0]),
            lambda: self.let_in_or_not.put(True),
            lambda: None,
            login=login,
            on_rejected=lambda why: self.let_in_or_not.put(False),
        )

    async def connects_or_not(self) -> None:
        """Return once it is let in or turned away."""
        await self.let_in_or_not.until(1)

    async def ask(self, frames: Frames) -> Message:
        """Send frames; return what comes back first, but for signs of life."""
        count = len(self.heard)
        self.dealer.send(list(frames))
        while True:
            await self.heard.until(count + 1)
            (answer,) = self.heard[count]
            assert isinstance(answer, Message)
            if not isinstance(answer, Pong):
                return answer
            count += 1


@asynccontextmanager
async def peer(address: str) -> AsyncIterator[Peer]:
    """An enrolled peer that was welcomed."""
    one = Peer(address, Keyring(state_folder()).kept(address))
    try:
        await one.ask(codec.encode(ClientHello()))
        yield one
    finally:
        one.dealer.close(linger_ms=0)


# ------------------------------------------------------------------ what cannot be read


def spoilt(message: Message, **changes: Any) -> Frames:
    """Return a message with other fields; None leaves one out."""
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(message)) | changes
    kept = {name: value for name, value in fields.items() if value is not ...}
    return [PREAMBLE, msgspec.msgpack.encode(kept)]


def generate(**changes: Any) -> Frames:
    return [*spoilt(GENERATE, **changes), bytes(_IDS)]


def tensor(*spec: Any) -> Frames:
    return generate(tensors=[spec])


class _Canary:
    """Leaves a folder where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("a canary",)


_PICKLE = pickle.dumps(_Canary())

ROWS: Mapping[str, tuple[str, Frames]] = {
    # M9
    "one frame": ("bad_frames", [PREAMBLE]),
    "many frames": ("bad_frames", [b"x"] * (3 + MAX_TENSORS)),
    "a thousand frames": ("bad_frames", [b"x"] * 1000),
    "empty frames": ("bad_magic", [b"", b""]),
    "wrong magic": ("bad_magic", [b"LLMD\x09", b"x"]),
    # M10
    "a long header": ("header_too_big", [PREAMBLE, bytes(MAX_HEADER_BYTES + 1)]),
    "16 MiB of header": ("header_too_big", [PREAMBLE, bytes(16 << 20)]),
    # M11
    "array of 2**32": ("bad_field", [PREAMBLE, b"\xdd\xff\xff\xff\xff"]),
    "map of 2**32": ("malformed", [PREAMBLE, b"\xdf\xff\xff\xff\xff"]),
    "nested arrays": ("bad_field", [PREAMBLE, b"\x91" * (MAX_HEADER_BYTES - 1) + b"\x90"]),
    "nested ext": ("bad_field", [PREAMBLE, b"\xc7\xff\x05" * 400]),
    # M12
    "a pickle": ("bad_field", [PREAMBLE, _PICKLE]),
    "a pickle twice": ("bad_magic", [_PICKLE, _PICKLE]),
    # M13
    "unknown type": ("bad_field", spoilt(BEAT, type="unheard_of")),
    "no type": ("bad_field", spoilt(BEAT, type=...)),
    "missing field": ("bad_field", spoilt(BEAT, kv_bytes=...)),
    "extra field": ("bad_field", spoilt(BEAT, more=1)),
    "bool for int": ("bad_field", spoilt(BEAT, kv_bytes=True)),
    "float for int": ("bad_field", spoilt(BEAT, kv_bytes=1.5)),
    "-1": ("bad_field", spoilt(BEAT, kv_bytes=-1)),
    "2**64-1": ("bad_field", spoilt(BEAT, kv_bytes=2**64 - 1)),
    "NaN": ("bad_field", spoilt(BEAT, progress_age_s=float("nan"))),
    # M14
    "version 0": ("unsupported_version", [b"DLLM\0", b"x"]),
    "version 255": ("unsupported_version", [b"DLLM\xff", b"x"]),
    # M15
    "a message to a worker": ("bad_field", codec.encode(example(Task), [bytes(24)])),
    "a report of a worker": ("bad_state", codec.encode(LinkReport(epoch=Epoch(1), up=True))),
    "a second hello": ("bad_state", codec.encode(ClientHello())),
    # M17
    "a result of nothing": (
        "bad_state",
        codec.encode(
            TaskResult(
                epoch=Epoch(1),
                step=StepNumber(1),
                timings=(StageTime(compute_us=1, layers_us=0, queued_us=0),),
            )
        ),
    ),
    # M22
    "a name of a million letters": ("header_too_big", generate(request_id="x" * 10**6)),
    # T1 to T3, T11
    **{
        f"dtype {dtype}": ("bad_field", tensor(dtype, [3]))
        for dtype in ("O", "V8", ">f4", "M8[ns]", "i4,(10**9)i8", "load", "float8_x", "")
    },
    "fewer numbers": ("tensor_size_mismatch", tensor("int32", [2])),
    "more numbers": ("tensor_size_mismatch", tensor("int32", [4])),
    **{
        f"shape {shape}": ("bad_field", tensor("int32", shape))
        for shape in ([-1], [2**62], [2**31, 2**31], [], [1] * 65, [True], [3.0], [0])
    },
    "no spec": ("bad_frames", generate(tensors=[])),
    "embeddings for a prompt": ("bad_field", generate(prompt="prompt_embeds")),
    "a sparse tensor": ("bad_field", tensor("int32", [3], "sparse")),
}


def test_whatever_a_peer_sends_is_counted_and_others_are_served(tmp_path: Path) -> None:
    """Each row, and beside it the same peer with what is right: otherwise it shows nothing.

    A process of its own, whose memory no other test has shaped, goes through them.
    """
    in_own_process(every_row, tmp_path)
    assert not list(tmp_path.iterdir())


@on_loop
async def every_row(folder: Path) -> None:
    os.chdir(folder)  # where the canary would sing
    memory = psutil.Process().memory_info().rss
    async with coordinator() as address, AsyncDistributedClient(address) as other:
        for name, (counter, frames) in ROWS.items():
            before = (await other.status()).rejected
            session = other._session
            async with peer(address) as one:
                right = await one.ask(codec.encode(GENERATE, [_IDS]))
                assert isinstance(right, RequestFailed), name
                assert right.code == "not_ready", name  # it was read: there are no workers
                one.dealer.send(list(frames))
                while (after := (await other.status()).rejected) == before:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            moved = {key for key in after if after[key] != before.get(key, 0)}
            assert moved == {counter}, name
            assert other._session is session, name
    assert psutil.Process().memory_info().rss - memory < 64 << 20


# ------------------------------------------------------------------ what an open port would allow


@asynccontextmanager
async def worker(address: str, login: Login | None, name: str = "victim") -> AsyncIterator[Peer]:
    """A peer that has said the hello of a worker, or has been turned away."""
    one = Peer(address, login, to_worker=True)
    try:
        await one.connects_or_not()
        one.dealer.send(codec.encode(hello(name)))
        yield one
    finally:
        one.dealer.close(linger_ms=0)


def hello(name: str) -> WorkerHello:
    return WorkerHello(name=name, instance=name, capabilities=capabilities(1 << 20))


def strangers(address: str) -> list[Login | None]:
    """Return with which keys a stranger may come: none, and some of his own making."""
    known = Keyring(state_folder()).kept(address)
    return [None, Login(known.server, new_key_pair())] if known else [None]


async def names(client: AsyncDistributedClient) -> set[str]:
    return {one.name for one in (await client.status()).workers}


@pytest.mark.parametrize("insecure", [False, True], ids=["with keys", "without"])
@on_loop
async def test_a_stranger_cannot_join_as_a_worker(insecure: bool) -> None:
    """Who could would read prompts and make up answers. Without keys, anybody can."""
    async with (
        coordinator(insecure=insecure) as address,
        AsyncDistributedClient(address, insecure=insecure) as owner,
    ):
        for login in strangers(address):
            async with worker(address, login, "evil") as evil:
                if insecure:
                    await evil.heard.until(1)
                assert [one for (one,) in evil.heard if isinstance(one, Welcome)] == (
                    [evil.heard[0][0]] if insecure else []
                )
                assert await names(owner) == ({"evil"} if insecure else set())


@pytest.mark.parametrize("insecure", [False, True], ids=["with keys", "without"])
@on_loop
async def test_a_stranger_cannot_drain_a_worker(insecure: bool) -> None:
    """Without keys, anybody can."""
    async with (
        coordinator(insecure=insecure) as address,
        AsyncDistributedClient(address, insecure=insecure) as owner,
        worker(address, Keyring(state_folder()).kept(address)) as victim,
    ):
        await victim.heard.until(1)
        for login in strangers(address):
            evil = Peer(address, login)
            await evil.connects_or_not()
            evil.dealer.send(codec.encode(ClientHello()))
            evil.dealer.send(codec.encode(DrainWorker(worker="victim")))
            if insecure:
                await evil.heard.until(1)
            await owner.status()  # whatever was heard before was done
            evil.dealer.close(linger_ms=0)
        if insecure:
            while not any(isinstance(one, MayLeave) for (one,) in victim.heard):
                await victim.heard.until(len(victim.heard) + 1)
        else:
            assert not any(isinstance(one, MayLeave) for (one,) in victim.heard)
            assert [one.state for one in (await owner.status()).workers] != ["leaving"]


@pytest.mark.parametrize("insecure", [False, True], ids=["with keys", "without"])
@on_loop
async def test_a_stranger_cannot_ask(insecure: bool) -> None:
    """Without keys, anybody can, and see who computes what."""
    async with (
        coordinator(insecure=insecure) as address,
        AsyncDistributedClient(address, insecure=insecure) as owner,
    ):
        before = (await owner.status()).requests_failed
        for login in strangers(address):
            evil = Peer(address, login)
            await evil.connects_or_not()
            for frames in (
                codec.encode(ClientHello()),
                codec.encode(GENERATE, [_IDS]),
                codec.encode(GetStatus()),
            ):
                evil.dealer.send(frames)
            if insecure:
                await evil.heard.until(3)
            failed = (await owner.status()).requests_failed
            assert failed == before + insecure
            assert len(evil.heard) == (3 if insecure else 0)
            evil.dealer.close(linger_ms=0)
