"""What people type in a chat: messages, of one line or several, and commands. Pure."""

from dataclasses import dataclass

FENCE = '"""'
"""Begins and ends a message of several lines."""


@dataclass(frozen=True)
class Say:
    """A message to the model."""

    text: str


@dataclass(frozen=True)
class Command:
    """A command to this program, such as `/system Be brief.`

    Attributes:
        name: without the slash, in lower case.
        argument: what follows it; maybe empty.
    """

    name: str
    argument: str = ""


Input = Say | Command


class Reader:
    """Puts lines together to inputs."""

    def __init__(self) -> None:
        self._lines: list[str] | None = None

    @property
    def is_within(self) -> bool:
        """Whether a message of several lines has begun and not ended."""
        return self._lines is not None

    def add(self, line: str) -> Input | None:
        """Return the input that a line completes; None for none."""
        if self._lines is not None:
            return self._go_on(line)
        stripped = line.strip()
        if stripped.startswith(FENCE):
            self._lines = []
            first = stripped.removeprefix(FENCE)
            return self._go_on(first) if first else None
        if stripped.startswith("/"):
            name, _, argument = stripped[1:].partition(" ")
            return Command(name.lower(), argument.strip())
        return Say(stripped) if stripped else None

    def give_up(self) -> None:
        """Forget what has begun."""
        self._lines = None

    def end(self) -> Input | None:
        """Return what has begun, as there are no more lines."""
        lines, self._lines = self._lines, None
        return Say("\n".join(lines)) if lines else None

    def _go_on(self, line: str) -> Input | None:
        assert self._lines is not None
        text, fence, _ = line.partition(FENCE)
        if text or not fence:
            self._lines.append(text)
        return self.end() if fence else None
