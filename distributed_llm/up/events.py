"""What happens around `dllm up`, and what is to be done about it. Pure values."""

from dataclasses import dataclass
from typing import Literal

from distributed_llm.common.messages import ClusterStatus

Child = Literal["coordinator", "worker", "api"]


@dataclass(frozen=True)
class Listens:
    """The coordinator listens.

    Attributes:
        invitation: how other machines join, for people; each is a line.
    """

    invitation: tuple[str, ...]


@dataclass(frozen=True)
class Serves:
    """The API listens.

    Attributes:
        access: how it is used, for people; each is a line.
    """

    access: tuple[str, ...]


@dataclass(frozen=True)
class Seen:
    """The coordinator told its status."""

    status: ClusterStatus


@dataclass(frozen=True)
class Logged:
    """The coordinator wrote a line to its log.

    Attributes:
        text: without the time and the level.
    """

    text: str


@dataclass(frozen=True)
class Ended:
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


Event = Listens | Serves | Seen | Logged | Ended | Signalled


@dataclass(frozen=True)
class StartWorker:
    """Start the worker of this machine."""


@dataclass(frozen=True)
class StartApi:
    """Start the API."""


@dataclass(frozen=True)
class TellToEnd:
    """Ask a child process to end."""

    child: Child


@dataclass(frozen=True)
class Progress:
    """Tell people what happens."""

    text: str


@dataclass(frozen=True)
class Show:
    """Tell people what runs and what they can do with it."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Finish:
    """End with an exit code; whoever still runs is ended at once."""

    code: int


@dataclass(frozen=True)
class Fail:
    """End with the failure of a child process."""

    child: Child


Action = StartWorker | StartApi | TellToEnd | Progress | Show | Finish | Fail
