"""Installs and removes services on this machine, or prints what that would do."""

import getpass
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import assert_never

from distributed_llm.services import launchd, systemd, windows
from distributed_llm.services.steps import (
    RemoveFile,
    Role,
    Run,
    Service,
    ServiceError,
    Step,
    User,
    WriteFile,
)

Say = Callable[[str], None]


def install(service: Service, say: Say, *, dry_run: bool) -> None:
    """Have a service run now and whenever this machine starts, in place of an earlier one.

    Args:
        say: called with each line for people.
        dry_run: say what would be done, and do nothing.

    Raises:
        ServiceError: it cannot be installed.
    """
    user = this_user()
    if sys.platform == "darwin":
        how = launchd.installed(service, user)
    elif sys.platform == "win32":
        how = windows.installed(service, user)
    else:
        _check_systemd(dry_run)
        how = systemd.installed(service, user)
    perform(how.steps, say, dry_run=dry_run)
    if not dry_run:
        say(f"The {service.role} runs now, and starts again with this machine.")
        say(f"What it says: {how.logs}")
        say(f"To remove it: dllm service remove {service.role}")
    if how.note:
        say(how.note)


def remove(role: Role, say: Say, *, dry_run: bool) -> None:
    """Stop a service and remove it.

    Raises:
        ServiceError: it cannot be removed.
    """
    user = this_user()
    if sys.platform == "win32":
        perform(windows.removal(role, user), say, dry_run=dry_run)
        return
    if sys.platform == "darwin":
        path, steps = launchd.plist_path(role, user), launchd.removal(role, user)
    else:
        path, steps = systemd.unit_path(role, user), systemd.removal(role, user)
    if not path.exists() and not dry_run:
        say(f"There is no service to remove: {path} is not there.")
        return
    perform(steps, say, dry_run=dry_run)
    if not dry_run:
        say(f"The service {role} is removed.")


def perform(steps: Sequence[Step], say: Say, *, dry_run: bool) -> None:
    """Carry steps out in their order, or say what they are.

    Raises:
        ServiceError: one failed that matters.
    """
    for step in steps:
        match step:
            case WriteFile(path=path, text=text, encoding=encoding):
                say(f"{'would write' if dry_run else 'writing'} {path}:")
                say("\n".join(f"    {line}" for line in text.splitlines()))
                if not dry_run:
                    _write(path, text.encode(encoding))
            case RemoveFile(path=path):
                if dry_run:
                    say(f"would remove {path}")
                else:
                    path.unlink(missing_ok=True)
            case Run(command=command, advice=advice):
                if dry_run:
                    say(f"would run: {shlex.join(command)}")
                else:
                    _run(command, advice)
            case _:
                assert_never(step)


def this_user() -> User:
    """Return who runs this process."""
    number = os.geteuid() if hasattr(os, "geteuid") else 0
    is_root = hasattr(os, "geteuid") and number == 0
    try:
        return User(is_root, Path.home(), getpass.getuser(), number)
    except (OSError, KeyError, RuntimeError) as exc:
        raise ServiceError(
            f"The system does not say who runs this ({exc}). Set HOME and USER, and try again."
        ) from exc


def _check_systemd(dry_run: bool) -> None:
    if not dry_run and not systemd.RUNNING.is_dir():
        raise ServiceError(systemd.NOT_RUNNING)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{path.name}.new")
        written.write_bytes(data)
        os.replace(written, path)
    except OSError as exc:
        raise ServiceError(f"{path} cannot be written: {exc.strerror}.") from exc


def _run(command: Sequence[str], advice: str) -> None:
    quiet = None if advice else subprocess.DEVNULL
    try:
        code = subprocess.run(command, stderr=quiet, check=False).returncode  # noqa: S603
    except OSError as exc:
        code, advice = 1, advice and f"{command[0]}: {exc.strerror}. {advice}"
    if code and advice:
        raise ServiceError(f"`{shlex.join(command)}` failed. {advice}")
