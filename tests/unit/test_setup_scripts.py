"""The setup scripts in dry runs: nothing is installed, nothing outside a copy is touched."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from pygments.lexers.shell import PowerShellLexer  # type: ignore[import-untyped]
from pygments.token import (  # type: ignore[import-untyped]
    Comment,
    Error,
    Punctuation,
    String,
    Token,
)

from distributed_llm.cli import app

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "setup_scripts"
WINDOWS = SCRIPTS / "setup_windows.ps1"
CONFIG = ["{0}/.venv/bin/python", "-m", "distributed_llm.common.config_template"]
CONFIG += ["{0}/config/local.yaml"]
ROLES: dict[str, list[list[str]]] = {  # what a dry run prints after installing; {0} is the folder
    "": [],
    "demo": [["exec", "{0}/.venv/bin/dllm", "demo"]],
    "test": [["exec", "{0}/.venv/bin/python", "-m", "pytest", "-n", "2"]],
    "coordinator": [
        CONFIG,
        ["exec", "{0}/.venv/bin/dllm", "coordinator", "--config", "{0}/config/local.yaml"],
    ],
    "worker": [
        [*CONFIG, "--set", "worker.coordinator=pc:5555", "--set", "worker.name=mac"],
        [
            *("exec", "{0}/.venv/bin/dllm", "worker", "--config", "{0}/config/local.yaml"),
            *("--coordinator", "pc:5555", "--name", "mac"),
        ],
    ],
}
TOOLS = ("bash", "cat", "cksum", "dirname", "grep", "id", "sed", "sh", "uname")

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
systems = pytest.mark.parametrize("system", ["linux", "macos"])


LINE = f"dllm://pc:1/{'A' * 43}.{'b' * 43}"
"""What `dllm token create` prints."""


NATIVE = "distributed_llm/worker/model/kernels/native"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the scripts read, in a folder whose name is hard to handle."""
    root = tmp_path / 'it\'s a "copy" & 100% <$1>'
    shutil.copytree(SCRIPTS, root / "setup_scripts")
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / NATIVE, root / NATIVE)
    (root / "config").mkdir()
    return root


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with the programs that the scripts need, and with no Python."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        program = shutil.which(name)
        assert program, name
        (folder / name).symlink_to(program)
    return folder


def add_program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(
    root: Path, system: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / f"setup_scripts/setup_{system}.sh"), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(root), "PYTHON": sys.executable} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def plan_of(result: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Return the commands that a dry run would run."""
    assert result.returncode == 0, result.stderr
    return [
        shlex.split(line.removeprefix("would run: "))
        for line in result.stdout.splitlines()
        if line.startswith("would run: ")
    ]


@needs_bash
@pytest.mark.parametrize("path", [*SCRIPTS.glob("*.sh"), ROOT / ".ci/run"], ids=str)
def test_bash_can_parse_it(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    scripts = [str(SCRIPTS / "setup_linux.sh"), str(SCRIPTS / "setup_macos.sh"), ".ci/run"]
    result = subprocess.run(
        ["shellcheck", "-x", "-P", str(ROOT), *scripts],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.stdout + result.stderr == ""


@needs_bash
@systems
def test_help_names_every_role(copy: Path, system: str) -> None:
    result = run(copy, system, "--help")
    assert result.returncode == 0, result.stderr
    assert all(role in result.stdout for role in ROLES)


@needs_bash
@systems
@pytest.mark.parametrize("role", ROLES)
def test_a_dry_run_prints_the_plan_and_changes_nothing(copy: Path, system: str, role: str) -> None:
    before = files(copy)
    arguments = [role] if role else []
    if role == "worker":
        arguments += ["--coordinator", "pc:5555", "--name", "mac"]
    plan = plan_of(run(copy, system, *arguments, "--dry-run"))
    assert plan[0][1:] == ["-m", "venv", f"{copy}/.venv"]
    assert plan[1][-3:] == ["--constraint", f"{copy}/constraints.txt", "torch"]  # by itself
    extras = "[dev]" if role in ("", "test") else ""
    assert plan[2][-2:] == ["--editable", f"{copy}{extras}"]
    assert plan[3:] == [[part.format(copy) for part in command] for command in ROLES[role]]
    assert files(copy) == before


@needs_bash
@systems
def test_the_second_time_nothing_is_installed(copy: Path, system: str) -> None:
    programs = copy / ".venv/bin"
    programs.mkdir(parents=True)
    add_program(programs, "python", "exit 0")
    (copy / ".venv/pyvenv.cfg").write_text(f"command = python -m venv {copy}/.venv\n")
    names = ["pyproject.toml", "setup.py", "constraints.txt"]
    names += [f"{NATIVE}/{path.name}" for path in sorted((copy / NATIVE).glob("*.[ch]"))]
    content = b"".join((copy / name).read_bytes() for name in names)
    checksum = subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout
    (copy / ".venv/.installed").write_text(f"dev {checksum.decode().strip()}\n")
    assert run(copy, system, "--dry-run").stdout == ""
    assert "install" not in run(copy, system, "coordinator", "--dry-run").stdout

    (copy / "constraints.txt").write_text("torch==0\n")
    plan = run(copy, system, "--dry-run").stdout
    assert "pip install" in plan
    assert "-m venv" not in plan

    (copy / ".venv/pyvenv.cfg").write_text("command = python -m venv /elsewhere/.venv\n")
    assert "-m venv --clear" in run(copy, system, "--dry-run").stdout


@needs_bash
@systems
def test_a_local_config_is_never_overwritten(copy: Path, system: str) -> None:
    (copy / "config/local.yaml").touch()
    result = run(copy, system, "worker", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "config_template" not in result.stdout


def passed_on() -> dict[str, list[str]]:
    """Return an option of each name that `dllm` has, with a value, by role."""
    words = {}
    for role in ("coordinator", "worker", "demo"):
        command = typer.main.get_command(app).commands[role]  # type: ignore[attr-defined]
        words[role] = [
            word
            for option in command.params
            if not option.hidden and option.opts[0].startswith("--")
            if option.opts[0] not in {"--coordinator", "--name", "--model", "--bind"}
            for word in option.opts[:1] + ([] if option.is_flag else ["worker"])
        ]
    assert {"--peer-bind", "--threads", "--device", "--max-memory"} <= set(words["worker"])
    return words


@needs_bash
@systems
@pytest.mark.parametrize("role", ["coordinator", "worker", "demo"])
def test_every_option_of_dllm_is_passed_on(copy: Path, system: str, role: str) -> None:
    words = passed_on()[role]
    own = ["--coordinator", "pc:5555", "--model", "a b"] if role == "worker" else []
    plan = plan_of(run(copy, system, role, *own, *words, "--dry-run"))
    assert plan[-1][:3] == ["exec", f"{copy}/.venv/bin/dllm", role]
    assert plan[-1][-len(words) :] == words
    if role == "worker":
        assert plan[-1][5 : -len(words)] == own
        assert "worker.model=a b" in plan[-2]
    joined = [f"{a}={b}" for a, b in zip(words[::2], words[1::2], strict=False)]
    if len(joined) * 2 == len(words):  # no flags among them
        assert plan_of(run(copy, system, role, *own, *joined, "--dry-run")) == plan


@needs_bash
@systems
def test_what_else_follows_is_passed_on(copy: Path, system: str) -> None:
    plan = plan_of(run(copy, system, "test", "tests/unit", "-k", "a or b", "--dry-run"))
    assert plan[-1][-6:] == ["pytest", "-n", "2", "tests/unit", "-k", "a or b"]
    plan = plan_of(run(copy, system, "coordinator", "/models/mine", "--dry-run"))
    assert plan[-1][-1] == "/models/mine"


@needs_bash
def test_it_says_what_to_type_and_asks_dllm_before_it_installs_a_service(copy: Path) -> None:
    system = "macos" if sys.platform == "darwin" else "linux"
    programs = copy / ".venv/bin"
    programs.mkdir(parents=True)
    add_program(programs, "python", "exit 0")
    add_program(programs, "dllm", 'echo "No such option: --theads" >&2; exit 2')
    (copy / ".venv/pyvenv.cfg").write_text(f"command = python -m venv {copy}/.venv\n")
    said = run(copy, system)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert shlex.split(lines[-2])[-2:] == [f"{copy}/.venv/bin/dllm", "--help"]
    (path,) = (word for word in shlex.split(lines[-1]) if word.startswith("PATH="))
    assert path == f"PATH={copy}/.venv/bin:$PATH"
    assert run(copy, system, MAKELEVEL="1").stdout == ""
    said = run(copy, system, "worker", "--coordinator", "pc:1", "--theads", "3", "--service")
    assert said.returncode == 2
    assert "No such option: --theads" in said.stderr


@needs_bash
@systems
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "Unknown role nonsense. Choose demo, test, coordinator or worker"),
        (["demo", "test"], "Two roles were given, demo and test"),
        (["--nonsense"], "Unknown option --nonsense"),
        (["worker"], "add --coordinator dllm://"),
        (["worker", "--coordinator"], "--coordinator needs a value"),
        (["worker", "--coordinator", "pc"], "pc is no address. Write HOST:PORT"),
        (["worker", "--coordinator", "p c:1"], "p c:1 is no address"),
        (["worker", "--coordinator", "dllm://pc:1/abc"], "not all of the line"),
        (["worker", "--coordinator", LINE.replace("pc:1", "p c:1")], "p c:1 is no address"),
        (["worker", "--coordinator=pc:1", "--name=a b"], "The name a b will not do"),
        (["demo", "--name", "a"], "belong to the role worker"),
        (["worker", "--bind", "pc:1"], "belongs to the role coordinator"),
        (["demo", "--model", "m"], "belongs to the roles coordinator and worker"),
        (["--threads", "4", "worker"], "Options of dllm follow the role"),
        (["worker", "--coordinator", "pc:1", "test"], "Two roles were given, worker and test"),
        (["demo", "--service"], "belong to the roles worker and coordinator"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use(copy: Path, system: str, arguments: list[str], expected: str) -> None:
    result = run(copy, system, *arguments, "--dry-run")
    assert result.returncode == 2
    assert expected in result.stderr
    assert result.stdout == ""


@needs_bash
@systems
def test_a_line_to_join_with_enrols_first_and_is_shown_nowhere(copy: Path, system: str) -> None:
    result = run(copy, system, "worker", "--coordinator", LINE, "--name", "mac", "--dry-run")
    assert result.returncode == 0, result.stderr
    enrol, work = plan_of(result)[-2:]
    assert enrol[1:] == ["join", "dllm://pc:1/...", "--enrol-only", "--name", "mac"]
    assert work[work.index("--coordinator") + 1] == "pc:1"
    assert LINE not in result.stdout + result.stderr
    (copy / ".venv/bin").mkdir(parents=True)
    add_program(copy / ".venv/bin", "python", "exit 0")
    add_program(copy / ".venv/bin", "dllm", 'echo "$@"; [ "$1" = join ] && exit 3')
    (copy / ".venv/pyvenv.cfg").write_text(f"command = python -m venv {copy}/.venv\n")
    real = "macos" if sys.platform == "darwin" else "linux"
    said = run(copy, real, "worker", "--coordinator", LINE)
    assert said.returncode == 3, "it was not let in, so it does not work"
    assert said.stdout.splitlines()[-1] == f"join {LINE} --enrol-only"


@needs_bash
def test_the_script_of_another_system_refuses(copy: Path) -> None:
    other = "linux" if sys.platform == "darwin" else "macos"
    result = run(copy, other)
    assert result.returncode == 2
    assert "Use the other script" in result.stderr


@needs_bash
@systems
def test_python_too_old(copy: Path, tools: Path, system: str) -> None:
    add_program(tools, "python3", "echo 3.9")
    add_program(tools, "apt-get", "")
    result = run(copy, system, "--dry-run", PATH=str(tools), PYTHON="")
    assert result.returncode == 1
    assert "Python 3.11 or newer is needed, and none was found (python3 is 3.9)" in result.stderr
    assert "Install it: " in result.stderr
    assert "would run" not in result.stdout


@needs_bash
@systems
def test_no_python(copy: Path, tools: Path, system: str) -> None:
    result = run(copy, system, "--dry-run", PATH=str(tools), PYTHON="")
    assert result.returncode == 1
    assert "Python 3.11 or newer is needed, and none was found." in result.stderr


@needs_bash
@systems
def test_a_newer_python_under_another_name_is_found(copy: Path, tools: Path, system: str) -> None:
    add_program(tools, "python3", "echo 3.9")
    add_program(tools, "python3.12", "echo 3.12")
    result = run(copy, system, "--dry-run", PATH=str(tools), PYTHON="")
    assert result.returncode == 0, result.stderr
    assert "would run: python3.12 -m venv" in result.stdout


@needs_bash
def test_the_python_that_was_asked_for_is_too_old(copy: Path, tools: Path) -> None:
    add_program(tools, "python3.12", "echo 3.12")
    add_program(tools, "old", "echo 3.8")
    result = run(copy, "linux", "--dry-run", PATH=str(tools), PYTHON="old")
    assert result.returncode == 1
    assert "PYTHON is set to old, which is Python 3.8" in result.stderr


@needs_bash
def test_python_without_venv(copy: Path, tools: Path) -> None:
    add_program(tools, "python3", 'case $2 in *ensurepip*) exit 1 ;; esac; echo "3.12"')
    add_program(tools, "apt-get", "")
    result = run(copy, "linux", "--dry-run", PATH=str(tools), PYTHON="")
    assert result.returncode == 1
    assert "without its venv module" in result.stderr
    assert "sudo apt-get install python3.12-venv" in result.stderr


@needs_bash
def test_another_build_of_torch(copy: Path) -> None:
    result = run(copy, "linux", "--dry-run", DLLM_TORCH_INDEX_URL="https://index.example/cpu")
    plan = plan_of(result)
    assert plan[1][-3:] == ["--extra-index-url", "https://index.example/cpu", "torch"]
    assert "--extra-index-url" not in plan[2]  # for PyTorch alone


@needs_bash
@systems
def test_a_service_is_installed_by_dllm(copy: Path, system: str) -> None:
    own = ["--coordinator", "[::1]:5555", "--name", "mac"]
    plan = plan_of(run(copy, system, "worker", *own, "--service", "--dry-run"))
    config = ["--config", f"{copy}/config/local.yaml"]
    program = [f"{copy}/.venv/bin/dllm", "service", "install"]
    assert plan[-1] == [*program, "worker", *config, *own, "--wait"]
    own = ["--model", '$HOME/"my\\ model"', "--bind", "0.0.0.0:5555"]
    plan = plan_of(run(copy, system, "coordinator", *own, "--service", "--dry-run"))
    assert plan[-1] == [*program, "coordinator", own[1], *config, *own[2:]]


@needs_bash
@systems
def test_uninstalling_the_service(copy: Path, system: str) -> None:
    plan = plan_of(run(copy, system, "worker", "--uninstall-service", "--dry-run"))
    remover = ["-m", "distributed_llm.services", "remove", "worker"]
    assert plan == [["env", f"PYTHONPATH={copy}", sys.executable, *remover]]


@needs_bash
@pytest.mark.skipif(sys.platform != "linux", reason="systemd is on Linux")
def test_a_service_is_removed_though_its_program_is_gone(copy: Path, tmp_path: Path) -> None:
    package = copy / "distributed_llm"
    shutil.copytree(ROOT / "distributed_llm/services", package / "services")
    shutil.copy(ROOT / "distributed_llm/__init__.py", package)
    programs = tmp_path / "programs"
    programs.mkdir()
    add_program(programs, "systemctl", 'echo "systemctl $*"; exit 1')
    fake = tmp_path / "fake_user"  # its home is the copy, whoever runs the tests
    fake.mkdir()
    (fake / "sitecustomize.py").write_text("import os; os.geteuid = lambda: 1000\n")
    add_program(
        programs, "python3.99", f'PYTHONPATH="$PYTHONPATH:{fake}" exec "{sys.executable}" "$@"'
    )
    unit = copy / ".config/systemd/user/dllm-worker.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    path = f"{programs}:{os.environ['PATH']}"
    assert not (copy / ".venv").exists()
    for expected in ("systemctl --user disable --now dllm-worker", "There is no service to remove"):
        said = run(copy, "linux", "worker", "--uninstall-service", PATH=path, PYTHON="python3.99")
        assert said.returncode == 0, said.stderr
        assert expected in said.stdout
        assert not unit.exists()


# --- Windows


def test_powershell_tokens() -> None:
    text = WINDOWS.read_text(encoding="ascii")  # Windows PowerShell reads no UTF-8 without a mark
    opened: list[str] = []
    pairs = {")": "(", "]": "[", "}": "{"}
    for token, value in PowerShellLexer().get_tokens(text):
        assert token is not Error, value
        if token in Comment or token in String or token not in (Punctuation, Token.Operator):
            continue
        for character in value:
            if character in pairs.values():
                opened.append(character)
            elif character in pairs:
                assert opened.pop() == pairs[character]
    assert opened == []


def test_powershell_has_the_roles_and_options_of_bash() -> None:
    common = (SCRIPTS / "common.sh").read_text(encoding="utf-8")
    windows = WINDOWS.read_text(encoding="utf-8")
    bash_help = common[common.index("Installs ") : common.index("\nEND\n")]
    windows_help = windows[windows.index("Installs ") : windows.index("\n'@")]
    assert windows_help == bash_help
    code = windows.replace(windows_help, "")
    for option in re.findall(r"^  (--[a-z-]+)", bash_help, re.MULTILINE):
        assert f"'{option}' {{" in code or option == "--help"
    for role in filter(None, ROLES):
        assert f"'{role}'" in code


# --- what goes with the scripts


def test_the_package_has_the_license_and_the_texts_that_it_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (ROOT / project["readme"]).read_text(encoding="utf-8").startswith("# ")
    assert all(project[field] for field in ("description", "classifiers", "keywords"))
    (name,) = project["license-files"]
    text = (ROOT / name).read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    for requirement in needed:
        name = re.split(r"[^A-Za-z0-9._-]", requirement)[0]
        assert re.sub(r"[-_.]+", "-", name).lower() in pinned
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize(("target", "asked"), [("demo", ("demo", "demo --serve")), ("test", ("",))])
def test_make_asks_a_setup_script_for_what_it_needs(target: str, asked: tuple[str, ...]) -> None:
    command = ["make", "--no-print-directory", "-n", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    words = re.findall(r"bash setup_scripts/setup_\w+\.sh *([^;\n]*)", done.stdout)
    assert sorted(word.strip() for word in words) == [*asked]


def test_pre_commit_runs_what_make_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in hooks["repos"][0]["hooks"]:
        tool = hook["entry"].removeprefix(".venv/bin/").removeprefix("python -m ").split()[0]
        assert tool in makefile
