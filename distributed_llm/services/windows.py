"""Services as scheduled tasks, on Windows: they start with it, before anybody logs in. Pure."""

import subprocess
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from distributed_llm.services.steps import (
    Installed,
    RemoveFile,
    Role,
    Run,
    Service,
    ServiceError,
    Step,
    User,
    WriteFile,
)

_NAMESPACE = "http://schemas.microsoft.com/windows/2004/02/mit/task"

_ADVICE = (
    "Tasks that start with Windows can only be changed by an administrator: open PowerShell with "
    '"Run as administrator" and run this again.'
)


def installed(service: Service, user: User) -> Installed:
    """Return how a service is installed.

    Raises:
        ServiceError: it needs variables, which tasks do not have.
    """
    if service.environment:
        first = next(iter(service.environment))
        raise ServiceError(
            f"{first} is set here, and a scheduled task would not see it. Set it for all programs "
            f"(setx {first} VALUE, then open a new window), or leave it out."
        )
    name = _task(service.role)
    path = Path(tempfile.gettempdir()) / f"{name}.xml"
    steps: tuple[Step, ...] = (
        WriteFile(path, task_text(service, user), encoding="utf-16"),
        Run(("schtasks", "/Create", "/F", "/TN", name, "/XML", str(path)), _ADVICE),
        RemoveFile(path),
        Run(("schtasks", "/Run", "/TN", name), _ADVICE),
    )
    return Installed(steps, f"schtasks /Query /V /FO LIST /TN {name}")


def removal(role: Role, user: User) -> tuple[Step, ...]:
    """Return how a service is removed."""
    return (
        Run(("schtasks", "/End", "/TN", _task(role))),
        Run(("schtasks", "/Delete", "/F", "/TN", _task(role)), _ADVICE),
    )


def task_text(service: Service, user: User) -> str:
    """Return the definition of a task."""
    task = ET.Element("Task", version="1.2", xmlns=_NAMESPACE)
    _add(task, "Triggers/BootTrigger/Enabled", "true")
    principal = _add(task, "Principals/Principal/UserId", user.name)
    ET.SubElement(principal, "LogonType").text = "S4U"
    settings = _add(task, "Settings/MultipleInstancesPolicy", "IgnoreNew")
    for name, value in (
        ("DisallowStartIfOnBatteries", "false"),
        ("StopIfGoingOnBatteries", "false"),
        ("ExecutionTimeLimit", "PT0S"),
    ):
        ET.SubElement(settings, name).text = value
    restart = ET.SubElement(settings, "RestartOnFailure")
    ET.SubElement(restart, "Interval").text = "PT1M"
    ET.SubElement(restart, "Count").text = "999"
    program, *arguments = service.command
    action = _add(task, "Actions/Exec/Command", program)
    ET.SubElement(action, "Arguments").text = subprocess.list2cmdline(arguments)
    ET.SubElement(action, "WorkingDirectory").text = str(service.folder)
    ET.indent(task)
    return f'<?xml version="1.0" encoding="UTF-16"?>\n{ET.tostring(task, encoding="unicode")}\n'


def _add(root: ET.Element, path: str, text: str) -> ET.Element:
    """Add elements inside one another, the last with `text`; return the one that holds it."""
    *outer, last = path.split("/")
    for name in outer:
        root = ET.SubElement(root, name)
    ET.SubElement(root, last).text = text
    return root


def _task(role: Role) -> str:
    return f"dllm-{role}"
