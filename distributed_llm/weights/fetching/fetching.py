"""Fetches tensors from several sources at once: what its events mean, and when it ends. Pure.

Tensors are fetched in about the order in which they are needed. Each source is asked for as many
chunks as its link carries (`fetch_link`), and `fetch_asking` chooses which. What a source owes is
asked of another one

- at once, when its connection is lost;
- when it is silent, for `SILENCE_S`;
- when another source has nothing else to do, or may not run further ahead, and is much faster.

The first copy that arrives is kept. Bytes that are asked for or not written yet stay within
`WINDOW_BYTES`; the last part of it is for second copies, so that a slow source never blocks it.

A tensor with the wrong hash is fetched again as a whole, from one source alone while that one can
give it. If its hash is right then, the edge compares and tells who gave other bytes; if it is
wrong, that one source did. Who gives wrong bytes is not used any more, and what it gave of other
tensors is dropped. The trusted source gets a second chance; after that a machine must be broken.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal, assert_never

from distributed_llm.common.log_limit import LogLimit, left_out_text
from distributed_llm.common.wording import duration_text, list_text, size_text, times_text
from distributed_llm.weights.fetching.asking import Asking
from distributed_llm.weights.fetching.book import Book
from distributed_llm.weights.fetching.events import (
    MAX_SOURCES,
    Action,
    Check,
    ChunkAbsent,
    ChunkArrived,
    ChunkRefused,
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
from distributed_llm.weights.fetching.link import SILENCE_S, Link
from distributed_llm.weights.fetching.pace import RateMeter
from distributed_llm.weights.fetching.tensor import DISK, Tensor, TensorCause, TensorState
from distributed_llm.weights.fetching.words import tensors_text, tried_text, waits_for_text

PATIENCE_S = 30.0
"""Time for which sources are waited for unless told otherwise, seconds."""

_LOOK_EVERY_S = 0.25
_MOST_TRUSTED_ERRORS = 2
_MOST_UNEXPLAINED_ERRORS = 5
_LOG_KIND = "fetching weights"

_TensorEvent = TensorClaimed | TensorBusy | TensorHere | Written | TensorStored | TensorWrong
_SourceEvent = SourceAdded | SourceUp | SourceDown | SourceFailed


class Fetching:
    """One fetch, from `begin` to `Finished` or `Failed`.

    Args:
        wanted: tensors in the order in which they are needed; repeated ones count once.
        sources: at most `MAX_SOURCES`; all of them are down at first.
        now: clock seconds.
        last: whether there will be no `WantedMore`.
        patience_s: that is waited for bytes, if only a source can take fetching further.
        max_bytes_per_s: None is without limit.
    """

    def __init__(
        self,
        wanted: Iterable[Wanted],
        sources: Iterable[Source],
        *,
        now: float,
        last: bool = True,
        patience_s: float = PATIENCE_S,
        max_bytes_per_s: float | None = None,
    ) -> None:
        self._book = Book(wanted, sources)
        self._asking = Asking(self._book, max_bytes_per_s)
        self._meter = RateMeter(now)
        self._log_limit = LogLimit({})
        self._last = last
        self._patience_s = patience_s
        self._progress_at = self._at = now
        self._ended = False

    # -------------------------------------------------------------- for people

    @property
    def bytes_total(self) -> int:
        """Bytes of all tensors that are wanted so far."""
        return self._book.bytes_total

    @property
    def bytes_done(self) -> int:
        """Bytes in the cache or in partial files."""
        return sum(tensor.written for tensor in self._book.tensors.values())

    @property
    def bytes_by_source(self) -> dict[str, int]:
        """Bytes that were kept, by the names of the sources that gave them."""
        return {name: link.given_bytes for name, link in self._book.links.items()}

    def rate(self, now: float) -> float:
        """Return bytes per second over the last seconds."""
        return self._meter.rate(now)

    def waits_for(self, now: float) -> str:
        """Return what keeps bytes from coming, for people; empty if nothing does."""
        return waits_for_text(self._book, now)

    # -------------------------------------------------------------- events and time

    def begin(self, now: float) -> list[Action]:
        """Order what can be ordered before anything has happened."""
        return list(self._go_on(now))

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take an event; return what to do, which is nothing once fetching has ended.

        Raises:
            IllegalTransition: the edge told something of a tensor that cannot be.
            KeyError: the edge named a source or tensor that it was not told of.
            ValueError: the edge told of bytes or tensors that cannot be.
        """
        if self._ended:
            return []
        actions: list[Action] = []
        for action in self._take(event, now):
            actions.append(action)
            if self._ended:
                return actions
        return [*actions, *self._go_on(now)]

    def next_deadline(self) -> float | None:
        """Return when `on_timer` is next due, clock seconds; None if never."""
        if self._ended:
            return None
        deadlines = [
            self._asking.paced_until,
            self._progress_at + self._patience_s,
            self._log_limit.next_deadline() or math.inf,
            *(link.next_deadline(self._at) for link in self._book.links.values()),
            *(tensor.look_at for tensor in self._book.busy.values()),
        ]
        # What was due when something last happened waits for something else to happen.
        at = min((at for at in deadlines if at > self._at), default=math.inf)
        return None if at == math.inf else at

    def on_timer(self, now: float) -> list[Action]:
        """Do what is due."""
        return [] if self._ended else list(self._go_on(now))

    def _take(self, event: Event, now: float) -> Iterator[Action]:
        match event:
            case SourceAdded() | SourceUp() | SourceDown() | SourceFailed():
                yield from self._take_of_source(event, now)
            case ChunkArrived():
                yield from self._arrived(event, now)
            case ChunkAbsent(name, sha256, offset) | ChunkRefused(name, sha256, offset) if not (
                self._book.links[name].owes(sha256, offset)
            ):
                pass  # nobody asked
            case ChunkAbsent(name, sha256, offset):
                self._book.unasked(name, sha256, offset)
                self._book.links[name].lacks(sha256, offset, now)
                yield from self._end_if_hopeless([self._book.tensors[sha256]])
            case ChunkRefused(name, sha256, offset, why):
                self._book.unasked(name, sha256, offset)
                self._book.links[name].refused(sha256, offset, why, now)
                yield from self._note(f"{name} refused weights: {why}", now, "warning")
                yield from self._end_if_hopeless([self._book.tensors[sha256]])
            case WantedMore(wanted, last):
                if self._last:
                    raise ValueError("there were to be no more tensors")
                self._book.want(wanted)
                self._last = last
            case _:
                yield from self._take_of_tensor(event, now)

    def _take_of_source(self, event: _SourceEvent, now: float) -> Iterator[Action]:
        if isinstance(event, SourceAdded):
            yield from self._added(event.source, now)
            return
        link = self._book.links[event.source]
        if link.closed:
            return
        match event:
            case SourceUp():
                self._book.drop_owed(link, "")
                link.connected()
            case SourceDown():
                self._book.drop_owed(link, event.why)
            case SourceFailed():
                self._book.drop_owed(link, event.why)
                link.closed = True
                text = f"{event.source} gives no weights: {event.why}"
                yield from self._note(text, now, "warning")
                yield from self._end_if_hopeless(self._book.tensors.values())
            case _:
                assert_never(event)

    def _take_of_tensor(self, event: _TensorEvent, now: float) -> Iterator[Action]:
        tensor = self._book.tensors[event.sha256]
        if isinstance(event, TensorBusy):
            self._book.put_off(tensor, now + _LOOK_EVERY_S)
            return
        self._progress_at = now
        match event:
            case TensorClaimed():
                tensor.enter(TensorCause.CLAIMED)
                tensor.begin(event.done_bytes)
                yield from self._check_if_whole(tensor)
            case TensorHere():
                self._book.done(tensor, TensorCause.WAS_HERE)
            case Written():
                tensor.written_to(event.done_bytes)
                yield from self._check_if_whole(tensor)
            case TensorStored():
                self._book.done(tensor, TensorCause.WAS_RIGHT)
                for name in event.suspects:
                    yield from self._suspect(self._book.links[name], tensor, now)
            case TensorWrong():
                tensor.enter(TensorCause.WAS_WRONG)
                yield from self._wrong(tensor, now)
            case _:
                assert_never(event)

    def _go_on(self, now: float) -> Iterator[Action]:
        """Order whatever can be ordered now, or end."""
        self._at = now
        book = self._book
        if self._last and book.all_done:
            self._ended = True
            yield Finished()
            return
        for kind, count in self._log_limit.take_left_out(now=now):
            yield Log(left_out_text(kind, count))
        for link in book.links.values():
            if link.falls_silent(now):
                text = f"{link.source.name} has sent no weights for {duration_text(SILENCE_S)}"
                yield from self._note(text, now)
        yield from self._asking.go_on(now)
        lacking = book.lacking()
        if not lacking or self._asking.paced_until > now:
            self._progress_at = now  # sources are not what is waited for
        elif self._progress_at + self._patience_s <= now and not self._is_anything_due():
            yield self._fail(
                f"No bytes of {tensors_text(lacking)} have come for "
                f"{duration_text(self._patience_s)}. {tried_text(book, lacking[0])}"
            )

    # -------------------------------------------------------------- sources

    def _added(self, source: Source, now: float) -> Iterator[Action]:
        known = self._book.links.get(source.name)
        if known is not None:
            known.expects(source)
        elif len(self._book.links) < MAX_SOURCES:
            self._book.add(source)
        else:
            text = f"{source.name} is not asked for weights: there are {MAX_SOURCES} sources"
            yield from self._note(text, now)

    def _close(self, link: Link, why: str, now: float) -> Iterator[Action]:
        """Use a source no more, and drop what it gave of tensors that are not whole yet."""
        if link.closed:
            return
        name = link.source.name
        self._book.drop_owed(link, why)
        link.closed = True
        yield CloseSource(name, why)
        yield from self._note(f"{name} is not asked for weights any more: it {why}", now, "warning")
        for sha256, tensor in self._book.open.items():
            if tensor.state is TensorState.OPEN and name in tensor.givers:
                tensor.begin(0)
                yield Forget(sha256)
        yield from self._end_if_hopeless(self._book.tensors.values())

    def _suspect(self, link: Link, tensor: Tensor, now: float) -> Iterator[Action]:
        """A source gave bytes that differ from the right ones."""
        why = f"gave wrong bytes of {tensor.wanted.name}"
        if not link.source.trusted:
            yield from self._close(link, why, now)
            return
        text = f"{link.source.name} {why}, and then right ones: its memory or disk may be broken"
        yield from self._note(text, now, "warning")

    # -------------------------------------------------------------- tensors

    def _arrived(self, event: ChunkArrived, now: float) -> Iterator[Action]:
        link = self._book.links[event.source]
        length = link.delivered(event.sha256, event.offset, now)
        if length is None:
            return
        if event.nbytes != length:
            self._book.unasked(event.source, event.sha256, event.offset)
            why = f"sent {size_text(event.nbytes)} where it was asked for {size_text(length)}"
            yield from self._close(link, why, now)
            return
        tensor = self._book.tensors[event.sha256]
        chunk = tensor.chunks.get(event.offset)
        if chunk is None or event.source not in chunk.askers:
            return
        chunk.askers.discard(event.source)
        if chunk.arrived:
            return
        chunk.arrived = True
        tensor.givers.add(event.source)
        link.given_bytes += length
        self._meter.add(length, now)
        self._progress_at = now
        yield Keep(event.source, event.sha256, event.offset)

    def _check_if_whole(self, tensor: Tensor) -> Iterator[Action]:
        if tensor.written == tensor.wanted.nbytes:
            tensor.enter(TensorCause.ALL_WRITTEN)
            yield Check(tensor.wanted.sha256)

    def _wrong(self, tensor: Tensor, now: float) -> Iterator[Action]:
        """Fetch a tensor again that had the wrong hash, and find who is to blame."""
        name, givers = tensor.wanted.name, tensor.givers
        tensor.begin(0)
        tensor.alone, tensor.only = True, None
        if not givers:
            yield self._fail(
                f"{name} is empty, and is said to have another SHA-256 than nothing has: the "
                "coordinator does not know its model rightly."
            )
            return
        if len(givers) != 1 or DISK in givers:
            tensor.unexplained_errors += 1
        else:
            link = self._book.links[next(iter(givers))]
            if not link.source.trusted:
                yield from self._close(link, f"gave wrong bytes of {name}", now)
                return
            tensor.trusted_errors += 1
        whom = list_text(sorted(giver or "an earlier run" for giver in givers))
        if tensor.trusted_errors == _MOST_TRUSTED_ERRORS:
            yield self._fail(
                f"{name} came from {whom} with wrong bytes {times_text(_MOST_TRUSTED_ERRORS)}: "
                "memory or disk of that machine or of this one is broken. Check both."
            )
        elif tensor.unexplained_errors == _MOST_UNEXPLAINED_ERRORS:
            yield self._fail(
                f"{name} had wrong bytes {times_text(_MOST_UNEXPLAINED_ERRORS)}, at last from "
                f"{whom}, and nobody gave all of it. Check the memory and disk of this machine."
            )
        else:
            text = f"{name} had wrong bytes, from {whom}, and is fetched again"
            yield from self._note(text, now, "warning")

    # -------------------------------------------------------------- giving up

    def _is_anything_due(self) -> bool:
        """Whether a source that is not silent owes something."""
        return any(link.owed_bytes for link in self._book.heard())

    def _end_if_hopeless(self, tensors: Iterable[Tensor]) -> Iterator[Action]:
        """End if nobody has some tensors, connected or not, and the trusted source neither."""
        links = self._book.links.values()
        if self._ended or not any(link.source.trusted for link in links):
            return
        states = (TensorState.WAITING, TensorState.OPEN)
        lost = [
            tensor
            for tensor in tensors
            if tensor.state in states
            and not any(link.may_hold(tensor.wanted.sha256) for link in links)
        ]
        if lost:
            yield self._fail(f"Nobody has {tensors_text(lost)}. {tried_text(self._book, lost[0])}")

    def _fail(self, message: str) -> Failed:
        self._ended = True
        return Failed(message)

    def _note(
        self, text: str, now: float, level: Literal["info", "warning"] = "info"
    ) -> list[Action]:
        return [Log(text, level)] if self._log_limit.admits(_LOG_KIND, now=now) else []

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        self._book.validate()
        assert self._ended or not (self._last and self._book.all_done)
