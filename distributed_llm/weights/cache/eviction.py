"""Which files of a cache go to make room for others. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.wording import size_text

ABANDONED_S = 7 * 86_400.0
"""Time after which nobody is expected to go on with what was begun, seconds."""

_MOST_LEFT_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Kept:
    """A file of a cache.

    Attributes:
        sha256: name of the entry.
        nbytes: size of the file.
        used_at: when it was last used or written, seconds since 1970.
        is_part: whether the entry is not complete.
    """

    sha256: str
    nbytes: int
    used_at: float
    is_part: bool


@dataclass(frozen=True)
class Room:
    """How much a cache holds and may hold.

    Attributes:
        used_bytes: of its files.
        limit_bytes: of all of its files; None without a limit.
        free_bytes: on its disk.
        disk_bytes: size of its disk.
    """

    used_bytes: int
    limit_bytes: int | None
    free_bytes: int
    disk_bytes: int

    @property
    def left_free_bytes(self) -> int:
        """What is left free on the disk, for other programs to go on."""
        return min(_MOST_LEFT_FREE_BYTES, self.disk_bytes // 20)

    def lacking_bytes(self, nbytes: int) -> int:
        """Return how much has to go before `nbytes` more may come."""
        return max(0, self._beyond_limit(nbytes), self._beyond_disk(nbytes))

    def _beyond_limit(self, nbytes: int) -> int:
        return 0 if self.limit_bytes is None else self.used_bytes + nbytes - self.limit_bytes

    def _beyond_disk(self, nbytes: int) -> int:
        return self.left_free_bytes + nbytes - self.free_bytes

    def refusal(self, nbytes: int, deletable_bytes: int) -> str:
        """Return why `nbytes` more cannot come although `deletable_bytes` go, and what to do.

        Args:
            nbytes: what is to come.
            deletable_bytes: less than is lacking.
        """
        missing = self.lacking_bytes(nbytes) - deletable_bytes
        text = f"{size_text(nbytes)} of weights are to be fetched, and there is room for "
        text += f"{size_text(max(0, nbytes - missing))}: {size_text(missing)} are missing. "
        if self.limit_bytes is not None and self._beyond_limit(nbytes) >= self._beyond_disk(nbytes):
            needed = self.limit_bytes + missing
            return (
                f"{text}What is kept may take {size_text(self.limit_bytes)} (cache_limit), and "
                "the rest of it is in use. Raise `--cache-limit` to "
                f"{needed} ({size_text(needed)}) or more."
            )
        return (
            f"{text}The disk has {size_text(self.free_bytes)} free of "
            f"{size_text(self.disk_bytes)}, of which {size_text(self.left_free_bytes)} are left to "
            f"other programs. Free some space, or set {CACHE_VARIABLE} to a folder on another disk."
        )


def in_order(kept: Iterable[Kept], keep: Collection[str], now: float) -> list[Kept]:
    """Return what may go, in the order in which it goes.

    First what was begun and abandoned, then all others, least lately used first.

    Args:
        kept: all files of the cache.
        keep: names of entries that stay.
        now: seconds since 1970.
    """

    def rank(one: Kept) -> tuple[bool, float, str]:
        abandoned = one.is_part and now - one.used_at > ABANDONED_S
        return (not abandoned, one.used_at, one.sha256)

    return sorted((one for one in kept if one.sha256 not in keep), key=rank)
