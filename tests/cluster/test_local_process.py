"""Workers that are forked from a warm process are like those that are started cold."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from distributed_llm import LocalCluster, forking
from distributed_llm.common.cache_folder import CACHE_VARIABLE
from distributed_llm.common.errors import ConfigError
from distributed_llm.common.keyring import STATE_VARIABLE
from distributed_llm.forking import ForkServer, fork_server
from distributed_llm.local_process import LocalProcess, earlier_log
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks them")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """The server that all clusters of this test run share; no test may harm it."""
    with fork_server() as shared:
        assert shared is not None
        yield shared


@pytest.fixture
def own_server() -> Iterator[ForkServer]:
    made = ForkServer()
    yield made
    made.close()


def starts(folder: Path, server: ForkServer | None, *command: str) -> LocalProcess:
    """Return a child of ours, or of `server`."""
    settings = {"DLLM_WORKER__COORDINATOR": "127.0.0.1:9", "DLLM_WORKER__CONNECT_TIMEOUT_S": "60"}
    return LocalProcess("child", command or ["worker"], settings, folder / "log", server)


def parent_of(process: LocalProcess) -> int:
    return psutil.Process(process.pid).ppid()


def test_a_forked_child_ends_like_a_cold_one(server: ForkServer, tmp_path: Path) -> None:
    forked = starts(tmp_path, server)
    assert parent_of(forked) == server.pid
    assert forked.exit_code is None
    with pytest.raises(subprocess.TimeoutExpired):
        forked.wait(0.01)
    forked.kill()
    assert forked.exit_code == -signal.SIGKILL
    forked.terminate()  # it is gone: nobody else is hit
    forked.close()


def test_what_it_exits_with_and_writes_is_known(server: ForkServer, tmp_path: Path) -> None:
    process = starts(tmp_path, server, "worker", "--threads", "-3")
    assert process.wait(30.0) == 2
    said = process.log_tail()
    assert "threads" in said
    assert said.startswith("Error (config): ")
    assert process.last_words() == said.removeprefix("Error (config): ")
    assert isinstance(process.failure(), ConfigError)
    process.trim_log(1 << 20)
    assert process.log_tail() == said, "it is not long"
    process.trim_log(1)
    assert process.log_tail() == ""
    assert earlier_log(process.log).read_text().strip() == said
    process.log.write_text("\n".join(f"line {number}" for number in range(20)))
    assert process.last_words().splitlines() == [f"line {number}" for number in range(15, 20)]
    process.close()


def test_it_ends_when_its_stdin_does(server: ForkServer, tmp_path: Path) -> None:
    """As it does when the program that started it is killed."""
    process = starts(tmp_path, server)
    second = starts(tmp_path, server)
    process.close()
    assert process.exit_code is not None
    assert second.exit_code is None, "no child holds another one's pipes"
    second._stdin.close()
    assert second.wait(10.0) == 0
    second.close()


def test_the_server_may_fork_safely(server: ForkServer, tmp_path: Path) -> None:
    """Another thread might hold a lock at that moment, which nobody would ever release."""
    forked = starts(tmp_path, server)
    assert psutil.Process(server.pid).num_threads() == 1
    forked.close()


def test_a_forked_child_works_where_the_program_works(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = starts(tmp_path, server)
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    second = starts(tmp_path, server)
    eventually(lambda: psutil.Process(second.pid).cwd() == str(folder))
    assert psutil.Process(first.pid).cwd() != str(folder)
    first.close()
    second.close()


def test_a_child_has_the_folders_of_its_user_and_no_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {STATE_VARIABLE: str(tmp_path / "state"), CACHE_VARIABLE: str(tmp_path / "cache")}
    for name, value in {**folders, "DLLM_WORKER__NAME": "somebody-else"}.items():
        monkeypatch.setenv(name, value)
    process = starts(tmp_path, None)
    given = eventually(lambda: psutil.Process(process.pid).environ())  # at first there is none
    process.close()
    assert folders.items() <= given.items()
    assert "DLLM_WORKER__NAME" not in given


def test_several_threads_may_wait_for_one_child(server: ForkServer, tmp_path: Path) -> None:
    forked = starts(tmp_path, server)
    with ThreadPoolExecutor(4) as pool:
        codes = [pool.submit(forked.wait, 30.0) for _ in range(4)]
        forked.kill()
        assert [code.result() for code in codes] == [-signal.SIGKILL] * 4
    forked.close()
    forked.close()  # nothing is left to be closed


def test_a_start_that_is_interrupted_leaves_no_child_and_later_ones_are_right(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def children() -> set[int]:
        return {child.pid for child in psutil.Process(server.pid).children()}

    before = children()
    with monkeypatch.context() as patch:
        patch.setattr(ForkServer, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            starts(tmp_path, server)
    forked = starts(tmp_path, server)
    eventually(lambda: children() - before == {forked.pid}, limit_s=10)
    forked.kill()
    assert forked.exit_code == -signal.SIGKILL
    forked.close()


def interrupted(_: ForkServer) -> None:
    raise KeyboardInterrupt


def test_variables_that_torch_has_read_already_need_a_cold_start(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "") + "1")
    process = starts(tmp_path, server)
    assert parent_of(process) == os.getpid()
    process.close()


def test_without_its_server_a_child_goes_on_and_the_next_one_starts_cold(
    own_server: ForkServer, tmp_path: Path
) -> None:
    forked = starts(tmp_path, own_server)
    os.kill(own_server.pid, signal.SIGKILL)
    own_server._process.wait()
    assert forked.exit_code is None
    cold = starts(tmp_path, own_server)
    assert parent_of(cold) == os.getpid()
    cold.close()
    forked.kill()
    assert forked.exit_code == -signal.SIGKILL
    forked.close()


def refused(_: int) -> int:
    raise PermissionError


@pytest.mark.parametrize("lacks", ["Linux", "the system call", "permission"])
def test_where_forks_are_not_safe_or_cannot_be_watched_there_are_none(
    monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    match lacks:
        case "Linux":
            monkeypatch.setattr(sys, "platform", "darwin")
        case "the system call":  # as in builds of Python for old systems
            monkeypatch.delattr(os, "pidfd_open")
        case "permission":  # as in some sandboxes
            monkeypatch.setattr(os, "pidfd_open", refused)
    with fork_server() as none:
        assert none is None


def test_all_clusters_share_one_server(checkpoint: Path) -> None:
    with fork_server() as outer:
        assert outer is not None
        with LocalCluster(checkpoint, workers=2) as cluster:
            assert {parent_of(worker) for worker in cluster.workers} == {outer.pid}
            instances = {worker.name for worker in cluster.wait_until_serving().workers}
            assert len(instances) == 2
        with fork_server() as inner:
            assert inner is outer
        assert psutil.pid_exists(outer.pid)


def test_the_server_ends_with_its_last_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "_users", 0)  # as if nobody used one yet
    monkeypatch.setattr(forking, "_server", None)
    with fork_server() as outer:
        assert outer is not None
        with fork_server() as inner:
            assert inner is outer
        assert outer._process.poll() is None
    assert outer._process.poll() is not None
