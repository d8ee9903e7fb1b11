"""Lines of a log: so many of a kind in a period, and a count of the others."""

from distributed_llm.common.log_limit import MOST_LINES, PERIOD_S, LogLimit, left_out_text


def test_so_many_lines_of_a_kind_and_the_count_of_the_others() -> None:
    limit = LogLimit({"noise": 3})
    assert [limit.admits("noise", now=10.0 + at) for at in range(5)] == [True] * 3 + [False] * 2
    assert limit.admits("news", now=15.0)
    assert limit.next_deadline() == 10.0 + PERIOD_S
    assert limit.take_left_out(now=9.9 + PERIOD_S) == []
    assert limit.take_left_out(now=10.0 + PERIOD_S) == [("noise", 2)]
    assert limit.next_deadline() is None
    assert left_out_text("noise", 2) == "2 more lines were left out in 60 s: noise"


def test_a_new_period_begins_with_the_next_line() -> None:
    limit = LogLimit({"noise": 1})
    assert limit.admits("noise", now=0.0)
    assert limit.next_deadline() is None, "nothing was left out"
    assert limit.admits("noise", now=PERIOD_S)
    assert not limit.admits("noise", now=2 * PERIOD_S - 1)
    assert limit.next_deadline() == 2 * PERIOD_S


def test_what_was_left_out_is_told_before_more_is_admitted() -> None:
    limit = LogLimit({"noise": 1})
    admitted = [limit.admits("noise", now=at) for at in (0.0, 1.0, PERIOD_S + 1)]
    assert admitted == [True, False, False]
    assert limit.take_left_out(now=PERIOD_S + 1) == [("noise", 2)]
    assert limit.admits("noise", now=PERIOD_S + 1)


def test_kinds_without_a_limit_of_their_own_have_the_usual_one() -> None:
    limit = LogLimit({})
    admitted = [limit.admits("news", now=0.0) for _ in range(MOST_LINES + 1)]
    assert admitted == [True] * MOST_LINES + [False]


def test_kinds_are_forgotten_after_their_period() -> None:
    limit = LogLimit({})
    for kind in "abc":
        limit.admits(kind, now=0.0)
    limit.take_left_out(now=PERIOD_S)
    assert not limit._periods
