"""One connection of a client: sends requests, receives their answers, notices silence."""

import asyncio
import os
import secrets
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import chain
from typing import Any, TypeVar, assert_never

from distributed_llm.common import codec
from distributed_llm.common.addresses import addresses_of
from distributed_llm.common.alarm import STALL_S
from distributed_llm.common.connection import Connection, rejection_error
from distributed_llm.common.errors import (
    CoordinatorLost,
    CoordinatorUnreachable,
    DistributedLLMError,
    ProtocolMismatch,
    RemoteProtocolError,
    error_from_wire,
)
from distributed_llm.common.keyring import FindLogin
from distributed_llm.common.messages import (
    Cancel,
    ClientHello,
    ClientRequest,
    ClientWelcome,
    ClusterMembers,
    ClusterStatus,
    CreateToken,
    DecodeTokens,
    DescribeModel,
    DrainWorker,
    Embed,
    Embedded,
    EncodePrompt,
    Enrolled,
    Finished,
    Generate,
    GetMembers,
    GetStatus,
    MembersReport,
    ModelDescribed,
    ModelInfo,
    Ping,
    Pong,
    PromptEncoded,
    ReadmitMachine,
    Refused,
    RemoveMachine,
    RequestFailed,
    RevokeToken,
    StatusReport,
    ToClient,
    TokenChunk,
    TokensDecoded,
    WorkerDrained,
)
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Login
from distributed_llm.common.wording import no_coordinator_text

Frames = tuple[Frame, ...]
Question = Embed | EncodePrompt | DecodeTokens
Reply = TokenChunk | Finished | Embedded | PromptEncoded | TokensDecoded

T = TypeVar("T")

_NOBODY = ClusterMembers(machines=(), tokens=())


def new_request_id() -> str:
    """Return a random id that no other request of this client has."""
    return secrets.token_urlsafe(12)


class Session:
    """A connection to the coordinator. Make it with `open`.

    Args:
        address: "HOST:PORT" of the coordinator.
        addresses: what that stands for, "HOST:PORT"s with IP addresses.
        login: the keys of both ends; None without keys.

    Attributes:
        error: why the session is over; None while it lasts.
        server: the key that the coordinator holds; None without keys.
    """

    def __init__(self, address: str, addresses: Sequence[str], login: Login | None) -> None:
        self._address = address
        self.server = login.server if login else None
        self._loop = asyncio.get_running_loop()
        self._owner = os.getpid()
        self._welcome: asyncio.Future[ClientWelcome] = self._loop.create_future()
        self._answers: dict[str, asyncio.Queue[tuple[Reply, Frames] | DistributedLLMError]] = {}
        self._reports: deque[asyncio.Future[ClusterStatus]] = deque()
        self._model: ModelInfo | None = None
        self._models: deque[asyncio.Future[ModelInfo]] = deque()
        self._member_reports: deque[asyncio.Future[ClusterMembers]] = deque()
        self._drains: defaultdict[str, deque[asyncio.Future[None]]] = defaultdict(deque)
        self._heard_at = self._loop.time()
        self._pulse: asyncio.Task[None] | None = None
        self.error: DistributedLLMError | None = None
        self._connection = Connection(
            address,
            addresses,
            self._on_message,
            lambda: self._connection.send(codec.encode(ClientHello())),
            lambda: self._lose("cannot be reached any more"),
            login=login,
            on_rejected=lambda why: self._fail(rejection_error(address, login, why)),
        )

    @classmethod
    async def open(cls, address: str, find_login: FindLogin, timeout_s: float) -> "Session":
        """Return a session that the coordinator has welcomed.

        Raises:
            CoordinatorUnreachable: its name is not known, or no coordinator has answered within
                `timeout_s`.
            NotAllowed: this machine has no key for it, or the two do not accept each other's.
            ProtocolMismatch: the coordinator speaks another version.
        """
        give_up_at = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(give_up_at):
                addresses = await addresses_of(address)
        except TimeoutError:
            raise CoordinatorUnreachable(
                f"Where {address} is was not found out in {timeout_s:g} s: the name service of "
                "this machine does not answer. Check it, or give an IP address."
            ) from None
        login = await find_login(address, give_up_at)
        session = cls(address, addresses, login)
        try:
            async with asyncio.timeout_at(give_up_at):
                welcome = await session._welcome
        except TimeoutError:
            session.close()
            why = no_coordinator_text(session._connection.reached)
            raise CoordinatorUnreachable(
                f"No coordinator at {address} after {timeout_s:g} s: {why}. Check the address and "
                "port, and that `dllm coordinator` runs there with a --bind that this machine can "
                "reach."
            ) from None
        except BaseException:
            session.close()
            raise
        session._pulse = asyncio.create_task(session._beat(welcome))
        return session

    @property
    def welcome(self) -> ClientWelcome:
        """What the coordinator said of itself and of this client."""
        return self._welcome.result()

    def is_here(self) -> bool:
        """Return whether this is the event loop and the process that the session was opened in."""
        return asyncio.get_running_loop() is self._loop and self._owner == os.getpid()

    def close(self) -> None:
        """End the session; the coordinator cancels its requests."""
        self._fail(CoordinatorLost("The client was closed."))
        if self._pulse:
            self._pulse.cancel()
        self._connection.close()

    async def request(
        self, message: Generate | Question, frames: Frames
    ) -> AsyncGenerator[tuple[Reply, Frames], None]:
        """Send a request; yield its chunks and then `Finished`, or the answer to a question.

        Closing the iterator cancels the request.

        Chunks that are not read yet are kept; the request's parameters bound how many there can be.

        Raises:
            DistributedLLMError: the error that the coordinator sent, or `CoordinatorLost`.
        """
        if self.error:
            raise self.error
        answers = self._answers[message.request_id] = asyncio.Queue()
        done = False
        try:
            self._connection.send(codec.encode(message, frames))
            while not done:
                answer = await answers.get()
                if isinstance(answer, DistributedLLMError):
                    done = True
                    raise answer
                done = not isinstance(answer[0], TokenChunk)
                yield answer
        finally:
            self._answers.pop(message.request_id, None)
            if not done and not self.error:
                self._connection.send(codec.encode(Cancel(request_id=message.request_id)))

    async def status(self, timeout_s: float) -> ClusterStatus:
        """Return the status of the cluster.

        Raises:
            CoordinatorLost: the coordinator did not answer within `timeout_s`.
        """
        return await self._asked(GetStatus(), self._reports, timeout_s)

    async def model(self, timeout_s: float) -> ModelInfo:
        """Return what is served, which a coordinator never changes: it is asked once.

        Raises:
            CoordinatorLost: the coordinator did not answer within `timeout_s`.
        """
        if self._model is None:
            self._model = await self._asked(DescribeModel(), self._models, timeout_s)
        return self._model

    async def administer(
        self,
        message: GetMembers | CreateToken | RevokeToken | RemoveMachine | ReadmitMachine,
        timeout_s: float,
    ) -> ClusterMembers:
        """Return who may connect, after that is changed as `message` says.

        Raises:
            DistributedLLMError: the reason why it cannot be.
            CoordinatorLost: the coordinator did not answer within `timeout_s`.
        """
        return await self._asked(message, self._member_reports, timeout_s)

    async def _asked(
        self, message: ClientRequest, reports: deque[asyncio.Future[T]], timeout_s: float
    ) -> T:
        """Return what answers a message, as reports of its kind come in their order."""
        if self.error:
            raise self.error
        report: asyncio.Future[T] = self._loop.create_future()
        reports.append(report)
        self._connection.send(codec.encode(message))
        try:
            async with asyncio.timeout(timeout_s):
                return await report
        except TimeoutError:
            raise CoordinatorLost(
                f"The coordinator at {self._address} did not answer in {timeout_s:g} s."
            ) from None

    async def drain(self, worker: str) -> None:
        """Have a worker end once others have its layers; return when it has ended.

        Raises:
            DistributedLLMError: the reason why it cannot, or `CoordinatorLost`.
        """
        if self.error:
            raise self.error
        drained: asyncio.Future[None] = self._loop.create_future()
        self._drains[worker].append(drained)
        self._connection.send(codec.encode(DrainWorker(worker=worker)))
        await drained

    async def _beat(self, welcome: ClientWelcome) -> None:
        while not self.error:
            self._connection.send(codec.encode(Ping()))
            due_at = self._loop.time() + welcome.heartbeat_interval_s
            await asyncio.sleep(welcome.heartbeat_interval_s)
            if self._loop.time() - due_at > STALL_S:  # the program stood still, and read nothing
                self._heard_at = self._loop.time()
            if self._loop.time() - self._heard_at > welcome.silence_timeout_s:
                self._lose(f"has been silent for {welcome.silence_timeout_s:g} s")

    def _on_message(self, frames: list[Frame]) -> None:
        try:
            message, tensors = codec.to_client.decode(frames)
        except ProtocolMismatch as exc:
            self._fail(exc)
            return
        except RemoteProtocolError as exc:
            self._cannot_read(exc)
            return
        self._heard_at = self._loop.time()
        self._received(message, tensors)

    def _cannot_read(self, error: RemoteProtocolError) -> None:
        """End the request that a message belongs to, or the session if it belongs to none."""
        request_id = error.outline.request_id
        if request_id is None or request_id not in self._answers:
            self._lose(f"sent what is no message ({error})")
            return
        self._heard_at = self._loop.time()
        why = f"{error.detail}. The answer is lost: ask again, and report it if that happens again."
        self._answer(request_id, RemoteProtocolError(error.reason, why))
        self._connection.send(codec.encode(Cancel(request_id=request_id)))

    def _received(self, message: ToClient, tensors: tuple[Frame, ...]) -> None:
        match message:
            case ClientWelcome():
                if not self._welcome.done():
                    self._welcome.set_result(message)
            case TokenChunk() | Finished() | Embedded() | PromptEncoded() | TokensDecoded():
                self._answer(message.request_id, (message, tensors))
            case RequestFailed():
                error = error_from_wire(message.code, message.message, message.retry_after_s)
                self._answer(message.request_id, error)
            case StatusReport():
                self._report(self._reports, codec.decode_status, tensors[0])
            case ModelDescribed():
                self._report(self._models, codec.decode_model_info, tensors[0])
            case WorkerDrained():
                self._drained(message)
            case MembersReport():
                self._members_reported(message, tensors)
            case Enrolled():
                pass  # this session did not ask for it
            case Refused(code="lost"):
                self._lose("does not know this session any more")
            case Refused(code=code, message=why):
                self._fail(error_from_wire(code, why, 0.0))
            case Pong():
                pass
            case _:
                assert_never(message)

    def _report(
        self, reports: deque[asyncio.Future[T]], decode: Callable[[Frame], T], frame: Frame
    ) -> None:
        try:
            said = decode(frame)
        except RemoteProtocolError as exc:
            self._lose(f"sent a report that cannot be read ({exc})")
            return
        report = reports.popleft() if reports else None
        if report and not report.done():
            report.set_result(said)

    def _members_reported(self, message: MembersReport, tensors: tuple[Frame, ...]) -> None:
        report = self._member_reports.popleft() if self._member_reports else None
        if report is None or report.done():
            return
        try:
            if message.code:
                raise error_from_wire(message.code, message.message, 0.0)
            report.set_result(codec.decode_members(tensors[0]) if tensors else _NOBODY)
        except DistributedLLMError as exc:
            report.set_exception(exc)

    def _drained(self, message: WorkerDrained) -> None:
        waiting = self._drains[message.worker]
        drained = waiting.popleft() if waiting else None
        if drained is None or drained.done():
            return
        if message.code:
            drained.set_exception(error_from_wire(message.code, message.message, 0.0))
        else:
            drained.set_result(None)

    def _answer(self, request_id: str, answer: tuple[Reply, Frames] | DistributedLLMError) -> None:
        answers = self._answers.get(request_id)
        if answers is not None:
            answers.put_nowait(answer)

    def _lose(self, how: str) -> None:
        self._fail(
            CoordinatorLost(
                f"The coordinator at {self._address} {how}. What it was doing for this client is "
                "lost. See whether it still runs, and ask again."
            )
        )

    def _fail(self, error: DistributedLLMError) -> None:
        if self.error:
            return
        self.error = error
        if not self._welcome.done():
            self._welcome.set_exception(error)
            self._welcome.exception()  # retrieved: nobody may be waiting for it
        every: list[asyncio.Future[Any]] = [
            *self._reports,
            *self._models,
            *self._member_reports,
            *chain(*self._drains.values()),
        ]
        for waiting in every:
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()
        for answers in self._answers.values():
            answers.put_nowait(error)
