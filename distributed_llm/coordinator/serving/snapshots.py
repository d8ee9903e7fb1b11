"""Where snapshots of states are taken, in models whose layers have one. Pure.

A snapshot is room that KV cache could have, so there are few: where another answer is known to go
on from, one token before a prompt ends, and every so many positions of a long prompt. The last
token of a prompt is left out because whoever asks the same again has to compute one.
"""

from collections.abc import Iterable

_LEAST_PROMPT = 64
"""Tokens of a prompt below which nobody would gain by going on from it."""

_APART = 1024
"""Positions between snapshots within a prompt, at least."""

_PARTS = 8
"""Snapshots within a prompt, at most."""


def stop_before(start: int, stop: int, num_tokens: int, awaited: Iterable[int]) -> int:
    """Return where a slice of a prompt ends so that a snapshot can be taken there.

    Args:
        start: first position of the slice.
        stop: end of the positions that may be computed.
        num_tokens: of the prompt, or of all tokens if they are computed again.
        awaited: positions that other answers wait for.
    """
    ends = [at for at in (_end(num_tokens), *awaited) if start < at < stop]
    return min(ends, default=stop)


def is_wanted(at: int, num_tokens: int, awaited: Iterable[int], latest: int) -> bool:
    """Return whether to take a snapshot after so many positions.

    Args:
        at: that are computed by then.
        num_tokens: of the prompt, or of all tokens if they are computed again.
        awaited: positions that other answers wait for.
        latest: position of the latest snapshot; 0 if there is none.
    """
    if at >= num_tokens:
        return False
    return (
        at == _end(num_tokens) or at in awaited or at - latest >= max(_APART, num_tokens // _PARTS)
    )


def _end(num_tokens: int) -> int:
    """Return the position for a snapshot at the end of a prompt; 0 if it is too short."""
    return num_tokens - 1 if num_tokens > _LEAST_PROMPT else 0
