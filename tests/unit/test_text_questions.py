"""Questions about text: whose is asked next, and what becomes of it."""

from collections.abc import Iterator
from itertools import count

import pytest

from distributed_llm.common.errors import TextError
from distributed_llm.common.messages import (
    DecodeTokens,
    EncodePrompt,
    PromptEncoded,
    RequestFailed,
    TokensDecoded,
)
from distributed_llm.common.tensors import TensorSpec, frame_of_bytes, frame_of_token_ids
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.events import Action, AskText, Send, TextAnswered, TextFailed
from distributed_llm.coordinator.requests.text_questions import TextQuestions

ONE, OTHER = PeerId(b"one"), PeerId(b"other")
MOST = 4


@pytest.fixture
def questions() -> Iterator[TextQuestions]:
    questions = TextQuestions(100, max_waiting=MOST, draw_number=count().__next__)
    yield questions
    questions.validate()


def ask(
    questions: TextQuestions, request_id: str, text: bytes = b"Hi", *, peer: PeerId = ONE
) -> list[Action]:
    spec, frame = frame_of_bytes(text)
    message = EncodePrompt(request_id=request_id, prompt="text", tensors=(spec,))
    actions = questions.ask(peer, message, (frame,))
    questions.validate()
    return actions


def asked(actions: list[Action]) -> AskText:
    (one,) = (action for action in actions if isinstance(action, AskText))
    return one


def told(actions: list[Action]) -> list[tuple[PeerId, object]]:
    return [(action.peer, action.message) for action in actions if isinstance(action, Send)]


def code(actions: list[Action]) -> str:
    ((_, message),) = told(actions)
    assert isinstance(message, RequestFailed)
    return message.code


def test_the_text_process_has_one_at_a_time_and_clients_take_turns(
    questions: TextQuestions,
) -> None:
    first = asked(ask(questions, "long", b"x" * 1000))
    for number in range(3):
        assert ask(questions, f"r{number}") == []
    assert ask(questions, "r0", peer=OTHER) == []
    order = []
    for _ in range(5):
        actions = questions.answered(TextAnswered(first.key, bytes(4)))
        questions.validate()
        order.append(first.key[:2])
        nexts = [action for action in actions if isinstance(action, AskText)]
        first = nexts[0] if nexts else first
    assert order == [(ONE, "long"), (ONE, "r0"), (OTHER, "r0"), (ONE, "r1"), (ONE, "r2")]


def test_answers_come_as_tensors_and_nothing_as_none(questions: TextQuestions) -> None:
    question = asked(ask(questions, "r"))
    assert (question.kind, question.payload, question.special) == ("text", b"Hi", True)
    (answer,) = questions.answered(TextAnswered(question.key, bytes(8)))
    spec = TensorSpec("int32", (2,))
    assert answer == Send(ONE, PromptEncoded(request_id="r", tensors=(spec,)), (bytes(8),))
    spec, frame = frame_of_token_ids([3, 4])
    message = DecodeTokens(request_id="d", skip_special_tokens=True, tensors=(spec,))
    question = asked(questions.ask(ONE, message, (frame,)))
    assert (question.kind, question.payload, question.special) == ("token_ids", frame, False)
    (answer,) = questions.answered(TextAnswered(question.key, b""))
    assert answer == Send(ONE, TokensDecoded(request_id="d", tensors=()), ())


def test_too_many_and_too_long_ones_are_refused(questions: TextQuestions) -> None:
    assert code(ask(questions, "long", bytes(70_000))) == "context_length_exceeded"
    message = EncodePrompt(request_id="r", prompt="text", tensors=(TensorSpec("int32", (1,)),))
    assert code(questions.ask(ONE, message, (bytes(4),))) == "invalid_request"
    for number in range(1 + MOST):
        ask(questions, f"r{number}")
    assert code(ask(questions, "one more", peer=OTHER)) == "overloaded"


def test_whoever_cancels_or_is_gone_leaves_room_once_the_text_process_is_done(
    questions: TextQuestions,
) -> None:
    running = asked(ask(questions, "r0"))
    for number in range(1, 4):
        ask(questions, f"r{number}")
    ask(questions, "r0", peer=OTHER)
    assert code(questions.cancel(ONE, "r0")) == code(questions.cancel(ONE, "r1")) == "cancelled"
    assert questions.cancel(ONE, "r1") == []
    assert ask(questions, "r0") == []  # the id may be used again at once
    questions.drop_client(OTHER)
    questions.validate()
    actions = questions.answered(TextAnswered(running.key, bytes(4)))
    assert told(actions) == []
    assert asked(actions).key[:2] == (ONE, "r2")


def test_a_death_of_the_text_process_is_told(questions: TextQuestions) -> None:
    question = asked(ask(questions, "r0"))
    ask(questions, "r1")
    assert questions.is_asked(question.key)
    actions = questions.answered(TextFailed(question.key, TextError("It died.")))
    assert code(actions) == "text_error"
    assert asked(actions).key[1] == "r1"
    assert not questions.is_asked(question.key)
