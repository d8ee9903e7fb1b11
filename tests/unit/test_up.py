"""What `dllm up` decides: when its processes start, start again and end, and what is told."""

import asyncio
import json
import math
import shlex
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from distributed_llm.child_events import Ended, Fail, Finish, Signalled, TellToEnd
from distributed_llm.child_words import GROUP_MARK, LogReader, ended_text, text_of
from distributed_llm.up import run, texts
from distributed_llm.up.events import (
    Action,
    Child,
    Listens,
    Logged,
    Progress,
    Seen,
    Serves,
    Show,
    StartApi,
    StartWorker,
)
from distributed_llm.up.run import Wanted
from distributed_llm.up.supervisor import SHOW_AFTER_S, Supervisor, UpState
from tests.wire.test_status_command import status, worker

INVITATION = ("ask here", "join there")
ACCESS = ("page here",)
INTERRUPTED = 130


@pytest.fixture
def up() -> Iterator[Supervisor]:
    """One whose coordinator is being started."""
    made = Supervisor()
    yield made
    made.validate()


@pytest.fixture
def running(up: Supervisor) -> Supervisor:
    """One that serves since second 1."""
    assert up.handle(Listens(INVITATION), now=0.0) == [StartWorker(), StartApi()]
    assert up.handle(Serves(ACCESS), now=0.5) == []
    up.handle(seen("serving"), now=1.0)
    assert up.state is UpState.RUNNING
    return up


def seen(state: str, workers: int = 1) -> Seen:
    there = [worker(f"pc-{number}") for number in range(workers)]
    return Seen(status(*there, state=state, note=""))


def told(actions: list[Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, Progress)]


def shown(actions: list[Action]) -> list[tuple[str, ...]]:
    return [action.lines for action in actions if isinstance(action, Show)]


def dies(up: Supervisor, child: Child, code: int, now: float) -> list[Action]:
    done = up.handle(Ended(child, code, "no room"), now=now)
    up.validate()
    return done


# ------------------------------------------------------------------ what people are told


def test_what_runs_is_said_once_with_how_to_join(up: Supervisor) -> None:
    up.handle(Listens(INVITATION), now=0.0)
    up.handle(Serves(ACCESS), now=0.0)
    assert up.handle(seen("waiting", workers=0), now=0.5) == []
    assert up.handle(seen("loading"), now=1.0) == []
    (lines,) = shown(up.handle(seen("serving"), now=2.0))
    assert "is served" in lines[0]
    assert lines[1:] == (*ACCESS, *INVITATION)
    assert up.handle(seen("serving"), now=3.0) == []


def test_a_model_that_is_too_large_for_this_machine_waits_for_others(up: Supervisor) -> None:
    up.handle(Listens(INVITATION), now=0.0)
    missing = seen("waiting")
    assert up.handle(missing, now=1.0) == []
    assert up.handle(missing, now=1.0 + SHOW_AFTER_S - 0.1) == []
    (lines,) = shown(up.handle(missing, now=1.0 + SHOW_AFTER_S))
    assert "not served yet" in lines[0]
    assert lines[1:] == INVITATION
    assert up.handle(missing, now=60.0) == []
    (lines,) = shown(up.handle(seen("serving"), now=61.0))
    assert len(lines) == 1, "how to join was said already"
    assert "is served" in lines[0]


def test_an_api_that_is_slow_is_waited_for_a_while_and_said_later(up: Supervisor) -> None:
    up.handle(Listens(INVITATION), now=0.0)
    assert up.handle(seen("serving"), now=1.0) == []
    (lines,) = shown(up.handle(seen("serving"), now=1.0 + SHOW_AFTER_S))
    assert lines[1:] == INVITATION
    (lines,) = shown(up.handle(Serves(ACCESS), now=9.0))
    assert lines[1:] == ACCESS


def test_an_api_that_does_not_start_is_not_waited_for(up: Supervisor) -> None:
    up.handle(Listens(INVITATION), now=0.0)
    (text,) = told(dies(up, "api", 2, 0.5))
    assert text.startswith("the API ended (exit code 2); it is not started again")
    assert up.next_deadline() == math.inf
    (lines,) = shown(up.handle(seen("serving"), now=1.0))
    assert lines[1:] == INVITATION


def test_an_api_that_dies_is_started_again_and_nothing_ends(running: Supervisor) -> None:
    (text,) = told(dies(running, "api", -11, 10.0))
    assert "SIGSEGV" in text
    assert "it is started again in 1.0 s" in text
    assert running.on_timer(now=10.9) == []
    assert running.on_timer(now=11.0) == [StartApi()]
    assert told(running.handle(Serves(ACCESS), now=12.0)) == ["the API serves again"]
    dies(running, "worker", -9, 13.0)
    dies(running, "api", 1, 13.0)
    assert running.on_timer(now=14.0) == [StartWorker()]
    assert running.on_timer(now=15.0) == [StartApi()]
    assert told(dies(running, "api", 0, 16.0)) == [
        "the API was told to end, and the cluster goes on without it"
    ]
    assert running.next_deadline() == math.inf


def test_what_the_coordinator_logs_is_told(running: Supervisor) -> None:
    assert running.handle(Logged("worker mac joined"), now=2.0) == [Progress("worker mac joined")]


def test_what_becomes_of_the_workers_of_single_gpus_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    wanted = Wanted(
        coordinator=(),
        worker=(),
        api=(),
        api_bind=None,
        bind="127.0.0.1:0",
        insecure=True,
        logs=tmp_path,
        keys=None,
        progress=told.append,
        show=lambda lines: None,
    )
    log = tmp_path / "worker.log"
    log.write_text(
        f"12:00:00 WARNING {GROUP_MARK}a has ended\n12:00:01 INFO    GPU\na | 12:00:01 INFO b\n"
    )

    async def tell() -> None:
        running = run._Run(wanted)
        running._tell_of_gpus()
        running._worker_log = LogReader(log)
        for _ in range(2):
            running._tell_of_gpus()

    asyncio.run(tell())
    assert told == ["GPUs: a has ended"]


def test_new_lines_of_a_log_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("12:00:00 INFO    before\n")
    log = LogReader(path, start=path.stat().st_size)
    assert log.new_lines() == []
    with path.open("a") as file:
        file.write("12:00:01 INFO    one\nTraceback: none\n12:00:01 WARNING two: ü\n12:00:02 INF")
    lines = log.new_lines()
    assert lines == ["12:00:01 INFO    one", "Traceback: none", "12:00:01 WARNING two: ü"]
    assert list(map(text_of, lines)) == ["one", None, "two: ü"]
    with path.open("a") as file:
        file.write("O    three\n")
    assert log.new_lines() == ["12:00:02 INFO    three"]
    path.write_text("12:00:03 INFO    after\n")
    assert log.new_lines() == ["12:00:03 INFO    after"], "it was emptied meanwhile"
    with path.open("a") as file:
        file.write("12:00:04 INFO    line\n" * 10_000)
    assert 2000 < len(log.new_lines()) < 4000, "the end of what is too much"
    assert log.new_lines() == []


# ------------------------------------------------------------------ children that fail


@pytest.mark.parametrize("child", ["coordinator", "worker"])
def test_what_fails_at_the_start_ends_everything(up: Supervisor, child: Child) -> None:
    if child == "worker":
        up.handle(Listens(INVITATION), now=0.0)
    assert dies(up, child, 2, 1.0) == [Fail(child)]
    assert up.state is UpState.ENDED
    assert up.handle(Signalled(INTERRUPTED), now=2.0) == []


def test_a_worker_that_dies_later_is_started_again_after_growing_pauses(
    running: Supervisor,
) -> None:
    now, pauses = 10.0, []
    for _ in range(8):
        (text,) = told(dies(running, "worker", -9, now))
        assert "SIGKILL" in text
        assert "no room" in text
        pauses.append(running.next_deadline() - now)
        assert running.on_timer(now=running.next_deadline() - 0.01) == []
        now = running.next_deadline()
        assert running.on_timer(now=now) == [StartWorker()]
        assert running.on_timer(now=now + 1e6) == [], "it runs"
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    dies(running, "worker", 1, now + 60.0)
    assert running.next_deadline() == now + 61.0, "it had run well for a while"


@pytest.mark.parametrize("code", [0, 2])
def test_who_left_or_is_set_wrongly_is_not_started_again(running: Supervisor, code: int) -> None:
    (text,) = told(dies(running, "worker", code, 10.0))
    assert ("has left, and the coordinator goes on without it" in text) == (code == 0)
    assert ("(exit code 2); it is not started again" in text) == (code == 2)
    assert running.on_timer(now=1e6) == []
    assert running.handle(Signalled(INTERRUPTED), now=20.0)[1:] == [
        TellToEnd("api"),
        TellToEnd("coordinator"),
    ]


def test_without_its_coordinator_it_ends_with_that_ones_failure(running: Supervisor) -> None:
    assert dies(running, "coordinator", -11, 10.0) == [Fail("coordinator")]


def test_a_coordinator_that_was_told_to_end_is_no_failure(running: Supervisor) -> None:
    assert dies(running, "coordinator", 0, 10.0)[-1] == Finish(0)


# ------------------------------------------------------------------ Ctrl-C


def test_the_worker_leaves_first_and_then_the_coordinator_ends(running: Supervisor) -> None:
    assert running.handle(Signalled(INTERRUPTED), now=2.0)[1:] == [
        TellToEnd("api"),
        TellToEnd("worker"),
    ]
    assert dies(running, "api", 0, 2.5) == []
    assert running.handle(Logged("worker pc has left"), now=3.0) != [], "what happens is still told"
    assert dies(running, "worker", 0, 4.0) == [TellToEnd("coordinator")]
    assert dies(running, "coordinator", 0, 5.0) == [Finish(INTERRUPTED)]


@pytest.mark.parametrize("worker_is_gone", [False, True])
def test_the_second_time_it_ends_at_once(running: Supervisor, worker_is_gone: bool) -> None:
    running.handle(Signalled(INTERRUPTED), now=2.0)
    if worker_is_gone:
        dies(running, "worker", 0, 2.5)
    assert running.handle(Signalled(INTERRUPTED), now=3.0) == [Finish(INTERRUPTED)]


def test_in_a_pause_no_worker_is_started_after_the_end_was_asked_for(running: Supervisor) -> None:
    dies(running, "worker", 1, 2.0)
    assert running.handle(Signalled(0), now=2.5)[-1] == TellToEnd("coordinator")
    assert running.on_timer(now=1e6) == []


def test_told_to_end_before_the_coordinator_listens(up: Supervisor) -> None:
    assert up.handle(Signalled(INTERRUPTED), now=0.1)[-1] == TellToEnd("coordinator")
    assert up.handle(Listens(INVITATION), now=0.2) == [], "no worker is started"
    assert dies(up, "coordinator", 0, 0.3) == [Finish(INTERRUPTED)]


# ------------------------------------------------------------------ texts


NOON = datetime(2026, 11, 28, 12, 0)


@pytest.mark.parametrize(
    ("lifetime", "said"),
    [
        (timedelta(hours=2), "until today 14:00"),
        (timedelta(days=1), "until tomorrow 12:00"),
        (timedelta(days=2), "until Monday 12:00"),
    ],
)
def test_how_long_the_line_is_good(lifetime: timedelta, said: str) -> None:
    lines = texts.joining(
        "dllm join dllm://10.0.0.2:5555/x.y",
        ["192.168.1.2:5555", "172.17.0.1:5555"],
        uses=10,
        expires=NOON + lifetime,
        now=NOON,
        revoke="dllm token revoke ab12-cd34",
    )
    text = "\n".join(lines)
    assert f"good for 10 machines {said}; `dllm token revoke ab12-cd34` ends it" in text
    assert "dllm join dllm://10.0.0.2:5555/x.y" in text
    assert "192.168.1.2:5555 or 172.17.0.1:5555" in text


def test_how_the_api_is_used_is_said_in_commands_to_copy() -> None:
    url = "http://127.0.0.1:8000"
    lines = texts.access(url, "s.admin", "s.app")
    assert f"{url}/#key=s.admin" in lines[0]
    (command,) = (line for line in lines if "curl" in line)
    words = shlex.split(command.partition(":")[2])
    assert words[:2] == ["curl", f"{url}/v1/completions"]
    assert "Authorization: Bearer s.app" in words
    assert json.loads(words[-1])["model"] == "default"
    without = "\n".join(texts.access(url, "", ""))
    assert "Authorization" not in without
    assert "#" not in without


def test_how_a_signal_is_called() -> None:
    assert "SIGKILL" in ended_text("it", -9, "", "")
    assert "memory" in ended_text("it", -9, "", "")
    assert "memory" not in ended_text("it", -15, "", "")
    assert "signal 99" in ended_text("it", -99, "", "")
    assert "(exit code 3)" in ended_text("it", 3, "", "")
