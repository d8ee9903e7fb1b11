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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import assert_never

from distributed_llm.common.alarm import Alarm
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.errors import internal_error
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
from distributed_llm.weights.arrivals import Arrivals, FetchFailed, not_wanted
from distributed_llm.weights.cache.content_cache import ContentCache
from distributed_llm.weights.fetch_disk import Entry, FetchDisk
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
    TensorBusy,
    TensorClaimed,
    TensorHere,
    TensorStored,
    TensorWrong,
    Wanted,
    WantedMore,
    Written,
)
from distributed_llm.weights.fetching.fetching import PATIENCE_S, Fetching
from distributed_llm.weights.giving.shelf import Place, Shelf
from distributed_llm.weights.inquiry import COORDINATOR, Inquiry
from distributed_llm.weights.source_link import SourceLink

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 0.5
"""Time between two questions to the coordinator about digests that are not known, seconds."""

_LOOK_EVERY_S = 0.25
"""Time between two looks whether the weights are still wanted, seconds."""

_JOIN_S = 2.0
_DiskEvent = TensorClaimed | TensorBusy | TensorHere | TensorStored | TensorWrong
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
        self.fetched_bytes = 0
        self._source = source
        self._layers = layers
        self._coordinator = coordinator
        self._peers = peers
        self._cache = cache
        self._shelf = shelf
        self._max_bytes_per_s = max_bytes_per_s
        self._on_bytes = on_bytes
        self._is_wanted = is_wanted
        self._arrivals = Arrivals()
        self._links: dict[str, SourceLink] = {}
        self._layers_of: dict[str, frozenset[int]] = {}  # by SHA-256; empty outside the layers
        self._disk = FetchDisk(cache, on_bytes, self._arrivals.fail)
        self._inquiry: Inquiry
        self._machine: Fetching
        self._stopping: asyncio.Event
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        doing = f"asks {COORDINATOR}"
        self._progress = FetchProgress(here_bytes=0, total_bytes=0, doing=doing)
        self._thread = threading.Thread(target=self._main, name="fetch", daemon=True)
        self._thread.start()

    # -------------------------------------------------------------- for threads that load

    def model(self) -> ModelDescription:
        """Return what the model consists of, as soon as the coordinator has said so.

        Raises:
            FetchFailed: it does not.
        """
        return self._arrivals.wait_for_model()

    def begin(self, checkpoint: Checkpoint) -> None:
        """Begin to fetch the tensors of the layers.

        Args:
            checkpoint: made of `model`.
        """
        self._in_loop(lambda: self._inquiry.begin(checkpoint))

    def wait_for(self, name: str) -> Place:
        """Return where a tensor is, as soon as it is there.

        Raises:
            FetchFailed: it cannot be had.
        """
        return self._arrivals.wait_for(name)

    @property
    def progress(self) -> FetchProgress:
        """How far the weights have arrived; may be asked in any thread."""
        return self._progress

    def close(self) -> None:
        """End fetching; what came is kept."""
        self._disk.ending = True
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
            self._arrivals.fail(FetchFailed(str(internal_error(exc))))
        finally:
            self._started.set()
            self._loop = None
            self._arrivals.fail(not_wanted())

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        on_uncaught(lambda exc: self._arrivals.fail(FetchFailed(str(internal_error(exc)))))
        self._alarm = Alarm(self._on_timer, lambda stall_s: None)
        sources = [Source(COORDINATOR, lambda sha256: True, trusted=True)]
        sources += [Source(name, self._holds(origin)) for name, origin in self._peers.items()]
        self._machine = Fetching(
            (),
            sources,
            now=self._alarm.now(),
            last=False,
            patience_s=PATIENCE_S,
            max_bytes_per_s=self._max_bytes_per_s,
        )
        self._inquiry = Inquiry(
            self._source,
            self._layers,
            send=lambda request: self._links[COORDINATOR].send(request),
            arrivals=self._arrivals,
            disk=self._disk,
            want=self._want,
            on_progress=lambda: self._on_bytes(1),
        )
        self._started.set()
        try:
            for name, origin in {COORDINATOR: self._coordinator, **self._peers}.items():
                self._links[name] = self._link(name, origin)
            self._do(self._machine.begin)
            await self._watch()
        finally:
            self._alarm.cancel()
            for link in self._links.values():
                link.close()
            self._disk.close()  # while the loop can still be told

    async def _watch(self) -> None:
        """Return once the weights are not wanted any more."""
        asked_at, loop = 0.0, asyncio.get_running_loop()
        while not self._stopping.is_set() and self._is_wanted():
            if loop.time() >= asked_at + _ASK_EVERY_S:
                asked_at = loop.time()
                self._inquiry.ask()
            self._inquiry.fail_if_late()
            self._tell()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _LOOK_EVERY_S)

    def _holds(self, origin: Origin) -> Callable[[str], bool]:
        held = {layer for one in origin.layers for layer in range(one.start, one.stop)}

        def holds(sha256: str) -> bool:
            layers = self._layers_of.get(sha256, frozenset())
            return not layers or not layers.isdisjoint(held)

        return holds

    # -------------------------------------------------------------- what is wanted

    def _want(self, found: Mapping[str, tuple[TensorInfo, str]], *, last: bool) -> None:
        """Have tensors fetched, of which the digests are known now, once there is room for them.

        Args:
            found: tensors and their SHA-256, by name.
            last: whether there will be no more.
        """
        entries, new = self._disk.entries, []
        for name, (tensor, sha256) in found.items():
            self._note_layer(name, sha256)
            entry = entries.get(sha256)
            if entry is None:
                entry = entries[sha256] = Entry(tensor.nbytes, [])
                new.append(Wanted(sha256, tensor.nbytes, name))
            elif entry.nbytes != tensor.nbytes:
                why = f"{name} and {entry.names[0]} cannot be the same bytes"
                why = f"What the coordinator says of the weights is wrong: {why}"
                self._arrivals.fail(FetchFailed(why))
                return
            entry.names.append(name)
            if entry.stored:
                self._arrivals.put(name, self._disk.place(sha256))
        told = WantedMore(tuple(new), last)
        sizes = {sha256: entry.nbytes for sha256, entry in entries.items()}
        missing = {sha256: one.nbytes for sha256, one in entries.items() if not one.stored}

        def prepare() -> None:
            here = (size for sha256, size in missing.items() if self._cache.has(sha256, size))
            self._cache.make_room(sum(missing.values()) - sum(here), sizes.keys())
            if last and sizes:
                self._cache.note_model(self._source.name or self._source.kind, sizes)

        self._disk.job(prepare, lambda _: self._handle(told))

    def _note_layer(self, name: str, sha256: str) -> None:
        assert self._inquiry.checkpoint is not None
        layer = self._inquiry.checkpoint.layer_of(name)
        layers = self._layers_of.get(sha256, frozenset())
        self._layers_of[sha256] = layers | ({layer} if layer is not None else set())

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
            self._inquiry.ask()

    def _source_failed(self, name: str, why: str) -> None:
        self._handle(SourceFailed(name, why))
        if name == COORDINATOR:
            self._inquiry.fail_if_not_told(why)

    def _received(self, name: str, message: ToReader, frames: tuple[Frame, ...]) -> None:
        match message:
            case Chunk(sha256=sha256, offset=offset):
                self._chunk(name, sha256, offset, frames[0])
            case NoChunk(sha256=sha256, offset=offset, reason="absent"):
                if sha256 in self._disk.entries:
                    self._handle(ChunkAbsent(name, sha256, offset))
            case NoChunk(sha256=sha256, offset=offset, message=why):
                if sha256 in self._disk.entries:
                    self._handle(ChunkRefused(name, sha256, offset, why))
            case ModelReport():
                if name == COORDINATOR:
                    self._inquiry.model_told(message, frames)
            case DigestsReport():
                if name == COORDINATOR:
                    self._inquiry.digests_told(message, frames)
            case Refused(message=why):
                self._links[name].close()
                self._source_failed(name, why)
            case Pong():
                pass
            case _:
                assert_never(message)

    # -------------------------------------------------------------- what fetching orders

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
        if self._arrivals.error is not None or sha256 not in self._disk.entries:
            return
        event = ChunkArrived(name, sha256, offset, len(data))
        actions = self._machine.handle(event, self._alarm.now())
        if Keep(name, sha256, offset) in actions:
            self.fetched_bytes += len(data)
            self._on_bytes(len(data))
            self._disk.keep(sha256, name, offset, data)
        self._do(lambda now: [one for one in actions if not isinstance(one, Keep)])
        if (done_bytes := self._disk.write(sha256)) is not None:
            self._handle(Written(sha256, done_bytes))

    def _perform(self, action: Action) -> None:
        match action:
            case Claim(sha256=sha256):
                self._disk.claim(sha256, self._on_disk)
            case Ask(source=name, sha256=sha256, offset=offset, length=length):
                self._links[name].send(ReadChunk(sha256=sha256, offset=offset, length=length))
            case Keep():
                raise AssertionError("only bytes that have just come are kept")
            case Forget(sha256=sha256):
                self._disk.forget(sha256)
            case Check(sha256=sha256):
                self._disk.check(sha256, self._on_disk)
            case CloseSource(source=name, why=why):
                self._links[name].close()
                if name == COORDINATOR:
                    self._inquiry.fail_if_not_told(f"it {why}")
            case Log(text=text, level=level):
                logger.log(_LEVELS[level], "%s", text)
            case Finished():
                pass
            case Failed(message=message):
                which = layers_text(self._layers).capitalize()
                self._arrivals.fail(FetchFailed(f"{which}: {message}"))
            case _:
                assert_never(action)

    def _on_disk(self, event: _DiskEvent) -> None:
        if isinstance(event, TensorHere | TensorStored):
            self._stored(event.sha256)
        self._handle(event)

    def _stored(self, sha256: str) -> None:
        """Let threads that load, and other machines, have a tensor that is in the cache now."""
        entry = self._disk.entries[sha256]
        entry.stored, entry.partial = True, None
        place = self._disk.place(sha256)
        self._shelf.put(sha256, place)
        for name in entry.names:
            self._arrivals.put(name, place)

    def _tell(self) -> None:
        """Update what `progress` tells."""
        machine, now = self._machine, self._alarm.now()
        coming = machine.bytes_done - self._disk.stored_bytes
        total_bytes = self._inquiry.total_bytes
        doing = self._inquiry.doing or machine.waits_for(now) or self._from_text()
        self._progress = FetchProgress(
            here_bytes=max(0, min(total_bytes, self._arrivals.placed_bytes + coming)),
            total_bytes=total_bytes,
            bytes_per_s=machine.rate(now),
            doing=doing[:256],
        )

    def _from_text(self) -> str:
        givers = [name for name, given in self._machine.bytes_by_source.items() if given]
        return f"from {list_text(givers)}" if givers else ""
