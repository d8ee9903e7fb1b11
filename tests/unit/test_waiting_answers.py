"""The answers that wait: fair among clients, and none behind one that has no room now."""

import pytest

from distributed_llm.common.sampling_params import Sampling, SamplingParams
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.requests.parameters import Limits
from distributed_llm.coordinator.requests.request import Answer, Request
from distributed_llm.coordinator.requests.waiting import WaitingAnswers

MUCH = 1 << 30


def answer(number: int, prompt: int, client: str = "a") -> Answer:
    """Return an answer that may grow to one token more than its prompt."""
    key = (PeerId(client.encode()), f"r{number}", number)
    request = Request(key, SamplingParams(), arrived_at=0.0, client=client)
    request.accept(range(prompt), Limits((Sampling(seed=1),), 1, ()), number=number)
    return request.answers[0]


def waiting(*answers: Answer) -> WaitingAnswers:
    all_of_them = WaitingAnswers()
    for one in answers:
        all_of_them.add(one)
    return all_of_them


def taken(answers: WaitingAnswers, room_tokens: int = MUCH) -> list[int]:
    """Return the numbers of those that may run with so much room, in the order in which they do."""
    numbers = []
    while answers.next(room_tokens, now=1.0) is not None:
        assert answers.first() is answers.next(room_tokens, now=1.0)
        numbers.append(answers.take().number)
        answers.validate()
    return numbers


def test_whose_client_was_served_least_is_next() -> None:
    greedy, modest = answer(0, 10), answer(3, 10, "b")
    answers = waiting(greedy, answer(1, 10), answer(2, 10), modest)
    answers.served(greedy, 15)
    answers.served(modest, 5)
    assert taken(answers) == [3, 0, 1, 2]


def test_a_prompt_counts_as_served_when_it_is_taken() -> None:
    answers = waiting(answer(0, 100), answer(1, 1), answer(2, 1, "b"), answer(3, 1, "b"))
    assert taken(answers) == [0, 2, 3, 1]


def test_nobody_waits_behind_an_answer_that_has_no_room() -> None:
    answers = waiting(answer(0, 50), answer(1, 9), answer(2, 10), answer(3, 9))
    assert taken(answers, 10) == [1, 3]
    assert len(answers) == 2
    assert {one.number for one in answers} == {0, 2}


def test_what_was_set_aside_comes_back_to_its_place() -> None:
    answers = waiting(answer(0, 50), answer(1, 20), answer(2, 9), answer(3, 9))
    found = answers.next(10, now=1.0)
    assert found is not None
    assert found.number == 2
    assert taken(answers, 21) == [1, 2, 3]
    assert taken(answers) == [0]
    assert len(answers) == 0


def test_since_when_answers_are_set_aside_is_known() -> None:
    answers = waiting(answer(0, 50))
    assert answers.set_aside_since(MUCH) is None
    assert answers.next(10, now=3.0) is None
    answers.add(answer(1, 20))
    assert answers.next(10, now=4.0) is None
    assert answers.next(10, now=5.0) is None
    assert answers.set_aside_since(MUCH) == 3.0
    assert answers.set_aside_since(21) == 4.0
    assert answers.set_aside_since(20) is None


def test_answers_that_ended_do_not_wait_wherever_they_were() -> None:
    aside, queued = answer(0, 50), answer(1, 9)
    answers = waiting(aside, queued)
    assert answers.next(10, now=1.0) is queued
    answers.remove(aside)
    answers.remove(queued)
    assert len(answers) == 0
    assert answers.set_aside_since(MUCH) is None
    with pytest.raises(IndexError):
        answers.first()
    assert answers.clients == {"a"}
    answers.forget("a")
    assert not answers.clients
