"""What fetching knows of a source: how fast it is, what it was asked for, what it lacks. Pure.

A source has a credit of chunks that it may owe. The credit grows while chunks come quickly, and
shrinks while they are slow; chunks are so large that one takes a fraction of a second. So every
source always has something to send, little waits at a slow one, and the bytes spread in proportion
to the speeds of the links.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from distributed_llm.common.messages import MAX_CHUNK_BYTES
from distributed_llm.weights.fetching.events import GRAIN_BYTES, Source

SILENCE_S = 1.5
"""A source that owes chunks is silent when nothing has come from it for this long, seconds."""

_FIRST_CREDIT = 2
_MOST_CREDIT = 48
_QUICK_S = 0.25
"""A chunk that came within this time came quickly, seconds."""

_SLOW_S = 0.5
"""A chunk that took longer was slow, seconds."""

_CHUNK_S = 0.1
"""Time that the link should need for one chunk, seconds."""

_MEMORY_S = 1.0
"""Seconds of work over which the speed of a link is taken; what is older counts half, and so on."""

_REFUSAL_PAUSE_S = 1.0
_MOST_REFUSALS = 3
"""Times that a source may refuse chunks of one tensor; then it counts as not having it."""


@dataclass
class _Asked:
    length: int
    asked_at: float


class Link:
    """One source, and the connection to it.

    Attributes:
        source: as given.
        up: whether it is connected.
        closed: whether it is not used any more.
        silent: whether it owes chunks and sends nothing.
        why: why it is not up, or closed; for people.
        credit: chunks that it may owe.
        chunk_bytes: that it is asked for at a time.
        owed_bytes: that it was asked for and has not sent.
        given_bytes: of it that were kept.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.up = self.closed = self.silent = False
        self.why = "not connected yet"
        self.given_bytes = 0
        self._reset()

    def _reset(self) -> None:
        self.credit = _FIRST_CREDIT
        self.chunk_bytes = GRAIN_BYTES
        self.silent = False
        self._asked: dict[tuple[str, int], _Asked] = {}
        self.owed_bytes = 0
        self._heard_at = math.inf  # or since when it owes something, if that is later
        self._work_bytes = self._work_s = 0.0
        self._absent: set[str] = set()
        self._refusals: dict[str, tuple[int, float, str]] = {}

    # -------------------------------------------------------------- how it comes and goes

    def connected(self) -> None:
        """It is up, and nothing is known of it."""
        self._reset()
        self.up, self.why = True, ""

    def gone(self, why: str) -> Iterator[tuple[str, int]]:
        """It is not up any more; return what it owed: tensors and offsets."""
        owed = self._asked
        self._reset()
        self.up, self.why = False, why
        return iter(owed)

    def expects(self, source: Source) -> None:
        """It is expected to hold what `source` says; that it lacked things is forgotten."""
        self.source = source
        self._absent.clear()
        self._refusals.clear()

    # -------------------------------------------------------------- what it has

    def may_hold(self, sha256: str) -> bool:
        """Return whether it may have a tensor, be it connected or not."""
        return not self.closed and sha256 not in self._absent and self.source.holds(sha256)

    def may_give(self, sha256: str, now: float) -> bool:
        """Return whether it may be asked for a tensor now."""
        return self.up and self._paused_until(sha256) <= now and self.may_hold(sha256)

    def why_not(self, sha256: str) -> str:
        """Return why a tensor cannot be had of it, for people."""
        refusal = self._refusals.get(sha256)
        if self.closed or not self.up:
            return self.why
        if refusal:
            return refusal[2]
        if not self.may_hold(sha256):
            return "does not have it"
        return "is connected and sends nothing"

    # -------------------------------------------------------------- what it owes

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked for another chunk."""
        return self.up and not self.silent and len(self._asked) < self.credit

    def owes(self, sha256: str, offset: int) -> bool:
        """Return whether it was asked for a chunk that begins there and has not answered.

        That may have been for a larger chunk, which was cut since then, or before the
        tensor was begun anew. It is not asked again for the same place: answers would look alike.
        """
        return (sha256, offset) in self._asked

    def asked(self, sha256: str, offset: int, length: int, now: float) -> None:
        """It is asked for a chunk."""
        if not self._asked:
            self._heard_at = now
        self._asked[sha256, offset] = _Asked(length, now)
        self.owed_bytes += length

    def delivered(self, sha256: str, offset: int, now: float) -> int | None:
        """It has sent a chunk; return how many bytes it was asked for, None if it was not asked."""
        asked = self._asked.get((sha256, offset))
        if asked is None:
            return None
        self._measure(asked, now)
        self._answered(sha256, offset, now)
        took_s = now - asked.asked_at
        if took_s < _QUICK_S:
            self.credit = min(self.credit + 1, _MOST_CREDIT)
        elif took_s > _SLOW_S:
            self.credit = max(self.credit - 1, 1)
        return asked.length

    def lacks(self, sha256: str, offset: int, now: float) -> None:
        """It has said that it does not have a tensor."""
        self._answered(sha256, offset, now)
        self._absent.add(sha256)

    def refused(self, sha256: str, offset: int, why: str, now: float) -> None:
        """It has not given a chunk; it is not asked for this tensor for a while."""
        self._answered(sha256, offset, now)
        times, until, _ = self._refusals.get(sha256, (0, -math.inf, ""))
        times += until <= now  # chunks that it was asked for together count once
        self._refusals[sha256] = (times, now + _REFUSAL_PAUSE_S, why)
        if times >= _MOST_REFUSALS:
            self._absent.add(sha256)

    def _answered(self, sha256: str, offset: int, now: float) -> None:
        asked = self._asked.pop((sha256, offset), None)
        self.owed_bytes -= asked.length if asked else 0
        self._heard_at = now
        self.silent = False

    def _measure(self, asked: _Asked, now: float) -> None:
        self._work_bytes += asked.length
        self._work_s += now - self._heard_at
        while self._work_s > _MEMORY_S:
            self._work_s /= 2
            self._work_bytes /= 2
        if self._work_s:
            grains = int(self._work_bytes / self._work_s * _CHUNK_S) // GRAIN_BYTES
            self.chunk_bytes = min(
                max(grains, 1) * GRAIN_BYTES, 2 * self.chunk_bytes, MAX_CHUNK_BYTES
            )

    # -------------------------------------------------------------- when it will send

    def sends_within_s(self, nbytes: int) -> float | None:
        """Return in how many seconds it would have sent a chunk of `nbytes`; None if unknown."""
        if not self._work_bytes:
            return None
        return (self.owed_bytes + nbytes) * self._work_s / self._work_bytes

    def owes_for_s(self, sha256: str, offset: int, now: float) -> float:
        """Return in how many seconds a chunk that it owes should come; infinity if unknown.

        A chunk that is overdue is expected to be so for as long again.
        """
        if not self._work_bytes:
            return math.inf
        before = 0
        for key, asked in self._asked.items():
            before += asked.length
            if key == (sha256, offset):
                break
        due_at = self._heard_at + before * self._work_s / self._work_bytes
        return abs(due_at - now)

    def falls_silent(self, now: float) -> bool:
        """Let it be silent if it is; its credit is one from then on.

        Returns:
            whether that is news: a source that was so slow before often seems silent.
        """
        if self.silent or self._silent_at() > now:
            return False
        is_news = self.credit > 1
        self.silent, self.credit = True, 1
        return is_news

    def next_deadline(self, now: float) -> float:
        """Return when it falls silent or a pause ends, clock seconds; infinity if never."""
        silent_at = math.inf if self.silent else self._silent_at()
        pauses = (until for _, until, _ in self._refusals.values() if until > now)
        return min(silent_at, min(pauses, default=math.inf))

    def _silent_at(self) -> float:
        return self._heard_at + SILENCE_S if self._asked else math.inf

    def _paused_until(self, sha256: str) -> float:
        refusal = self._refusals.get(sha256)
        return refusal[1] if refusal else -math.inf

    def validate(self) -> None:
        """Assert the invariants; tests call this after every step."""
        assert 1 <= self.credit <= _MOST_CREDIT
        assert len(self._asked) <= _MOST_CREDIT
        assert GRAIN_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES
        assert self.chunk_bytes % GRAIN_BYTES == 0
        assert self.up or not self._asked
        assert not (self.closed and self.up)
        assert self._asked or not self.silent
        assert self.owed_bytes == sum(asked.length for asked in self._asked.values())
