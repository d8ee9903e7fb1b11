"""What happened lately, and what was turned away; for the log and for `status`. Pure."""

from collections import Counter, deque
from typing import Literal

from distributed_llm.coordinator.events import Log

_MAX_EVENTS = 50
_MAX_CHARS = 1000


class EventLog:
    """The memory of one coordinator.

    Attributes:
        events: the latest, oldest first.
        rejected: messages that were not obeyed, by a closed set of reasons.
    """

    def __init__(self) -> None:
        self.events: deque[str] = deque(maxlen=_MAX_EVENTS)
        self.rejected: Counter[str] = Counter()

    def note(self, text: str, level: Literal["info", "warning", "error"] = "info") -> Log:
        """Keep an event and return the action that logs it."""
        self.events.append(text[:_MAX_CHARS])
        return Log(text, level)
