"""The text of an answer that waits to be understood, and the events that come of it."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Union

from distributed_llm.api.chat.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallBegun,
    ToolCallDelta,
    TurnEvent,
)
from distributed_llm.client.answers import PickedToken

Step = Callable[[], Union["Step", None]]
"""Understands some text; returns the step that goes on, or None to wait for more text."""

MAX_SPACES = 256
"""White space that is held back, at most, to see what follows it."""


class Parts:
    """Text that has come and is not told of yet, and what is told of it.

    Attributes:
        text: what has come.
        at: where in `text` that begins which is not told of yet.
        complete: whether no more text comes.
        calls: how many calls have begun.
    """

    def __init__(self, choice: int, new_call_id: Callable[[], str]) -> None:
        self.text = ""
        self.at = 0
        self.complete = False
        self.calls = 0
        self._choice = choice
        self._new_call_id = new_call_id
        self._events: list[TurnEvent] = []
        self._tokens: deque[tuple[int, PickedToken]] = deque()  # with the place of each
        self._offset = 0  # of `text` in the answer

    def add(self, text: str, tokens: Sequence[PickedToken] = ()) -> None:
        """Add what has come."""
        place = self._offset + len(self.text)
        end = place + len(text)
        for token in tokens:
            self._tokens.append((min(place, end), token))
            place += len(token.text)
        self._offset += self.at
        self.text = self.text[self.at :] + text
        self.at = 0

    def take_events(self) -> list[TurnEvent]:
        """Return what is to be told since the last call."""
        events, self._events = self._events, []
        return events

    def ahead(self) -> int:
        """Return how many characters wait."""
        return len(self.text) - self.at

    def after_space(self, start: int) -> int | None:
        """Return where the white space ends that begins at `start`; None if that is unknown yet.

        Space that is too long ends at once.
        """
        for place in range(start, len(self.text)):
            if not self.text[place].isspace() or place == start + MAX_SPACES:
                return place
        return len(self.text) if self.complete else None

    def begins(self, marker: str, start: int) -> bool | None:
        """Return whether a marker stands at `start`; None if that is unknown yet."""
        if self.text.startswith(marker, start):
            return True
        rest = self.text[start : start + len(marker)]
        return None if marker.startswith(rest) and not self.complete else False

    def show(self, end: int) -> None:
        """Tell of the text before `end`."""
        text = self.text[self.at : end]
        tokens = self._pass(end)
        if text:
            self._events.append(TextDelta(choice=self._choice, text=text, tokens=tokens))

    def show_last_tokens(self) -> None:
        """Tell of the tokens after the last text, such as that which ended the answer."""
        if self._tokens:
            tokens = tuple(token for _, token in self._tokens)
            self._tokens.clear()
            self._events.append(TextDelta(choice=self._choice, text="", tokens=tokens))

    def reason(self, end: int) -> None:
        """Tell of the text before `end` as reasoning."""
        text = self.text[self.at : end]
        self._pass(end)
        if text:
            self._events.append(ReasoningDelta(choice=self._choice, text=text))

    def hide(self, end: int) -> None:
        """Tell nothing of the text before `end`."""
        self._pass(end)

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        """Tell that a call begins."""
        event = ToolCallBegun(
            choice=self._choice,
            index=self.calls,
            id=call_id or self._new_call_id(),
            name=name,
        )
        self.calls += 1
        self._events.append(event)

    def argue(self, arguments: str) -> None:
        """Tell more arguments of the last call."""
        if arguments:
            self._events.append(
                ToolCallDelta(choice=self._choice, index=self.calls - 1, arguments=arguments)
            )

    def _pass(self, end: int) -> tuple[PickedToken, ...]:
        """Leave the text before `end` behind; return its tokens."""
        self.at = end
        passed = []
        while self._tokens and self._tokens[0][0] < self._offset + end:
            passed.append(self._tokens.popleft()[1])
        return tuple(passed)
