"""What was said in a chat. Pure."""

from typing import Any


class Conversation:
    """The messages of a chat, which begin with the system's if there is one.

    Attributes:
        system: what the model is told before all else; empty for nothing.
    """

    def __init__(self, system: str = "") -> None:
        self.system = system
        self._said: list[tuple[str, str]] = []

    @property
    def is_empty(self) -> bool:
        """Whether nobody has said anything."""
        return not self._said

    def messages(self) -> list[dict[str, Any]]:
        """Return all messages, as clients take them."""
        system = [("system", self.system)] if self.system else []
        return [{"role": role, "content": text} for role, text in (*system, *self._said)]

    def as_text(self) -> str:
        """Return what was said as plain text, for a model that knows no roles."""
        texts = [self.system] if self.system else []
        return "\n".join([*texts, *(text for _, text in self._said)])

    def say(self, text: str) -> None:
        """Add a message of the user."""
        self._said.append(("user", text))

    def answered(self, text: str) -> None:
        """Add the model's answer; one that was stopped counts as far as it came."""
        if text:
            self._said.append(("assistant", text))

    def take_back(self) -> None:
        """Forget what was said last, if the user said it: there is no answer to it."""
        if self._said and self._said[-1][0] == "user":
            self._said.pop()

    def again(self) -> bool:
        """Forget the last answer; return whether there is something to answer."""
        if self._said and self._said[-1][0] == "assistant":
            self._said.pop()
        return bool(self._said)

    def clear(self) -> None:
        """Forget all that was said; the system's message stays."""
        self._said.clear()
