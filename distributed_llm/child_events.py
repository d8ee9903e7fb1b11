"""What happens to child processes that belong together, and what is done about it. Pure values."""

from dataclasses import dataclass
from typing import Generic, TypeVar

Child = TypeVar("Child", bound=str)
"""The names of the child processes."""


@dataclass(frozen=True)
class Ended(Generic[Child]):
    """A child process ended.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it.
        said: why, in its own words.
    """

    child: Child
    code: int
    said: str


@dataclass(frozen=True)
class Signalled:
    """This process was told to end.

    Attributes:
        code: exit code of a process that ends by that signal.
    """

    code: int


@dataclass(frozen=True)
class TellToEnd(Generic[Child]):
    """Ask a child process to end."""

    child: Child


@dataclass(frozen=True)
class Finish:
    """End with an exit code; whoever still runs is ended at once."""

    code: int


@dataclass(frozen=True)
class Fail(Generic[Child]):
    """End with the failure of a child process."""

    child: Child
