"""Fetches the weights of some layers to this disk, in a thread of its own: the edge of `fetching`.

The thread has an event loop, a connection to the coordinator and one to each other source, and it
writes what comes to the cache. Reading and hashing what is on the disk already is left to a second
thread, so that what comes is not kept waiting. Threads that load take every tensor as soon as it is
there, while the others come.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar, assert_never

from distributed_llm.common.alarm import Alarm
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import (
    CheckpointError,
    FetchFailed,
    internal_error,
)
from distributed_llm.common.hub import held_file
from distributed_llm.common.messages import (
    Chunk,
    DigestsReport,
    FetchProgress,
    ModelDescription,
    ModelReport,
    ModelSource,
    NoChunk,
    Pong,
    ReadChunk,
    Refused,
    ToReader,
)
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.stopping import on_uncaught
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Login
from distributed_llm.common.types import LayerRange
from distributed_llm.common.wording import layers_text, list_text
from distributed_llm.weights.arrivals import Arrivals, not_wanted
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.fetching.events import (
    Action,
    Ask,
    Check,
    ChunkAbsent,
    ChunkArrived,
    ChunkRefused,
    Claim,
    CloseSource,
    Event,
    Failed,
    Finished,
    Forget,
    Keep,
    Log,
    Source,
    SourceDown,
    SourceFailed,
    SourceUp,
    Wanted,
    WantedMore,
)
from distributed_llm.weights.fetching.fetching import PATIENCE_S, Fetching
from distributed_llm.weights.giving.shelf import Place, Shelf, places_in_file
from distributed_llm.weights.inquiry import Inquiry
from distributed_llm.weights.source_link import SourceLink

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

COORDINATOR = "the coordinator"
"""Name of the coordinator among the sources."""

_ASK_EVERY_S = 0.5
"""Time between two questions to the coordinator about digests that are not known, seconds."""

_LOOK_EVERY_S = 0.25
"""Time between two looks whether the weights are still wanted, seconds."""

_JOIN_S = 2.0
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(frozen=True)
class Origin:
    """A machine that may have the weights.

    Attributes:
        addresses: "HOST:PORT"s at which it may be reached.
        login: the keys of both ends; None without keys.
        layers: whose weights it is expected to have.
    """

    addresses: tuple[str, ...]
    login: Login | None
    layers: tuple[LayerRange, ...]


class Fetch:
    """Fetches the weights of `layers`; begins at once to ask what the model consists of.

    `model`, `begin` and `wait_for` are called in threads that load.

    Args:
        source: of the model, as the coordinator names it.
        layers: that are to be loaded.
        coordinator: vouches for what it is.
        peers: other machines that may have it, by name.
        cache: that gets it.
        shelf: that gets every tensor once it is there, for others to read.
        max_bytes_per_s: at which it may come; None is without limit.
        on_bytes: called with bytes that came or were read, in any thread.
        is_wanted: called in any thread; once it returns false, fetching ends.
    """

    def __init__(
        self,
        source: ModelSource,
        layers: LayerRange,
        *,
        coordinator: Origin,
        peers: Mapping[str, Origin],
        cache: ContentCache,
        shelf: Shelf,
        max_bytes_per_s: int | None,
        on_bytes: Callable[[int], None],
        is_wanted: Callable[[], bool],
    ) -> None:
        self._source = source
        self._layers = layers
        self._inquiry = Inquiry(source, layers, time.monotonic())
        self._coordinator = coordinator
        self._peers = peers
        self._cache = cache
        self._on_bytes = on_bytes
        self._is_wanted = is_wanted
        self._model: Future[ModelDescription] = Future()
        self._max_bytes_per_s = max_bytes_per_s
        self._fetching: Fetching | None = None
        self._links: dict[str, SourceLink] = {}
        self._looks = False  # into the hub's cache
        self._arrivals = Arrivals(
            cache, shelf, on_bytes, on_event=self._handle, on_error=self._fail
        )
        self._stopping: asyncio.Event
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._progress = FetchProgress(here_bytes=0, total_bytes=0, doing=f"asks {COORDINATOR}")
        self._thread = threading.Thread(target=self._main, name="fetch", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------- for threads that load

    def model(self) -> ModelDescription:
        """Return what the model consists of, as soon as the coordinator has said so.

        Raises:
            FetchFailed: it does not.
        """
        return self._model.result()

    def begin(self, checkpoint: Checkpoint) -> None:
        """Begin to fetch the tensors of the layers.

        Args:
            checkpoint: made of `model`.
        """
        self._in_loop(lambda: self._begin(checkpoint))

    def wait_for(self, name: str) -> Place:
        """Return where a tensor is, as soon as it is there.

        Raises:
            FetchFailed: it cannot be had.
            CheckpointError: this machine cannot store it.
        """
        return self._arrivals.wait_for(name)

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came from other machines so far."""
        return self._arrivals.fetched_bytes

    @property
    def progress(self) -> FetchProgress:
        """How far the weights have arrived; may be asked in any thread."""
        return self._progress

    def close(self) -> None:
        """End fetching; what came is kept."""
        self._arrivals.end()
        self._in_loop(lambda: self._stopping.set())
        self._thread.join(_JOIN_S)

    def _in_loop(self, action: Callable[[], None]) -> None:
        self._started.wait()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(action)

    # -------------------------------------------------------------- the thread

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as exc:
            logger.exception("fetching weights cannot go on")
            self._fail(FetchFailed(str(internal_error(exc))))
        finally:
            self._started.set()
            self._loop = None
            self._fail(not_wanted())
            self._arrivals.give_up()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        on_uncaught(lambda exc: self._fail(FetchFailed(str(internal_error(exc)))))
        self._alarm = Alarm(self._on_timer, lambda stall_s: None)
        sources = [Source(COORDINATOR, lambda sha256: True, trusted=True)]
        for name, origin in self._peers.items():
            sources.append(Source(name, self._inquiry.holder(origin.layers)))
        self._fetching = Fetching(
            (),
            sources,
            now=self._alarm.now(),
            last=False,
            patience_s=PATIENCE_S,
            max_bytes_per_s=self._max_bytes_per_s,
        )
        self._started.set()
        try:
            for name, origin in {COORDINATOR: self._coordinator, **self._peers}.items():
                self._links[name] = self._link(name, origin)
            self._do(self._fetching.begin)
            await self._watch()
        finally:
            self._alarm.cancel()
            for link in self._links.values():
                link.close()
            self._arrivals.close()

    async def _watch(self) -> None:
        """Return once the weights are not wanted any more."""
        asked_at = 0.0
        while not self._stopping.is_set() and self._is_wanted():
            now = time.monotonic()
            if now >= asked_at + _ASK_EVERY_S:
                asked_at = now
                self._ask()
            if self._inquiry.is_overdue(now):
                self._fail_if_not_told("it may be busy, or the network be cut.")
            self._tell()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _LOOK_EVERY_S)

    # -------------------------------------------------------------- the coordinator's answers

    def _ask(self) -> None:
        """Ask the coordinator for what is not known yet; look for it here first."""
        if self._inquiry.model is None:
            self._ask_coordinator()
        elif self._inquiry.unknown and not self._looks:
            self._looks = True
            self._arrivals.disk_job(self._look_in_hub_cache, self._found_in_hub_cache)

    def _ask_coordinator(self) -> None:
        if question := self._inquiry.question(time.monotonic()):
            self._links[COORDINATOR].send(question)

    def _model_told(self, report: ModelReport, frames: tuple[Frame, ...]) -> None:
        try:
            self._inquiry.model_told(report, frames)
        except FetchFailed as exc:
            self._fail(exc)
        else:
            if self._inquiry.model and not self._model.done():
                self._model.set_result(self._inquiry.model)

    def _begin(self, checkpoint: Checkpoint) -> None:
        try:
            self._inquiry.begin(checkpoint)
        except CheckpointError as exc:
            self._fail(exc)
        else:
            self._ask()

    def _digests_told(self, report: DigestsReport, frames: tuple[Frame, ...]) -> None:
        try:
            told = self._inquiry.digests_told(report, frames, lambda: self._on_bytes(1))
            new = [
                Wanted(sha256, tensor.nbytes, tensor.name)
                for tensor, sha256 in told.found
                if self._arrivals.expect(tensor.name, sha256, tensor.nbytes)
            ]
        except FetchFailed as exc:
            self._fail(exc)
            return
        self._arrivals.lose(told.lost, told.why)
        if told.found or told.lost:
            self._tell_wanted(new)

    def _tell_wanted(self, new: Iterable[Wanted]) -> None:
        """Have tensors fetched once there is room for them, in the order of these calls."""
        told = WantedMore(tuple(new), last=not self._inquiry.unknown)
        sizes, missing = self._arrivals.sizes, self._arrivals.missing

        def prepare() -> None:
            here = (size for sha256, size in missing.items() if self._cache.has(sha256, size))
            self._cache.make_room(sum(missing.values()) - sum(here), sizes.keys())
            if told.last and sizes:
                self._cache.note_model(self._source.name or self._source.kind, sizes)

        self._arrivals.disk_job(prepare, lambda _: self._handle(told))

    def _look_in_hub_cache(self) -> dict[str, Place]:
        """Return where tensors are that another program of this machine got from the hub.

        The coordinator itself may be that, on this machine.
        """
        if self._source.kind != "hub":
            return {}
        by_file: dict[str, list[TensorInfo]] = {}
        for tensor in self._inquiry.unknown:
            by_file.setdefault(tensor.file, []).append(tensor)
        places: dict[str, Place] = {}
        for name, tensors in by_file.items():
            try:
                if (file := held_file(self._source, name)) is not None:
                    found = places_in_file(file, tensors)
                    places.update(zip((one.name for one in tensors), found, strict=True))
            except CheckpointError as exc:
                logger.warning("%s Asking other machines for these weights.", exc)
        return places

    def _found_in_hub_cache(self, places: dict[str, Place]) -> None:
        """Use what was found, and ask the coordinator about the others."""
        self._looks = False
        found = self._inquiry.placed(places)
        for name in found:
            self._arrivals.place(name, places[name])
        if found and not self._inquiry.unknown:
            self._tell_wanted(())
        self._ask_coordinator()

    # -------------------------------------------------------------- sources

    def _link(self, name: str, origin: Origin) -> SourceLink:
        return SourceLink(
            origin.addresses,
            origin.login,
            on_message=lambda message, frames: self._received(name, message, frames),
            on_up=lambda: self._up(name),
            on_down=lambda why: self._handle(SourceDown(name, why)),
            on_failed=lambda why: self._source_failed(name, why),
        )

    def _up(self, name: str) -> None:
        self._handle(SourceUp(name))
        if name == COORDINATOR:
            self._ask()

    def _source_failed(self, name: str, why: str) -> None:
        self._handle(SourceFailed(name, why))
        if name == COORDINATOR:
            self._fail_if_not_told(why)

    def _fail_if_not_told(self, why: str) -> None:
        """The coordinator will say nothing any more."""
        if what := self._inquiry.not_told:
            self._fail(FetchFailed(f"The coordinator does not say {what}: {why}"))

    def _received(self, name: str, message: ToReader, frames: tuple[Frame, ...]) -> None:
        match message:
            case Chunk(sha256=sha256, offset=offset):
                self._chunk(name, sha256, offset, frames[0])
            case NoChunk(sha256=sha256, offset=offset, reason="absent"):
                if self._arrivals.expects(sha256):
                    self._handle(ChunkAbsent(name, sha256, offset))
            case NoChunk(sha256=sha256, offset=offset, message=why):
                if self._arrivals.expects(sha256):
                    self._handle(ChunkRefused(name, sha256, offset, why))
            case ModelReport():
                if name == COORDINATOR:
                    self._model_told(message, frames)
            case DigestsReport():
                if name == COORDINATOR:
                    self._digests_told(message, frames)
            case Refused(message=why):
                self._links[name].close()
                self._source_failed(name, why)
            case Pong():
                pass
            case _:
                assert_never(message)

    # -------------------------------------------------------------- what fetching orders

    @property
    def _machine(self) -> Fetching:
        assert self._fetching is not None
        return self._fetching

    def _handle(self, event: Event) -> None:
        self._do(lambda now: self._machine.handle(event, now))

    def _on_timer(self) -> None:
        for link in list(self._links.values()):
            link.deliver_waiting()  # before any of them is taken for silent
        self._do(self._machine.on_timer)

    def _do(self, decide: Callable[[float], Iterable[Action]]) -> None:
        """Have the state machine decide, and do what it says."""
        if self._arrivals.error is None:
            for action in decide(self._alarm.now()):
                self._perform(action)
            self._alarm.set(self._machine.next_deadline())

    def _chunk(self, name: str, sha256: str, offset: int, data: Frame) -> None:
        arrivals = self._arrivals
        if arrivals.error is not None or not arrivals.expects(sha256):
            return
        event = ChunkArrived(name, sha256, offset, len(data))
        actions = self._machine.handle(event, self._alarm.now())
        if Keep(name, sha256, offset) in actions:
            arrivals.keep(name, sha256, offset, data)
        self._do(lambda now: [one for one in actions if not isinstance(one, Keep)])
        arrivals.write(sha256)

    def _perform(self, action: Action) -> None:
        match action:
            case Claim() | Forget() | Check():
                self._arrivals.perform(action)
            case Ask(source=name, sha256=sha256, offset=offset, length=length):
                self._links[name].send(ReadChunk(sha256=sha256, offset=offset, length=length))
            case Keep():
                raise AssertionError("only bytes that have just come are kept")
            case CloseSource(source=name, why=why):
                self._links[name].close()
                if name == COORDINATOR:
                    self._fail_if_not_told(f"it {why}")
            case Log(text=text, level=level):
                logger.log(_LEVELS[level], "%s", text)
            case Finished():
                pass
            case Failed(message=message):
                self._fail(FetchFailed(f"{layers_text(self._layers).capitalize()}: {message}"))
            case _:
                assert_never(action)

    def _fail(self, error: CheckpointError) -> None:
        """Let nobody wait any more; nothing after the first time."""
        self._arrivals.fail(error)
        if not self._model.done():
            self._model.set_exception(FetchFailed(str(error)))

    def _tell(self) -> None:
        """Update what `progress` tells."""
        machine, now = self._machine, self._alarm.now()
        coming = machine.bytes_done - self._arrivals.stored_bytes
        asked = f"asks {COORDINATOR}" if self._inquiry.model is None else self._inquiry.doing
        self._progress = FetchProgress(
            here_bytes=max(0, min(self._inquiry.total_bytes, self._arrivals.placed_bytes + coming)),
            total_bytes=self._inquiry.total_bytes,
            bytes_per_s=machine.rate(now),
            doing=(asked or machine.waits_for(now) or self._from_text())[:256],
        )

    def _from_text(self) -> str:
        givers = [name for name, given in self._machine.bytes_by_source.items() if given]
        return f"from {list_text(givers)}" if givers else ""
