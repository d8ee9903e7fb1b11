"""What the coordinator tells a worker's operator: soon, bounded, and not too often."""

import math

from distributed_llm.worker.session.events import Log
from distributed_llm.worker.session.notices import Notices


def said(text: str) -> list[Log]:
    return [Log(f"the coordinator says: {text}")]


def test_the_first_is_a_line_at_once() -> None:
    notices = Notices()
    assert notices.add("no layers: too slow", now=5.0) == said("no layers: too slow")
    assert notices.next_deadline() == math.inf


def test_of_many_the_latest_follows_after_a_second() -> None:
    notices = Notices()
    notices.add("one", now=5.0)
    for number in range(1000):
        assert notices.add(f"{number}", now=5.5) == []
    assert notices.next_deadline() == 6.0
    assert notices.on_timer(now=5.9) == []
    assert notices.on_timer(now=6.0) == said("999")
    assert notices.on_timer(now=7.0) == []


def test_a_notice_is_one_line_of_bounded_length() -> None:
    (line,) = Notices().add("a\nb\r\n" + "x" * 20_000, now=0.0)
    assert line.text.startswith("the coordinator says: a b xxx")
    assert "\n" not in line.text
    assert len(line.text) < 1100
