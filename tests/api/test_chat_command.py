"""`dllm chat` as a person meets it: at a terminal, and without one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.api.conftest import LIMIT_S, Api

COMMAND = [sys.executable, "-m", "distributed_llm", "chat", "--max-new-tokens", "3"]


def test_without_a_terminal_lines_are_messages(api: Api) -> None:
    done = subprocess.run(
        [*COMMAND, "--coordinator", api.cluster.address],
        input="Hi café\n/stats\n".encode("latin-1"),  # which is no UTF-8
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert b">>>" not in done.stdout
    assert b"who ran what" in done.stderr


class Person:
    """Who types at a terminal, and reads what is there."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self.seen = ""

    def types(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def reads(self, text: str) -> None:
        while text not in self.seen:
            self.seen += os.read(self._terminal, 1 << 16).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]


@contextmanager
def at_a_terminal(*command: str) -> Iterator[tuple[Person, "subprocess.Popen[bytes]"]]:
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        try:
            yield Person(ours), process
        finally:
            process.kill()
            os.close(ours)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo terminals")
def test_at_a_terminal_ctrl_d_ends_it(api: Api) -> None:
    with at_a_terminal(*COMMAND, "--coordinator", api.cluster.address) as (person, process):
        person.reads("Ctrl-D ends.")
        person.reads(">>> ")
        person.types("Hi\n")
        person.reads(">>> ")
        person.types("/stats\n")
        person.reads("who ran what")
        person.reads(">>> ")
        person.types("\x04")
        assert process.wait(LIMIT_S) == 0
