"""A coordinator that says what a test tells it to: for tests of clients, over real sockets."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from distributed_llm.client.loop_thread import LoopThread
from distributed_llm.common import codec
from distributed_llm.common.keyring import state_folder
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import (
    ClientHello,
    ClientWelcome,
    ClusterMembers,
    ClusterStatus,
    CreateToken,
    DescribeModel,
    DrainWorker,
    Finished,
    FinishReason,
    Generate,
    GetDigests,
    GetMembers,
    GetModel,
    GetStatus,
    MembersReport,
    ModelDescribed,
    ModelInfo,
    Ping,
    Pong,
    ReadChunk,
    ReadmitMachine,
    RemoveMachine,
    RequestFailed,
    RevokeToken,
    StageTiming,
    StatusReport,
    Timings,
    ToClient,
    ToCoordinator,
    TokenChunk,
    TokenLogprobs,
    Usage,
)
from distributed_llm.common.tensors import Frame, frame_of_bytes
from distributed_llm.common.transport import Delivery, Router
from distributed_llm.common.types import LayerRange, PeerId
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.trust.store import Trust

Script = Callable[[Generate], Sequence[ToClient]]
"""Returns the messages with which a request is answered, at once."""

_RETRY_S = 0.001
_NOBODY = ClusterMembers(machines=(), tokens=())

USAGE = Usage(prompt_tokens=3, completion_tokens=6, cached_tokens=2)
TIMINGS = Timings(
    queued_s=0.25,
    first_token_s=0.5,
    decode_s=2.0,
    stages=(StageTiming(worker="pc", layers=LayerRange(0, 4), tasks=6, compute_s=1.5),),
)


def piece(
    request: Generate,
    text: str,
    *token_ids: int,
    choice: int = 0,
    index: int = 0,
    logprobs: tuple[TokenLogprobs, ...] = (),
    end: FinishReason | None = None,
) -> TokenChunk:
    return TokenChunk(
        request_id=request.request_id,
        choice=choice,
        index=index,
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=end,
    )


def finished(request: Generate) -> Finished:
    return Finished(request_id=request.request_id, usage=USAGE, timings=TIMINGS)


def failed(request: Generate, code: str, message: str = "It failed.") -> RequestFailed:
    return RequestFailed(request_id=request.request_id, code=code, message=message)


class FakeCoordinator:
    """Welcomes clients and answers requests by a script; it runs in a thread of its own.

    Like a real one it lets in whoever has the key that it leaves on this machine.

    Args:
        script: says what a request is answered with.
        status: what `GetStatus` is answered with.
        model: what `DescribeModel` is answered with.
        heartbeat_interval_s, silence_timeout_s: that clients are told.

    Attributes:
        address: "HOST:PORT".
        heard: what clients said, without hellos and pings.
        prompts: the tensor frames of requests.
    """

    def __init__(
        self,
        script: Script = lambda _: (),
        status: ClusterStatus | None = None,
        model: ModelInfo | None = None,
        *,
        heartbeat_interval_s: float = 5.0,
        silence_timeout_s: float = 60.0,
    ) -> None:
        self._welcome = ClientWelcome(
            model="fake",
            heartbeat_interval_s=heartbeat_interval_s,
            silence_timeout_s=silence_timeout_s,
        )
        self.script = script
        self.heard: list[ToCoordinator] = []
        self.prompts: list[list[bytes]] = []
        self._status = status
        self._model = model
        self._outbox: deque[tuple[PeerId, list[Frame]]] = deque()
        self._thread = LoopThread()
        self._thread.run(self._open())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.run(self._close())
        self._thread.stop()

    @property
    def requests(self) -> list[Generate]:
        return [message for message in self.heard if isinstance(message, Generate)]

    def say(self, *messages: ToClient) -> None:
        """Send to the client that sent the last request or order."""

        async def say() -> None:
            self._send(self._peer, *messages)

        self._thread.run(say())

    async def _open(self) -> None:
        self._trust = Trust(state_folder(), 0, now=0.0)
        door = self._trust.door
        self._router = Router("127.0.0.1:0", self._on_message, lambda: None, door=door)
        self.address = self._router.address
        self._trust.listening(split_address(self.address)[1])

    async def _close(self) -> None:
        self._router.close()
        self._trust.close()

    def _on_message(self, peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        message, tensors = codec.to_coordinator.decode(frames)
        match message:
            case ClientHello():
                self._send(peer, self._welcome)
            case Ping():
                self._send(peer, Pong())
            case GetStatus():
                assert self._status
                spec, frame = frame_of_bytes(codec.encode_payload(self._status))
                self._router.send(peer, codec.encode(StatusReport(tensors=(spec,)), [frame]))
            case DescribeModel() if self._model:
                spec, frame = frame_of_bytes(codec.encode_payload(self._model))
                self._router.send(peer, codec.encode(ModelDescribed(tensors=(spec,)), [frame]))
            case GetMembers() | CreateToken() | RevokeToken() | RemoveMachine() | ReadmitMachine():
                self.heard.append(message)
                spec, frame = frame_of_bytes(codec.encode_payload(_NOBODY))
                self._router.send(peer, codec.encode(MembersReport(tensors=(spec,)), [frame]))
            case DrainWorker():
                self._peer = peer
                self.heard.append(message)
            case Generate():
                self._peer = peer
                self.prompts.append([bytes(tensor) for tensor in tensors])
                self.heard.append(message)
                self._send(peer, *self.script(message))
            case GetModel() | GetDigests() | ReadChunk():
                raise AssertionError("nobody asks for weights here")
            case _:
                self.heard.append(message)

    def _send(self, peer: PeerId, *messages: ToClient) -> None:
        self._outbox.extend((peer, codec.encode(message)) for message in messages)
        self._flush()

    def _flush(self) -> None:
        while self._outbox:
            if self._router.send(*self._outbox[0]) is Delivery.STUCK:
                asyncio.get_running_loop().call_later(_RETRY_S, self._flush)
                return
            self._outbox.popleft()
