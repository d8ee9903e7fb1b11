"""What happens around `dllm up`, and what is to be done about it. Pure values."""

from dataclasses import dataclass
from typing import Literal

from distributed_llm.child_events import Ended, Fail, Finish, Signalled, TellToEnd
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


Event = Listens | Serves | Seen | Logged | Ended[Child] | Signalled


@dataclass(frozen=True)
class StartWorker:
    """Start the worker of this machine."""


@dataclass(frozen=True)
class StartApi:
    """Start the API."""


@dataclass(frozen=True)
class Progress:
    """Tell people what happens."""

    text: str


@dataclass(frozen=True)
class Show:
    """Tell people what runs and what they can do with it."""

    lines: tuple[str, ...]


Action = StartWorker | StartApi | TellToEnd[Child] | Progress | Show | Finish | Fail[Child]
