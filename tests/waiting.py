"""Waiting for what other processes do."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_LIMIT_S = 60.0
_POLL_S = 0.02


def eventually(
    look: Callable[[], T], *, limit_s: float = _LIMIT_S, story: Callable[[], str] = str
) -> T:
    """Return the first true value of `look()`; fail after `limit_s`, with what `story()` tells."""
    give_up_at = time.monotonic() + limit_s
    while not (seen := look()):
        if time.monotonic() > give_up_at:
            raise AssertionError(f"not seen within {limit_s} s: {look}\n{story()}")
        time.sleep(_POLL_S)
    return seen
