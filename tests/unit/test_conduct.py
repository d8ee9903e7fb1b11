"""Faults against the protocol: how many are too many, and what follows for how long."""

import pytest

from distributed_llm.common.errors import InvalidRequest, Quarantined
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.trust.conduct import (
    FIRST_QUARANTINE_S,
    MOST_FAULTS,
    WITHIN_S,
    Conduct,
    Fault,
)
from distributed_llm.coordinator.trust.pace import Pace

PC, MAC = PublicKey("pc"), PublicKey("mac")
DAY_S = 86_400.0


def quarantined(conduct: Conduct, now: float, who: PublicKey = PC) -> float:
    """Quarantine a machine; return when that ends."""
    return now + conduct.quarantine(who, Fault.UNREADABLE, now=now)


def serve(conduct: Conduct) -> float:
    """Let time pass until something is due; return when that is."""
    at = conduct.next_deadline()
    assert at is not None
    assert conduct.on_timer(now=at - 0.01) == []
    conduct.on_timer(now=at)
    conduct.validate()
    return at


def test_the_fifth_fault_within_a_minute_is_one_too_many() -> None:
    conduct = Conduct()
    struck = [conduct.strike(PC, now=10.0 * number) for number in range(MOST_FAULTS)]
    assert struck == [False] * (MOST_FAULTS - 1) + [True]
    assert not conduct.strike(PC, now=50.0)  # and the count begins anew


def test_faults_that_are_further_apart_are_forgotten() -> None:
    conduct = Conduct()
    apart_s = WITHIN_S / (MOST_FAULTS - 1)
    assert not any(conduct.strike(PC, now=apart_s * number) for number in range(100))


def test_faults_of_others_do_not_count() -> None:
    conduct = Conduct()
    for who in (PC, MAC, PeerId(b"one"), PeerId(b"two")):
        assert not any(conduct.strike(who, now=0.0) for _ in range(MOST_FAULTS - 1))


def test_no_more_offenders_are_remembered_than_fit() -> None:
    """Without keys, whoever connects anew is another one."""
    conduct = Conduct()
    for number in range(10_000):
        conduct.strike(PeerId(b"%d" % number), now=0.0)
    conduct.validate()
    assert len(conduct._faults) == 4096


def test_quarantines_become_longer_until_a_machine_behaves_for_a_day() -> None:
    conduct = Conduct()
    now, lasted = 0.0, []
    for _ in range(9):
        ends_at = quarantined(conduct, now)
        lasted.append(ends_at - now)
        assert serve(conduct) == ends_at
        now = ends_at + 100.0
    assert lasted[:3] == [FIRST_QUARANTINE_S, 2 * FIRST_QUARANTINE_S, 4 * FIRST_QUARANTINE_S]
    assert lasted[-2:] == [6 * 3600.0] * 2
    assert serve(conduct) == now - 100.0 + DAY_S
    assert conduct.next_deadline() is None
    assert quarantined(conduct, now) - now == FIRST_QUARANTINE_S


def test_a_quarantine_ends_by_itself_and_its_end_is_told_once() -> None:
    conduct = Conduct()
    ends_at = quarantined(conduct, 1.0)
    quarantined(conduct, 2.0, MAC)
    assert conduct.quarantined_s(PC, now=ends_at - 60.0) == 60.0
    assert conduct.on_timer(now=ends_at) == [PC]
    assert conduct.quarantined_s(PC, now=ends_at) is None
    assert conduct.quarantined_s(MAC, now=ends_at) == 1.0
    assert conduct.on_timer(now=ends_at + 1.0) == [MAC]
    assert conduct.on_timer(now=ends_at + 2.0) == []


def test_who_is_quarantined_is_told_what_happened_for_how_long_and_what_to_do() -> None:
    conduct = Conduct()
    quarantined(conduct, 0.0)
    error = conduct.error(PC, "pc", now=60.0)
    assert isinstance(error, Quarantined)
    assert str(error) == (
        "pc is quarantined: it broke the protocol 5 times in 60 s; last it sent what cannot be "
        "read. It may connect again in 4 min. See what sends that, and install the same release of "
        "distributedllm on all machines; an admin ends the quarantine earlier with `dllm machines "
        "readmit pc`."
    )


def test_who_took_a_name_is_told_to_take_another() -> None:
    """A service that is started again and again gets here by a mistake in its settings."""
    conduct = Conduct()
    conduct.quarantine(PC, Fault.OTHER_NAME, now=0.0)
    said = str(conduct.error(PC, "pc", now=0.0))
    assert "last it took the name of another machine." in said
    assert "Give this worker a name of its own with --name; an admin ends" in said


def test_who_is_readmitted_begins_with_a_clean_sheet() -> None:
    conduct = Conduct()
    quarantined(conduct, 0.0)
    conduct.strike(PC, now=0.0)
    conduct.readmit(PC, "pc")
    assert conduct.quarantined_s(PC, now=0.0) is None
    assert conduct.next_deadline() is None
    assert not any(conduct.strike(PC, now=1.0) for _ in range(MOST_FAULTS - 1))
    assert quarantined(conduct, 2.0) == 2.0 + FIRST_QUARANTINE_S


def test_who_is_not_quarantined_cannot_be_readmitted() -> None:
    conduct = Conduct()
    with pytest.raises(InvalidRequest, match="pc is not quarantined"):
        conduct.readmit(PC, "pc")
    quarantined(conduct, 0.0)
    serve(conduct)
    with pytest.raises(InvalidRequest, match="pc is not quarantined"):
        conduct.readmit(PC, "pc")  # it is on probation


def test_messages_are_counted_by_peer_and_second() -> None:
    pace = Pace()
    one, other = PeerId(b"one"), PeerId(b"two")
    assert [pace.count(one, now=5.0) for _ in range(3)] == [1, 2, 3]
    assert pace.count(other, now=5.5) == 1
    assert pace.count(one, now=5.99) == 4
    assert pace.count(one, now=6.0) == 1
    assert len(pace._counts) == 1  # of the second before, nothing is kept
