"""The alarm: it rings in time, and its clock stands still while the event loop does."""

import asyncio
from collections.abc import Callable

import pytest

from distributed_llm.common.alarm import STALL_S, Alarm
from tests.wire.test_transport import on_loop

Jump = Callable[[float], None]


class Bench:
    """An alarm, and a loop whose clock can be put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self.clock = 1000.0
        monkeypatch.setattr(loop, "time", lambda: self.clock)
        self.stalls: list[float] = []
        self.rings: list[float] = []
        self.alarm = Alarm(lambda: self.rings.append(self.alarm.now()), self.stalls.append)

    async def turn(self) -> None:
        """Let the loop look at its timers."""
        for _ in range(3):
            await asyncio.sleep(0)


@on_loop
async def test_it_rings_once_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.alarm.set(1001.0)
    await bench.turn()
    assert bench.rings == []
    bench.clock = 1001.0 + STALL_S  # as late as timers may be
    await bench.turn()
    assert (bench.rings, bench.stalls) == ([1001.0 + STALL_S], [])
    bench.alarm.set(None)
    bench.clock = 9999.0
    await bench.turn()
    assert len(bench.rings) == 1
    assert (bench.alarm.now(), bench.stalls) == (9999.0, [])


@on_loop
async def test_a_time_without_the_loop_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.alarm.set(1001.0)
    bench.clock = 1061.0
    assert bench.alarm.now() == 1001.0
    assert bench.stalls == [60.0]
    await bench.turn()
    assert bench.rings == [1001.0]
    bench.alarm.set(1002.0)
    bench.clock = 1061.9
    await bench.turn()
    assert len(bench.rings) == 1
    bench.clock = 1062.0
    await bench.turn()
    assert (bench.rings, bench.stalls) == ([1001.0, 1002.0], [60.0])


@on_loop
async def test_the_stall_is_told_before_the_time_is(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    told: list[float] = []
    alarm = Alarm(lambda: None, lambda stall_s: told.append(alarm.now()))
    alarm.set(1001.0)
    bench.clock = 1100.0
    assert (alarm.now(), told) == (1001.0, [1001.0])


@on_loop
async def test_a_cancelled_alarm_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.alarm.set(1001.0)
    bench.alarm.cancel()
    bench.clock = 2000.0
    await bench.turn()
    assert (bench.rings, bench.stalls) == ([], [])


@on_loop
async def test_a_deadline_that_had_passed_when_it_was_set_is_no_stall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(monkeypatch)
    for _ in range(3):  # as events do, one after the other
        bench.alarm.set(981.0)
        assert bench.alarm.now() == 1000.0
    await bench.turn()
    assert (bench.rings, bench.stalls) == ([1000.0], [])
    bench.alarm.set(981.0)
    bench.clock = 1007.0  # but from then on the loop may be late
    assert bench.alarm.now() == 1000.0
    assert bench.stalls == [7.0]


@on_loop
async def test_who_takes_long_to_decide_stalls_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    assert bench.alarm.now() == 1000.0
    bench.clock = 1005.0  # while something is decided
    bench.alarm.set(1001.0)
    await bench.turn()
    assert (bench.rings, bench.stalls) == ([1001.0], [4.0])
