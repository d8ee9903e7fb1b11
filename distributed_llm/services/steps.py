"""What makes a service, and the steps that install or remove one. Pure values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["coordinator", "worker"]

ROLES: tuple[Role, ...] = ("coordinator", "worker")
"""`dllm up` is none: what it prints is a secret, which does not belong in the log of a service."""


@dataclass(frozen=True)
class Service:
    """What is to run in the background.

    Attributes:
        command: program and arguments.
        folder: to run it in.
        environment: variables to set.
    """

    role: Role
    command: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str]

    def __post_init__(self) -> None:
        texts = (*self.command, str(self.folder), *self.environment.values())
        if any(not text.isprintable() for text in texts):
            raise ServiceError(
                "A service cannot have line breaks or other control characters in its options, "
                "settings and paths. Give the files other names."
            )


@dataclass(frozen=True)
class User:
    """Who installs a service, and as whom it runs.

    Attributes:
        is_root: it is one of the whole machine.
        home: folder of what is his.
        name: as the system knows him.
        number: of the user; 0 on Windows.
    """

    is_root: bool
    home: Path
    name: str
    number: int


@dataclass(frozen=True)
class WriteFile:
    """Write a file, and its folder if need be."""

    path: Path
    text: str
    encoding: str = "utf-8"


@dataclass(frozen=True)
class RemoveFile:
    """Remove a file, if it is there."""

    path: Path


@dataclass(frozen=True)
class Run:
    """Run a program.

    Attributes:
        advice: what to do if it fails; empty if that does not matter.
    """

    command: tuple[str, ...]
    advice: str = ""


Step = WriteFile | RemoveFile | Run


@dataclass(frozen=True)
class Installed:
    """How to deal with a service.

    Attributes:
        steps: that install it.
        logs: the command that shows what it says.
        note: what else is to be known; maybe nothing.
    """

    steps: tuple[Step, ...]
    logs: str
    note: str = ""


class ServiceError(Exception):
    """A service cannot be installed or removed; the message says why and what to do."""
