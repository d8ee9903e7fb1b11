"""A worker for each GPU of a machine: which there are, and when they start, start again and end."""

import asyncio
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from distributed_llm import worker_command
from distributed_llm.child_events import Ended, Fail, Finish, Signalled, TellToEnd
from distributed_llm.common.errors import ConfigError, DistributedLLMError, NotEnrolled
from distributed_llm.common.settings import Settings
from distributed_llm.common.stopping import exit_code
from distributed_llm.gpus import run
from distributed_llm.gpus.group import (
    PAUSE_S,
    WELL_S,
    Action,
    Group,
    Start,
    Tell,
)
from distributed_llm.gpus.workers import GpuWorker, gpus_of, workers_for
from distributed_llm.worker import devices

TWO = workers_for(("cuda:0", "cuda:1"), "pc", "0.0.0.0:0")
FIRST, SECOND = TWO
INTERRUPTED = 130

# ------------------------------------------------------------------ which there are


@pytest.mark.parametrize(
    ("device", "present", "expected"),
    [
        ("auto", ["cuda:0", "cuda:1", "cpu"], ("cuda:0", "cuda:1")),
        ("auto", ["cuda:0", "cuda:1", "xpu:0", "cpu"], ("cuda:0", "cuda:1")),
        ("auto", ["xpu:0", "xpu:1", "cpu"], ("xpu:0", "xpu:1")),
        ("auto", ["cuda:0", "xpu:0", "xpu:1", "cpu"], ()),
        ("auto", ["cuda:0", "cpu"], ()),
        ("auto", ["mps", "cpu"], ()),
        ("auto", ["cpu"], ()),
        ("cuda:1", ["cuda:0", "cuda:1", "cpu"], ()),
        ("cuda", ["cuda:0", "cuda:1", "cpu"], ()),
        ("fastest", ["cuda:0", "cuda:1", "cpu"], ()),
        ("cpu", ["cuda:0", "cuda:1", "cpu"], ()),
    ],
)
def test_auto_is_every_gpu_of_the_fastest_kind(
    device: str, present: list[str], expected: tuple[str, ...]
) -> None:
    assert gpus_of(device, present) == expected


def test_each_worker_has_a_name_and_a_port_of_its_own() -> None:
    assert [(one.name, one.device, one.peer_bind) for one in TWO] == [
        ("pc-gpu0", "cuda:0", "0.0.0.0:0"),
        ("pc-gpu1", "cuda:1", "0.0.0.0:0"),
    ]
    long = workers_for(["cuda:0", "cuda:12"], "x" * 64, "[::1]:5556")
    assert [one.peer_bind for one in long] == ["[::1]:5556", "[::1]:5557"]
    for worker in long:  # they are what the settings take
        words = {"name": worker.name, "device": worker.device, "peer_bind": worker.peer_bind}
        assert Settings.model_validate({"worker": words}).worker.name == worker.name
    assert len({worker.name for worker in long}) == 2


# ------------------------------------------------------------------ what becomes of them


@pytest.fixture
def group() -> Iterator[Group]:
    """Two workers that were started in second 0."""
    made = Group(TWO)
    assert made.begin(now=0.0) == [
        Tell("2 are here, with a worker each: pc-gpu0 on cuda:0 and pc-gpu1 on cuda:1"),
        Start(FIRST),
        Start(SECOND),
    ]
    yield made
    made.validate()


def dies(group: Group, worker: GpuWorker, code: int, now: float) -> list[Action]:
    done = group.handle(Ended(worker.name, code, "no room"), now=now)
    group.validate()
    return done


def test_one_that_fails_is_told_and_the_other_goes_on(group: Group) -> None:
    text = "pc-gpu1 on cuda:1 ended (exit code 2); pc-gpu0 goes on without it. It said: no room"
    assert dies(group, SECOND, 2, 5.0) == [Tell(text)]
    assert group.next_deadline() == math.inf
    assert dies(group, FIRST, 3, 6.0) == [Fail("pc-gpu0")]


def test_one_that_worked_is_started_again(group: Group) -> None:
    (told,) = dies(group, SECOND, -9, WELL_S)
    assert isinstance(told, Tell)
    assert "SIGKILL" in told.text
    assert "started again in 2.0 s. It said: no room" in told.text
    due = group.next_deadline()
    assert due == WELL_S + PAUSE_S
    assert group.on_timer(now=due - 0.1) == []
    assert group.on_timer(now=due) == [Start(SECOND)]
    assert group.next_deadline() == math.inf
    (told,) = dies(group, SECOND, 1, due + WELL_S - 1)
    assert isinstance(told, Tell)
    assert "pc-gpu0 goes on without it" in told.text


def test_the_last_one_may_be_started_again_too(group: Group) -> None:
    dies(group, SECOND, 1, 1.0)
    (told,) = dies(group, FIRST, 1, 100.0)
    assert isinstance(told, Tell)
    assert group.on_timer(now=200.0) == [Start(FIRST)]
    assert dies(group, FIRST, 1, 201.0) == [Fail("pc-gpu0")]


def test_one_that_fails_while_the_other_is_to_start_again(group: Group) -> None:
    dies(group, FIRST, 1, 90.0)
    group.on_timer(now=92.0)
    dies(group, SECOND, 1, 93.0)
    (told,) = dies(group, FIRST, 1, 94.0)
    assert isinstance(told, Tell)
    assert "pc-gpu1 goes on without it" in told.text


def test_drained_workers_have_left(group: Group) -> None:
    text = "pc-gpu0 on cuda:0 has left the cluster; pc-gpu1 goes on without it"
    assert dies(group, FIRST, 0, 100.0) == [Tell(text)]
    assert dies(group, SECOND, 0, 200.0) == [Finish(0)]


def test_a_signal_has_all_leave_and_a_second_one_ends_them(group: Group) -> None:
    told, *actions = group.handle(Signalled(INTERRUPTED), now=1.0)
    assert isinstance(told, Tell)
    assert "pc-gpu0 and pc-gpu1 have left" in told.text
    assert actions == [TellToEnd("pc-gpu0"), TellToEnd("pc-gpu1")]
    assert dies(group, FIRST, 1, 2.0) == []
    assert group.handle(Signalled(INTERRUPTED), now=2.5) == [Finish(INTERRUPTED)]


def test_after_a_signal_it_ends_with_the_last_one(group: Group) -> None:
    dies(group, FIRST, -9, 99.0)  # to be started again
    assert group.handle(Signalled(INTERRUPTED), now=99.5)[1:] == [TellToEnd("pc-gpu1")]
    assert group.on_timer(now=200.0) == []
    assert dies(group, SECOND, 0, 201.0) == [Finish(INTERRUPTED)]


def test_a_signal_while_none_runs(group: Group) -> None:
    dies(group, FIRST, 1, 1.0)
    dies(group, SECOND, 1, 100.0)
    assert group.handle(Signalled(INTERRUPTED), now=100.5) == [Finish(INTERRUPTED)]


# ------------------------------------------------------------------ processes


CANNOT_START = 99
"""Made-up exit code of a process that cannot even be started."""


@dataclass
class Script:
    """What a made-up process does: it logs lines, and ends, at once or when it is told to."""

    lines: str
    code: int | None = None


class FakeProcess:
    """Stands for `LocalProcess`."""

    scripts: dict[str, Script]
    made: "list[FakeProcess]"
    one_closed: asyncio.Event | None = None

    def __init__(self, name: str, words: Sequence[str], settings: Any, log: Path) -> None:
        self.name, self.words, self.log = name, list(words), log
        if self.scripts[name].code == CANNOT_START:
            raise OSError("no process")
        self.exit_code = self.scripts[name].code
        self.closed = False
        log.write_text(self.scripts[name].lines)
        self.made.append(self)

    def last_words(self) -> str:
        return "its last words"

    def failure(self) -> DistributedLLMError:
        return ConfigError(f"{self.name} has no memory.")

    def trim_log(self, most_bytes: int) -> None:
        """Do nothing."""

    def terminate(self) -> None:
        with self.log.open("a") as log:
            log.write("leaving\n")
        self.exit_code = 0

    def kill(self) -> None:
        self.exit_code = -9

    def close(self) -> None:
        self.closed = True
        if self.one_closed:
            self.one_closed.set()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcess]:
    monkeypatch.setattr(run, "LocalProcess", FakeProcess)
    monkeypatch.setattr(run, "_LOOK_EVERY_S", 0.001)
    monkeypatch.setattr(FakeProcess, "made", [], raising=False)
    monkeypatch.setattr(FakeProcess, "one_closed", None)
    return FakeProcess


def test_processes_are_started_followed_and_ended(
    processes: type[FakeProcess], capfd: pytest.CaptureFixture[str]
) -> None:
    processes.scripts = {"pc-gpu0": Script("joined\nas a w"), "pc-gpu1": Script("no room\n", 2)}

    async def until_a_signal() -> int:
        running = asyncio.ensure_future(run.run_workers(TWO, ["worker", "--wait"]))
        processes.one_closed = asyncio.Event()
        await processes.one_closed.wait()
        signal.raise_signal(signal.SIGTERM)
        return await running

    assert asyncio.run(until_a_signal()) == exit_code(signal.SIGTERM)
    assert [process.words for process in processes.made] == [
        ["worker", "--wait", "--name", name, "--device", device, "--peer-bind", "0.0.0.0:0"]
        for name, device in (("pc-gpu0", "cuda:0"), ("pc-gpu1", "cuda:1"))
    ]
    assert all(process.closed for process in processes.made)
    assert not processes.made[0].log.exists()
    written = capfd.readouterr().err
    for line in ("pc-gpu0 | joined\n", "pc-gpu1 | no room\n", "pc-gpu0 | as a wleaving\n"):
        assert line in written


def test_the_failure_of_the_last_one_is_the_groups(processes: type[FakeProcess]) -> None:
    processes.scripts = {"pc-gpu0": Script("", 2), "pc-gpu1": Script("", 2)}
    with pytest.raises(ConfigError, match="pc-gpu1 has no memory"):
        asyncio.run(run.run_workers(TWO, ["worker"]))
    assert all(process.closed for process in processes.made)


def test_one_that_cannot_be_started_ends_no_other(
    processes: type[FakeProcess], caplog: pytest.LogCaptureFixture
) -> None:
    processes.scripts = {"pc-gpu0": Script(""), "pc-gpu1": Script("", CANNOT_START)}

    async def until_a_signal() -> int:
        running = asyncio.ensure_future(run.run_workers(TWO, ["worker"]))
        await asyncio.sleep(0)  # it starts them in one go
        assert processes.made[0].exit_code is None
        signal.raise_signal(signal.SIGTERM)
        return await running

    assert asyncio.run(until_a_signal()) == exit_code(signal.SIGTERM)
    assert "pc-gpu0 goes on without it. It said: pc-gpu1 could not be started: no" in caplog.text


def test_that_none_could_be_started_is_the_groups_failure(processes: type[FakeProcess]) -> None:
    processes.scripts = {"pc-gpu0": Script("", CANNOT_START), "pc-gpu1": Script("", CANNOT_START)}
    with pytest.raises(
        DistributedLLMError, match=r"pc-gpu1 could not be started: no process\. Free"
    ):
        asyncio.run(run.run_workers(TWO, ["worker"]))


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize("device", [None, "cuda:1"])
def test_the_command_starts_a_worker_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str | None
) -> None:
    asked: list[Any] = []

    async def run_workers(workers: Sequence[GpuWorker], words: Sequence[str]) -> int:
        asked.append((workers, words))
        return 7

    async def find_way_in(settings: Any) -> str:
        return f"to {settings.coordinator}"

    async def work(settings: Any, way_in: str) -> int:
        assert way_in == "to pc:5555"
        asked.append(settings.device)
        return 7

    monkeypatch.setattr(devices, "present", lambda: ["cuda:0", "cuda:1", "cpu"])
    monkeypatch.setattr(run, "run_workers", run_workers)
    monkeypatch.setattr("distributed_llm.worker.way_in.find_way_in", find_way_in)
    monkeypatch.setattr("distributed_llm.worker.work.work", work)
    monkeypatch.setattr(worker_command, "start_process", lambda *_: None)
    monkeypatch.setattr(worker_command, "limit_active_waiting", lambda _: None)
    with pytest.raises(typer.Exit) as ended:
        worker_command.worker(
            coordinator="pc:5555", name="pc", device=device, max_memory="1GiB", wait=True
        )
    assert ended.value.exit_code == 7
    words = ["worker", "--coordinator", "pc:5555", "--max-memory", "1GiB", "--wait"]
    assert asked == ([(TWO, words)] if device is None else [device])


def test_who_cannot_join_is_told_before_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    async def find_way_in(settings: Any) -> None:
        raise NotEnrolled("no key")

    monkeypatch.setattr("distributed_llm.worker.way_in.find_way_in", find_way_in)
    for slow in ("distributed_llm.worker.devices", "distributed_llm.worker.work"):
        monkeypatch.setitem(sys.modules, slow, None)  # importing it fails
    monkeypatch.setattr(worker_command, "start_process", lambda *_: None)
    monkeypatch.setattr(worker_command, "limit_active_waiting", lambda _: None)
    with pytest.raises(NotEnrolled):
        worker_command.worker(coordinator="pc:5555")
