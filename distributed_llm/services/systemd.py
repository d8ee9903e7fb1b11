"""Services of systemd, on Linux: of the whole machine for root, else of the user. Pure."""

import re
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

RUNNING = Path("/run/systemd/system")
"""Is there while systemd runs."""

NOT_RUNNING = (
    "systemd does not run here (a container, or WSL?), so it cannot start a service. Have whatever "
    "starts programs on this machine run the command itself: `dllm join --wait`, say."
)


def installed(service: Service, user: User) -> Installed:
    """Return how a service is installed."""
    unit = f"dllm-{service.role}.service"
    path = unit_path(service.role, user)
    steps: list[Step] = [
        WriteFile(path, unit_text(service, user)),
        _control(user, "daemon-reload"),
        _control(user, "enable", unit),
        _control(user, "restart", unit),
    ]
    if not user.is_root:
        # Services of a user end when he logs out, and wait for him after a restart, unless:
        steps.append(
            Run(
                ("loginctl", "enable-linger", user.name),
                "It runs, but will stop when you log out: lingering could not be switched on. Run: "
                f"sudo loginctl enable-linger {user.name}",
            )
        )
    scope = "-u" if user.is_root else "--user-unit"
    note = "It runs as root, who installed it." if user.is_root else ""
    return Installed(tuple(steps), f"journalctl -f {scope} dllm-{service.role}", note)


def removal(role: Role, user: User) -> tuple[Step, ...]:
    """Return how a service is removed."""
    unit = f"dllm-{role}.service"
    control = ("systemctl",) if user.is_root else ("systemctl", "--user")
    return (
        Run((*control, "disable", "--now", unit)),
        RemoveFile(unit_path(role, user)),
        Run((*control, "daemon-reload")),
    )


def unit_path(role: Role, user: User) -> Path:
    """Return the file of a service."""
    folder = Path("/etc/systemd/system") if user.is_root else user.home / ".config/systemd/user"
    return folder / f"dllm-{role}.service"


def unit_text(service: Service, user: User) -> str:
    """Return the unit file of a service."""
    # systemd starts no program with quotes in its path, so env starts it.
    start = " ".join(["/usr/bin/env", *map(_argument, service.command)])
    environment = {"PYTHONUNBUFFERED": "1", **service.environment}
    lines = [
        "[Unit]",
        f"Description=distributed_llm {service.role}",
        "StartLimitIntervalSec=0",
        "",
        "[Service]",
        f"ExecStart={start}",
        f"WorkingDirectory={_specifiers(str(service.folder))}",
        *(f"Environment={_quoted(f'{name}={value}')}" for name, value in environment.items()),
        "Restart=on-failure",
        "RestartSec=5",
        "RestartPreventExitStatus=2",
        "NoNewPrivileges=yes",
        "",
        "[Install]",
        f"WantedBy={'multi-user' if user.is_root else 'default'}.target",
    ]
    return "\n".join(lines) + "\n"


def _control(user: User, *words: str) -> Run:
    control = ("systemctl",) if user.is_root else ("systemctl", "--user")
    advice = (
        "systemd says above why."
        if user.is_root
        else "If this user has no session of systemd (after su or sudo, say), log in as him first."
    )
    return Run((*control, *words), advice)


def _argument(text: str) -> str:
    """Return one argument of ExecStart, where $ begins a variable."""
    return _quoted(text).replace("$", "$$")


def _quoted(text: str) -> str:
    """Return a text in quotes, which systemd takes for `text` (systemd.syntax, systemd.unit)."""
    return '"' + re.sub(r'([\\"])', r"\\\1", _specifiers(text)) + '"'


def _specifiers(text: str) -> str:
    """Return a text in which % stands for itself."""
    return text.replace("%", "%%")
