"""What stages are yet to be told to forget: once each, in order, and again if it may be lost."""

from distributed_llm.common.messages import MAX_RELEASED, SeenFrom
from distributed_llm.common.types import SequenceId
from distributed_llm.coordinator.serving.to_forget import Forgotten, ToForget, joined

ONE, TWO, THREE = map(SequenceId, (1, 2, 3))


def seen_from(**positions: int) -> tuple[SeenFrom, ...]:
    ids = {"one": ONE, "two": TWO}
    return tuple(SeenFrom(sequence_id=ids[name], position=at) for name, at in positions.items())


def test_sequences_are_freed_once_in_the_order_in_which_that_was_decided() -> None:
    to_forget = ToForget()
    to_forget.release([THREE, ONE])
    to_forget.release([ONE, TWO])
    assert to_forget.released == [3, 1, 2]
    assert to_forget.take().released == (3, 1, 2)
    assert to_forget.released == []
    assert to_forget.take().released == ()


def test_of_a_sequence_the_last_position_counts() -> None:
    to_forget = ToForget()
    to_forget.drop({ONE: 64, TWO: 128})
    to_forget.drop({ONE: 192})
    to_forget.drop({TWO: 64})
    assert to_forget.seen_from == {ONE: 192, TWO: 128}
    assert to_forget.take().seen_from == seen_from(one=192, two=128)
    assert to_forget.take().seen_from == ()


def test_a_task_says_so_much_at_most() -> None:
    to_forget = ToForget()
    ids = tuple(map(SequenceId, range(2 * MAX_RELEASED + 1)))
    to_forget.release(ids)
    to_forget.drop(dict.fromkeys(ids, 64))
    said = [to_forget.take() for _ in range(3)]
    expected = [ids[:MAX_RELEASED], ids[MAX_RELEASED:-1], ids[-1:]]
    assert [one.released for one in said] == expected
    assert [tuple(s.sequence_id for s in one.seen_from) for one in said] == expected


def test_what_other_tasks_say_leaves_less_room() -> None:
    to_forget = ToForget()
    ids = tuple(map(SequenceId, range(MAX_RELEASED + 3)))
    to_forget.release(ids[:MAX_RELEASED])
    beside = Forgotten(released=ids[MAX_RELEASED:])
    own = to_forget.take(beside)
    assert own.released == ids[: MAX_RELEASED - 3]
    assert joined([beside, own]).released == beside.released + own.released
    assert to_forget.take().released == ids[MAX_RELEASED - 3 : MAX_RELEASED]


def test_what_may_be_lost_is_said_again_unless_more_is_known_by_now() -> None:
    to_forget = ToForget()
    to_forget.release([ONE])
    to_forget.drop({ONE: 64, TWO: 128})
    lost = to_forget.take()
    to_forget.release([TWO])
    to_forget.drop({ONE: 192, TWO: 64})
    to_forget.put_back(lost)
    again = to_forget.take()
    assert set(again.released) == {ONE, TWO}
    assert again.seen_from == seen_from(one=192, two=128)
