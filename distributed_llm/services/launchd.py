"""Services of launchd, on macOS: of the whole machine for root, else agents of the user. Pure."""

import plistlib
from pathlib import Path

from distributed_llm.services.steps import (
    Installed,
    RemoveFile,
    Role,
    Run,
    Service,
    Step,
    User,
    WriteFile,
)


def installed(service: Service, user: User) -> Installed:
    """Return how a service is installed."""
    role = service.role
    path = plist_path(role, user)
    steps: tuple[Step, ...] = (
        WriteFile(path, plist_text(service, user)),
        Run(("launchctl", "bootout", f"{_domain(user)}/{_label(role)}")),  # an earlier one
        Run(
            ("launchctl", "bootstrap", _domain(user), str(path)),
            "Over ssh without a desktop session, install it for the whole machine, with sudo.",
        ),
    )
    note = (
        "It runs as root, who installed it."
        if user.is_root
        else "It starts when you log in. To start it before that, install it with sudo."
    )
    return Installed(steps, f"tail -f '{log_path(role, user)}'", note)


def removal(role: Role, user: User) -> tuple[Step, ...]:
    """Return how a service is removed."""
    return (
        Run(("launchctl", "bootout", f"{_domain(user)}/{_label(role)}")),
        RemoveFile(plist_path(role, user)),
    )


def plist_path(role: Role, user: User) -> Path:
    """Return the file of a service."""
    library = Path("/Library") if user.is_root else user.home / "Library"
    kind = "LaunchDaemons" if user.is_root else "LaunchAgents"
    return library / kind / f"{_label(role)}.plist"


def log_path(role: Role, user: User) -> Path:
    """Return the file that takes what a service says."""
    library = Path("/Library") if user.is_root else user.home / "Library"
    return library / "Logs" / f"dllm-{role}.log"


def plist_text(service: Service, user: User) -> str:
    """Return the property list of a service."""
    log = str(log_path(service.role, user))
    return plistlib.dumps(
        {
            "Label": _label(service.role),
            "ProgramArguments": list(service.command),
            "WorkingDirectory": str(service.folder),
            "EnvironmentVariables": {"PYTHONUNBUFFERED": "1", **service.environment},
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "StandardOutPath": log,
            "StandardErrorPath": log,
        },
        sort_keys=False,
    ).decode()


def _label(role: Role) -> str:
    return f"distributed-llm.{role}"


def _domain(user: User) -> str:
    return "system" if user.is_root else f"gui/{user.number}"
