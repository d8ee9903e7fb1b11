"""The `dllm` command with standard streams that are full, closed, or in other character sets."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed_llm.common.messages import Generate, ToClient
from tests.fake_coordinator import FakeCoordinator, finished, piece
from tests.waiting import eventually
from tests.wire.test_generate_command import STATUS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="redirects as a POSIX shell does")

COMMAND = [sys.executable, "-m", "distributed_llm"]
LIMIT_S = 60
TEXT = "na\xefve \u4f60\u597d \U0001f600"


def script(request: Generate) -> list[ToClient]:
    return [piece(request, TEXT, 1, end="stop"), finished(request)]


@pytest.fixture(scope="module")
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator(script, STATUS) as fake:
        yield fake


def dllm(
    *arguments: str, redirect: str = "", stdin: bytes = b"", **environment: str
) -> "subprocess.CompletedProcess[bytes]":
    """Run a command as a shell does, with its redirections."""
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        timeout=LIMIT_S,
        env={**os.environ, **environment},
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


VERBS = {
    "version": ("--version",),
    "help": ("--help",),
    "help of a verb": ("generate", "--help"),
    "plan": ("plan", "", "--worker", "1GiB"),
    "plan as JSON": ("plan", "", "--worker", "1GiB", "--json"),
    "status": ("status", "--coordinator", "{}"),
    "status as JSON": ("status", "--json", "--coordinator", "{}"),
    "generate": ("generate", "Hi", "--coordinator", "{}"),
    "generate as JSON": ("generate", "Hi", "--json", "--coordinator", "{}"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_output_that_cannot_be_written_is_told(coordinator: FakeCoordinator, verb: str) -> None:
    arguments = [text.format(coordinator.address) for text in VERBS[verb]]
    for redirect, why in (("> /dev/full", b"No space left"), (">&-", b"it is closed")):
        done = dllm(*arguments, redirect=redirect)
        assert done.returncode == 1
        assert done.stderr.startswith(b"Error (output): ")
        assert done.stderr.count(b"\n") == 1
        assert why in done.stderr


def test_a_reader_that_has_enough_ends_the_command_in_silence(
    coordinator: FakeCoordinator,
) -> None:
    arguments = ("status", "--coordinator", coordinator.address)
    done = dllm(*arguments, redirect="| true")
    assert done.stderr == b""


def test_messages_that_cannot_be_written_stop_nothing(coordinator: FakeCoordinator) -> None:
    arguments = ("generate", "Hi", "--stats", "--coordinator", coordinator.address)
    for redirect in ("2> /dev/full", "2>&-"):
        done = dllm(*arguments, redirect=redirect)
        assert (done.returncode, done.stdout.decode()) == (0, TEXT + "\n")
        assert dllm("status", "--config", "nowhere", redirect=redirect).returncode == 2


@pytest.mark.parametrize("redirect", ["> /dev/full", ">&-", "<&- >&-"])
def test_a_coordinator_serves_without_an_output(
    checkpoint: Path, tmp_path: Path, redirect: str
) -> None:
    log = tmp_path / "log"
    log.touch()
    serve = [*COMMAND, "coordinator", str(checkpoint), "--bind", "127.0.0.1:0"]
    with subprocess.Popen(
        ["sh", "-c", f'exec "$@" {redirect} 2> "$0"', str(log), *serve]
    ) as running:
        try:
            eventually(lambda: "cannot be printed" in log.read_text() or running.poll() is not None)
            assert running.poll() is None, log.read_text()
            running.terminate()
            assert running.wait(LIMIT_S) == 0
        finally:
            running.kill()
    assert "Traceback" not in log.read_text()


def test_input_that_is_closed(coordinator: FakeCoordinator) -> None:
    address = ("--coordinator", coordinator.address)
    assert dllm("generate", "Hi", *address, redirect="<&-").stdout.decode() == TEXT + "\n"
    done = dllm("generate", *address, redirect="<&-")
    assert done.returncode == 2
    assert b"cannot be read" in done.stderr
    assert b"it is closed" in done.stderr


# ------------------------------------------------------------------ character sets


ESCAPED = {
    "ascii": "na\\xefve \\u4f60\\u597d \\U0001f600",
    "cp1252": "na\xefve \\u4f60\\u597d \\U0001f600",
    "gbk": "na\\xefve \u4f60\u597d \\U0001f600",
}


@pytest.mark.parametrize("encoding", ESCAPED)
def test_characters_that_the_output_lacks_are_escaped(
    coordinator: FakeCoordinator, encoding: str
) -> None:
    asked = ("generate", "Hi", "--coordinator", coordinator.address)
    done = dllm(*asked, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout.decode(encoding)) == (0, ESCAPED[encoding] + "\n")
    said = done.stderr.decode("ascii").split()
    assert encoding in said, "told once, with what to do"
    assert "PYTHONIOENCODING=utf-8" in " ".join(said)
    done = dllm(*asked, "--json", PYTHONIOENCODING=encoding)
    assert json.loads(done.stdout.decode(encoding))["text"] == TEXT
    assert (done.returncode, done.stderr) == (0, b"")


def test_logs_and_tables_in_ascii(coordinator: FakeCoordinator) -> None:
    done = dllm("status", "--coordinator", coordinator.address, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    done = dllm("worker", "--config", "\u4f60.yaml", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert b"\\u4f60.yaml" in done.stderr


def test_a_prompt_in_the_encoding_of_the_input(coordinator: FakeCoordinator) -> None:
    asked = ("generate", "--coordinator", coordinator.address)
    done = dllm(*asked, stdin="caf\xe9\nna\xefve".encode("latin-1"), PYTHONIOENCODING="latin-1")
    assert done.returncode == 0
    assert coordinator.prompts[-1] == ["caf\xe9\nna\xefve".encode()]


@pytest.mark.parametrize("environment", [{}, {"LC_ALL": "C"}, {"PYTHONUTF8": "1"}], ids=str)
def test_a_prompt_in_another_encoding(
    coordinator: FakeCoordinator, environment: dict[str, str]
) -> None:
    before = len(coordinator.prompts)
    asked = ("generate", "--coordinator", coordinator.address)
    done = dllm(*asked, stdin="caf\xe9 au lait".encode("latin-1"), **environment)
    assert done.returncode == 2
    assert b"not utf-8: byte 0xe9 at position 3" in done.stderr
    assert b"PYTHONIOENCODING=latin-1" in done.stderr
    assert len(coordinator.prompts) == before


# ------------------------------------------------------------------ Ctrl-C before anything runs


INTERRUPTED = """
import os, signal, sys

class Doomed:
    def __del__(self):  # Python drops exceptions that are raised in here
        os.kill(os.getpid(), signal.SIGINT)

def hear(event, arguments):
    if not heard and event == wanted and str(arguments[0]).endswith(what):
        heard.append(event)
        Doomed()

heard = []
wanted, what, *sys.argv[1:] = sys.argv[1:]
sys.addaudithook(hear)
from distributed_llm.__main__ import main
main()
"""

BEGINNINGS = [
    ("import", "distributed_llm.cli", "--help"),
    ("import", "typer", "status"),
    ("import", "distributed_llm.console", "generate", "Hi"),
    ("import", "distributed_llm.console", "drain", "pc"),
    ("import", "distributed_llm.coordinator.serve", "plan", "", "--worker", "1GiB"),
    ("import", "distributed_llm.local_process", "demo"),
    ("import", "distributed_llm.coordinator.serve", "coordinator"),
    ("open", "config.json", "coordinator", "--bind", "127.0.0.1:0"),
    ("import", "torch", "worker", "--insecure"),  # with keys, it looks for some before
]


@pytest.mark.parametrize("arguments", BEGINNINGS, ids=str)
def test_ctrl_c_is_never_lost_while_a_verb_begins(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments],
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
        restore_signals=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout) == (130, b"")
    assert all(b" INFO " in line for line in done.stderr.splitlines()), done.stderr
