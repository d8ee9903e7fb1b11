"""Services of all systems as texts and commands; no test installs one."""

import configparser
import plistlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path, PurePosixPath

import pytest
from typer.testing import CliRunner

from distributed_llm import service_command
from distributed_llm.cli import app
from distributed_llm.common.errors import ServiceFailed
from distributed_llm.common.keyring import STATE_VARIABLE, Keyring
from distributed_llm.common.transport import new_key_pair
from distributed_llm.services import __main__ as removing
from distributed_llm.services import launchd, perform, systemd, windows
from distributed_llm.services.steps import (
    RemoveFile,
    Run,
    Service,
    ServiceError,
    User,
    WriteFile,
)

HARD = '/opt/my "models" ü & 100% <$HOME> \\n'
PYTHON = "/home/jürgen b/.venv/bin/python"
COMMAND = (PYTHON, "-m", "distributed_llm", "join", "--wait", "--model", HARD, "--name", "")
VARIABLES = {"DLLM_STATE": "/home/jürgen b/100% $state\\"}
SERVICE = Service("worker", COMMAND, Path("/home/jürgen b/dllm"), VARIABLES)
JUERGEN = User(False, Path("/home/jürgen b"), "jürgen", 501)
ROOT = User(True, Path("/root"), "root", 0)
users = pytest.mark.parametrize("user", [JUERGEN, ROOT], ids=["user", "root"])


def commands(steps: tuple[object, ...]) -> list[tuple[str, ...]]:
    return [step.command for step in steps if isinstance(step, Run)]


# ------------------------------------------------------------------ systemd


def unquoted(text: str) -> list[str]:
    """Return quoted words as systemd.syntax says they are read, with specifiers resolved."""
    words = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    assert "%" not in text.replace("%%", "")
    return [re.sub(r"\\(.)", r"\1", word).replace("%%", "%") for word in words]


def unit_of(user: User) -> tuple[configparser.SectionProxy, str]:
    """Return the section [Service] of the unit, and its whole text."""
    text = systemd.unit_text(SERVICE, user)
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.read_string(text)
    return parser["Service"], text


@users
def test_systemd_runs_the_command_whatever_its_words_are(user: User) -> None:
    unit, text = unit_of(user)
    assert unit["ExecStart"].startswith("/usr/bin/env ")
    assert "$" not in unit["ExecStart"].replace("$$", ""), "a lone one begins a variable"
    assert tuple(unquoted(unit["ExecStart"].replace("$$", "$"))) == COMMAND
    assert unit["WorkingDirectory"] == "/home/jürgen b/dllm"
    variables = [unquoted(line)[0] for line in text.splitlines() if line.startswith("Environment=")]
    assert variables == ["PYTHONUNBUFFERED=1", f"DLLM_STATE={VARIABLES['DLLM_STATE']}"]
    assert unit["Restart"] == "on-failure", "who was drained stays away"


def test_systemd_knows_services_of_users_and_of_the_machine() -> None:
    write, *rest = systemd.installed(SERVICE, JUERGEN).steps
    assert isinstance(write, WriteFile)
    assert write.path == Path("/home/jürgen b/.config/systemd/user/dllm-worker.service")
    assert "WantedBy=default.target" in write.text
    assert commands(tuple(rest)) == [
        ("systemctl", "--user", "daemon-reload"),
        ("systemctl", "--user", "enable", "dllm-worker.service"),
        ("systemctl", "--user", "restart", "dllm-worker.service"),
        ("loginctl", "enable-linger", "jürgen"),
    ]
    write, *rest = systemd.installed(SERVICE, ROOT).steps
    assert isinstance(write, WriteFile)
    assert write.path == Path("/etc/systemd/system/dllm-worker.service")
    assert "WantedBy=multi-user.target" in write.text
    assert commands(tuple(rest))[0] == ("systemctl", "daemon-reload")
    assert len(rest) == 3, "there is nobody to log out"
    assert "as root" in systemd.installed(SERVICE, ROOT).note


@users
def test_systemd_forgets_what_is_removed(user: User) -> None:
    stop, remove, reload = systemd.removal("worker", user)
    assert isinstance(stop, Run)
    assert stop.command[-3:] == ("disable", "--now", "dllm-worker.service")
    assert remove == RemoveFile(systemd.unit_path("worker", user))
    assert isinstance(reload, Run)
    assert reload.command[-1] == "daemon-reload"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    folder = tmp_path / 'a "folder" ü & 100% $x'
    folder.mkdir()
    command = (str(folder / "no\\program"), *COMMAND[1:])
    path = tmp_path / "dllm-worker.service"
    path.write_text(systemd.unit_text(Service("worker", command, folder, VARIABLES), ROOT))
    verdict = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "dllm-worker" not in verdict.stderr


# ------------------------------------------------------------------ launchd


@users
def test_launchd_runs_the_command_whatever_its_words_are(user: User) -> None:
    found = plistlib.loads(launchd.plist_text(SERVICE, user).encode())
    assert tuple(found["ProgramArguments"]) == COMMAND
    assert found["WorkingDirectory"] == "/home/jürgen b/dllm"
    assert found["EnvironmentVariables"] == {"PYTHONUNBUFFERED": "1", **VARIABLES}
    assert found["RunAtLoad"] is True
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert found["Label"] == launchd.plist_path("worker", user).stem
    logs = PurePosixPath(found["StandardErrorPath"])
    assert logs.is_relative_to("/Library" if user.is_root else "/home/jürgen b/Library")


@users
def test_launchd_is_told_where_to_run_it(user: User) -> None:
    how = launchd.installed(SERVICE, user)
    domain = "system" if user.is_root else "gui/501"
    path = launchd.plist_path("worker", user)
    assert commands(how.steps) == [
        ("launchctl", "bootout", f"{domain}/distributed-llm.worker"),
        ("launchctl", "bootstrap", domain, str(path)),
    ]
    assert path.parent.name == ("LaunchDaemons" if user.is_root else "LaunchAgents")
    stop, remove = launchd.removal("worker", user)
    assert stop == Run(("launchctl", "bootout", f"{domain}/distributed-llm.worker"))
    assert remove == RemoveFile(path)


# ------------------------------------------------------------------ Windows


def test_a_task_runs_the_command_at_the_start_of_windows() -> None:
    service = Service(
        "worker",
        (r"C:\Users\jürgen b\python.exe", "-m", "distributed_llm", "--model", r"D:\a b & <c>"),
        Path("C:/Users/jürgen b"),
        {},
    )
    text = windows.task_text(service, JUERGEN)
    assert text.startswith('<?xml version="1.0" encoding="UTF-16"?>')
    space = {"t": "http://schemas.microsoft.com/windows/2004/02/mit/task"}
    task = ET.fromstring(text.encode("utf-16"))

    def one(path: str) -> str | None:
        return task.findtext("/".join(f"t:{part}" for part in path.split("/")), None, space)

    assert one("Actions/Exec/Command") == r"C:\Users\jürgen b\python.exe"
    assert one("Actions/Exec/Arguments") == r'-m distributed_llm --model "D:\a b & <c>"'
    assert one("Actions/Exec/WorkingDirectory") == str(service.folder)
    assert one("Triggers/BootTrigger/Enabled") == "true"
    assert one("Principals/Principal/UserId") == "jürgen"
    assert one("Principals/Principal/LogonType") == "S4U"
    assert one("Settings/ExecutionTimeLimit") == "PT0S"
    assert one("Settings/RestartOnFailure/Interval") == "PT1M"
    write, create, remove, start = windows.installed(service, JUERGEN).steps
    assert isinstance(write, WriteFile)
    assert write.encoding == "utf-16"
    assert remove == RemoveFile(write.path)
    assert commands((create, start)) == [
        ("schtasks", "/Create", "/F", "/TN", "dllm-worker", "/XML", str(write.path)),
        ("schtasks", "/Run", "/TN", "dllm-worker"),
    ]
    assert commands(windows.removal("worker", JUERGEN))[-1] == (
        *("schtasks", "/Delete", "/F", "/TN"),
        "dllm-worker",
    )


def test_a_task_has_no_variables() -> None:
    with pytest.raises(ServiceError, match="setx DLLM_STATE"):
        windows.installed(SERVICE, JUERGEN)


# ------------------------------------------------------------------ carrying it out


def test_a_word_with_a_line_break_is_refused() -> None:
    with pytest.raises(ServiceError, match="line breaks"):
        Service("worker", ("dllm", "a\nExecStart=b"), Path("/"), {})


def test_steps_are_carried_out_in_order_until_one_fails_that_matters(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.service"
    python = (sys.executable, "-c")
    said: list[str] = []
    steps = (
        WriteFile(path, "ü\n"),
        Run((*python, "raise SystemExit(1)")),
        Run(("no program of this name",)),
        RemoveFile(tmp_path / "is not there"),
    )
    perform.perform(steps, said.append, dry_run=True)
    assert not path.exists()
    perform.perform(steps, said.append, dry_run=False)
    assert path.read_text(encoding="utf-8") == "ü\n"
    failing = (Run((*python, "raise SystemExit(1)"), "Do that."), RemoveFile(path))
    with pytest.raises(ServiceError, match=r"failed\. Do that\."):
        perform.perform(failing, said.append, dry_run=False)
    with pytest.raises(ServiceError, match=r"Do that\."):
        perform.perform((Run(("no program of this name",), "Do that."),), print, dry_run=False)
    with pytest.raises(ServiceError, match="cannot be written"):
        perform.perform((WriteFile(path / "in a file", ""),), print, dry_run=False)
    assert path.exists()


def test_removing_needs_nothing_but_python(capsys: pytest.CaptureFixture[str]) -> None:
    alone = [sys.executable, "-S", "-c", "import distributed_llm.services.__main__"]
    subprocess.run(alone, check=True, timeout=60)
    assert removing.main(["remove", "worker", "--dry-run"]) == 0
    assert "worker" in capsys.readouterr().out
    assert removing.main(["remove", "nonsense"]) == 2
    assert removing.main([]) == 2


# ------------------------------------------------------------------ the commands


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """The services that commands install, which go no further."""
    services: list[Service] = []
    monkeypatch.setattr(
        perform, "install", lambda service, say, *, dry_run: services.append(service)
    )
    return services


def dllm(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


def test_a_verb_becomes_a_service_with_its_settings(
    installed: list[Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    monkeypatch.setenv("DLLM_KEY", "a secret")
    monkeypatch.setenv("DLLM_WORKER__THREADS", "3")
    words = ["coordinator", "my model", "--bind", "0.0.0.0:5555"]
    assert dllm("service", "install", *words) == (0, "")
    (service,) = installed
    assert service.role == "coordinator"
    assert service.command == (sys.executable, "-m", "distributed_llm", *words)
    assert service.folder == Path.cwd()
    assert service.environment["DLLM_WORKER__THREADS"] == "3"
    assert service.environment[STATE_VARIABLE] == str(tmp_path / "state")
    assert "a secret" not in service.environment.values()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["worker", "--theads", "3"], "--theads"),
        (["coordinator", "--bind"], "--bind"),
        (["generate"], "none of coordinator, worker"),
    ],
)
def test_what_dllm_does_not_understand_is_no_service(
    installed: list[Service], words: list[str], said: str
) -> None:
    code, text = dllm("service", "install", *words)
    assert code == 2
    assert said in text
    assert installed == []


def test_joining_as_a_service_goes_on_by_the_kept_key(
    installed: list[Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path))
    Keyring(tmp_path).save("pc:5555", new_key_pair().public, new_key_pair(), name="mac")
    assert dllm("join", "--service", "--threads", "3", "--max-memory", "6GiB") == (0, "")
    (service,) = installed
    assert service.role == "worker"
    words = ["join", "--wait", "--threads", "3", "--max-memory", "6GiB"]
    assert service.command == (sys.executable, "-m", "distributed_llm", *words)


def test_what_a_service_says_when_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*given: object, dry_run: bool) -> None:
        raise ServiceError("systemd does not run here")

    monkeypatch.setattr(perform, "install", refuse)
    monkeypatch.setattr(perform, "remove", refuse)
    with pytest.raises(ServiceFailed, match="systemd does not run"):
        service_command.install("worker", ["worker"])
    with pytest.raises(ServiceFailed, match="systemd does not run"):
        service_command.remove_service("worker")
