"""A made-up network with a virtual clock, an edge and disks, for tests of fetching.

The edge does what the docstring of `fetch_events` says, and checks on the way that every ask is for
bytes that are missing, that nothing is written twice, and that memory stays within the window.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from distributed_llm.common.messages import MAX_CHUNK_BYTES
from distributed_llm.weights.fetching.events import (
    GRAIN_BYTES,
    WINDOW_BYTES,
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
    SourceAdded,
    SourceDown,
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
from distributed_llm.weights.fetching.fetching import Fetching

KIB, MIB = 1 << 10, 1 << 20
MS = 1e-3


def sha(number: int) -> str:
    return f"{number:064x}"


def tensors(*sizes: int) -> tuple[Wanted, ...]:
    return tuple(Wanted(sha(i), nbytes, f"layer.{i}") for i, nbytes in enumerate(sizes))


@dataclass
class Peer:
    """A source.

    Attributes:
        bytes_per_s: of its link.
        latency_s: from here to there, and back as long.
        lacks: tensors that it does not have.
        expected: whether it is also expected to have those.
        lies: returns whether it gives wrong bytes of a tensor from an offset.
        silences: begin and end of times in which nothing comes from it, in order.
        refuses: how many chunks it refuses before it gives any.
    """

    name: str
    bytes_per_s: float = 10 * MIB
    latency_s: float = 1 * MS
    trusted: bool = False
    lacks: frozenset[str] = frozenset()
    expected: bool = True
    lies: Callable[[str, int], bool] = lambda sha256, offset: False
    silences: Sequence[tuple[float, float]] = ()
    refuses: int = 0
    up: bool = False
    closed: bool = False
    session: int = 0
    free_at: float = 0.0
    asked: dict[tuple[str, int], int] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        return Source(self.name, lambda s: self.expected or s not in self.lacks, self.trusted)


@dataclass
class File:
    """A partial file and what waits in memory for it: who gave which bytes."""

    done: int = 0
    early: dict[int, int] = field(default_factory=dict)
    grains: dict[int, tuple[str, bool]] = field(default_factory=dict)
    wrong: dict[int, tuple[str, bool]] = field(default_factory=dict)
    whole: bool = False


class Network:
    """Runs one fetch.

    Attributes:
        asks: with their times, all that were made.
        told: actions but asks, keeps and claims, with their times.
        kept_from: tensors and offsets of the chunks that were kept, by source.
        most_bytes: that were asked for or held in memory at a time, second copies included.
        on_claim: called with what is claimed.
        ended_at: virtual seconds.
    """

    def __init__(
        self,
        wanted: Sequence[Wanted],
        peers: Iterable[Peer],
        *,
        last: bool = True,
        patience_s: float = 30.0,
        max_bytes_per_s: float | None = None,
        disk_bytes_per_s: float = 1e12,
    ) -> None:
        self.now = 0.0
        self.peers = {peer.name: peer for peer in peers}
        self.wanted = {each.sha256: each for each in wanted}
        self.files = {each.sha256: File() for each in wanted}
        self.busy_until: dict[str, float] = {}
        self.here_at: dict[str, float] = {}
        self.asks: list[tuple[float, Ask]] = []
        self.arrivals: list[tuple[float, str, int]] = []
        self.told: list[tuple[float, Action]] = []
        self.kept_from: dict[str, list[tuple[str, int]]] = defaultdict(list)
        self.most_bytes = 0
        self.ended_at = -1.0
        self.end: Finished | Failed | None = None
        self.on_claim: Callable[[str], None] = lambda sha256: None
        self._disk_bytes_per_s = disk_bytes_per_s
        self._disk_free_at = 0.0
        self._numbers = count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.fetching = Fetching(
            wanted,
            [peer.source for peer in self.peers.values()],
            now=0.0,
            last=last,
            patience_s=patience_s,
            max_bytes_per_s=max_bytes_per_s,
        )
        self.at(0.0, lambda: self._do(self.fetching.begin(self.now)))

    # ---------------------------------------------------------------- the script

    def at(self, time: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time, next(self._numbers), call))

    def up(self, name: str, at: float = 0.0) -> None:
        def connect() -> None:
            peer = self.peers[name]
            if not peer.closed:
                peer.up, peer.free_at = True, self.now
                self.handle(SourceUp(name))

        self.at(at, connect)

    def down(self, name: str, at: float) -> None:
        def disconnect() -> None:
            peer = self.peers[name]
            if not peer.closed:
                peer.up = False
                peer.session += 1
                peer.asked.clear()
                self.handle(SourceDown(name, "the connection was lost"))

        self.at(at, disconnect)

    def want(self, wanted: Sequence[Wanted], at: float) -> None:
        """Want more, and nothing after that."""

        def tell() -> None:
            for each in wanted:
                self.wanted[each.sha256] = each
                self.files.setdefault(each.sha256, File())
            self.handle(WantedMore(tuple(wanted), last=True))

        self.at(at, tell)

    def add(self, peer: Peer, at: float) -> None:
        """Add a source, which is connected at once."""

        def tell() -> None:
            self.peers[peer.name] = peer
            self.handle(SourceAdded(peer.source))

        self.at(at, tell)
        self.up(peer.name, at)

    def announce(self, name: str, at: float) -> None:
        """A source has all tensors from now on, and that becomes known."""

        def tell() -> None:
            self.peers[name].lacks = frozenset()
            self.handle(SourceAdded(self.peers[name].source))

        self.at(at, tell)

    def run(self, until: float = 1e4) -> "Network":
        """Run until the fetch ends, or nothing can happen any more."""
        for step in count():
            if self.end is not None:
                break
            assert step < 100_000, "the fetch has no end"
            deadline = self.fetching.next_deadline()
            at = self._due[0][0] if self._due else math.inf
            if deadline is not None and deadline < at:
                assert deadline > self.now, "time passes between timers"
                if deadline > until:
                    break
                self.now = deadline
                self._do(self.fetching.on_timer(self.now))
            elif self._due and at <= until:
                self.now, _, call = heapq.heappop(self._due)
                call()
            else:
                break
            self.fetching.validate()
            self._check_memory()
        return self

    def finish(self, until: float = 1e4) -> float:
        """Run until all is there; return how long that took."""
        self.run(until)
        assert self.end == Finished(), self.end
        assert all(file.whole for file in self.files.values())
        assert self.fetching.bytes_done == self.fetching.bytes_total
        return self.ended_at

    def handle(self, event: Event) -> None:
        self._do(self.fetching.handle(event, self.now))

    # ---------------------------------------------------------------- the edge

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            assert self.end is None, "nothing is ordered after the end"
            match action:
                case Ask():
                    self._ask(action)
                case Claim(sha256):
                    self.at(self.now, partial(self._claim, sha256))
                case Keep(source, sha256, offset):
                    self._keep(source, sha256, offset)
                case Check(sha256):
                    assert self.files[sha256].done == self.wanted[sha256].nbytes
                    self.at(self.now, partial(self._check, sha256))
                case Forget(sha256):
                    self.files[sha256] = File(wrong=self.files[sha256].wrong)
                case CloseSource(name):
                    self.peers[name].up, self.peers[name].closed = False, True
                    self.peers[name].session += 1
                    self.peers[name].asked.clear()
                case Finished() | Failed():
                    self.end, self.ended_at = action, self.now
                case Log():
                    pass
            if not isinstance(action, Ask | Claim | Keep):
                self.told.append((self.now, action))

    def _claim(self, sha256: str) -> None:
        self.on_claim(sha256)
        file = self.files[sha256]
        if self.here_at.get(sha256, 1e9) <= self.now:
            file.whole = True
            self.handle(TensorHere(sha256))
        elif self.busy_until.get(sha256, -1.0) > self.now:
            self.handle(TensorBusy(sha256))
        else:
            self.handle(TensorClaimed(sha256, file.done))

    def _ask(self, ask: Ask) -> None:
        peer, file, tensor = self.peers[ask.source], self.files[ask.sha256], self.wanted[ask.sha256]
        self.asks.append((self.now, ask))
        assert peer.up
        assert not peer.closed
        end = ask.offset + ask.length
        assert 0 < ask.length <= MAX_CHUNK_BYTES
        assert end <= tensor.nbytes
        assert end % GRAIN_BYTES == 0 or end == tensor.nbytes
        assert ask.offset >= file.done, "bytes that are asked for are missing"
        assert not any(
            at < end and ask.offset < at + length for at, length in file.early.items()
        ), "bytes that are asked for are missing"
        assert (ask.sha256, ask.offset) not in peer.asked
        peer.asked[ask.sha256, ask.offset] = ask.length
        begins = max(peer.free_at, self.now + peer.latency_s)
        gives = ask.sha256 not in peer.lacks and not peer.refuses
        peer.free_at = begins + (ask.length / peer.bytes_per_s if gives else 0.0)
        for begin, stop in peer.silences:
            if begin < peer.free_at < stop:
                peer.free_at = stop
        peer.refuses -= bool(peer.refuses)
        session = peer.session
        answer: Event = ChunkArrived(ask.source, ask.sha256, ask.offset, ask.length)
        if not gives:
            answer = ChunkRefused(ask.source, ask.sha256, ask.offset, "cannot read the file")
            if ask.sha256 in peer.lacks:
                answer = ChunkAbsent(ask.source, ask.sha256, ask.offset)

        def arrive() -> None:
            if peer.session == session and self.end is None:
                del peer.asked[ask.sha256, ask.offset]
                self.arrivals.append((self.now, ask.source, ask.length * gives))
                self._lengths = {ask.offset: ask.length}
                self.handle(answer)

        self.at(peer.free_at + peer.latency_s, arrive)

    def _keep(self, source: str, sha256: str, offset: int) -> None:
        file = self.files[sha256]
        length = self._lengths[offset]
        assert offset >= file.done, "nothing is written twice"
        assert offset not in file.early, "nothing is written twice"
        file.early[offset] = length
        self.kept_from[source].append((sha256, offset))
        right = not self.peers[source].lies(sha256, offset)
        for grain in range(offset // GRAIN_BYTES, -(-(offset + length) // GRAIN_BYTES)):
            file.grains[grain] = source, right
        if offset == file.done:
            self._append(sha256)

    def _append(self, sha256: str) -> None:
        """Write the next chunk, which takes the disk a while."""
        file = self.files[sha256]
        length = file.early[file.done]
        at = max(self._disk_free_at, self.now) + length / self._disk_bytes_per_s
        self._disk_free_at = at

        def written() -> None:
            if self.files[sha256] is file and self.end is None:
                del file.early[file.done]
                file.done += length
                self.handle(Written(sha256, file.done))
                if self.files[sha256] is file and file.done in file.early:
                    self._append(sha256)

        self.at(at, written)

    def _check(self, sha256: str) -> None:
        file = self.files[sha256]
        if not all(right for _, right in file.grains.values()):
            self.files[sha256] = File(wrong=file.grains)
            self.handle(TensorWrong(sha256))
            return
        suspects = {name for name, right in file.wrong.values() if not right and name}
        file.whole = True
        self.handle(TensorStored(sha256, tuple(sorted(suspects))))

    # ---------------------------------------------------------------- what is checked

    def _check_memory(self) -> None:
        held = sum(sum(file.early.values()) for file in self.files.values())
        owed = [(key, length) for peer in self.peers.values() for key, length in peer.asked.items()]
        missing = {
            (s, at): length
            for (s, at), length in owed
            if at >= self.files[s].done and at not in self.files[s].early
        }
        assert held + sum(missing.values()) <= WINDOW_BYTES, "the window is kept"
        self.most_bytes = max(self.most_bytes, held + sum(length for _, length in owed))

    @property
    def given(self) -> dict[str, int]:
        return self.fetching.bytes_by_source
