"""What the coordinator remembers for its text process, and what fails if that dies."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from distributed_llm.common.errors import InvalidRequest, TextError
from distributed_llm.common.messages import Spelling
from distributed_llm.common.types import PeerId
from distributed_llm.coordinator.events import (
    AskText,
    Detokenize,
    Detokenized,
    Forget,
    RequestKey,
    TextAnswered,
    TextFailed,
    TextRules,
    Tokenize,
    Tokenized,
)
from distributed_llm.coordinator.text.messages import (
    Answered,
    AnswerText,
    Begun,
    Drop,
    Encoded,
    Failed,
    Order,
    Prompt,
    Question,
    Reply,
    Resume,
    Texts,
    Tokens,
    Unpacker,
    pack,
)
from distributed_llm.coordinator.text.orders import TextOrders

DIED = TextError("It died.")


def key(number: int) -> RequestKey:
    return (PeerId(b"client"), f"r{number}", number)


def prompt(number: int, choices: int = 1) -> Tokenize:
    return Tokenize(key(number), "text", b"Hi", choices, TextRules(("stop",)))


def tokens(number: int, *ids: int, choice: int = 0) -> Detokenize:
    return Detokenize(key(number), choice, ids, last=False)


def encoded(number: int, *ids: int) -> Encoded:
    array = np.asarray(ids, dtype=np.int32)
    return Encoded(request=number, token_ids=array.tobytes(), context=ids)


def texts(*numbers: int, failures: Sequence[Failed] = ()) -> Texts:
    pieces = tuple(
        AnswerText(number, 0, "x", 1, stop_string=None, last=False) for number in numbers
    )
    return Texts(pieces=pieces, failures=tuple(failures))


@pytest.fixture
def orders() -> TextOrders:
    """Requests 1 to 3 are encoded, 4 is being encoded, 5 waits."""
    orders = TextOrders()
    for number in range(1, 6):
        orders.prompt(prompt(number, choices=2))
    for number in range(1, 4):
        assert orders.replied(Begun(request=number, num_bytes=2)) == []
        assert orders.replied(encoded(number, 7, 8)) == [Tokenized(key(number), [7, 8])]
    orders.replied(Begun(request=4, num_bytes=2))
    return orders


def test_only_what_it_worked_on_fails_with_the_text_process(orders: TextOrders) -> None:
    orders.tokens([tokens(1, 11), tokens(2, 21, choice=1)])
    orders.replied(texts(1, 2))
    first = orders.tokens([tokens(1, 12)])
    second = orders.tokens([tokens(2, 22), tokens(3, 31)])
    assert isinstance(first, Tokens)
    assert orders.died(DIED) == [TextFailed(key(1), DIED), TextFailed(key(4), DIED)]
    resumed = {"rules": TextRules(("stop",)), "context": (7, 8)}
    assert orders.again() == [
        Resume(request=2, answers=((), (21,)), **resumed),  # type: ignore[arg-type]
        Resume(request=3, answers=((), ()), **resumed),  # type: ignore[arg-type]
        Prompt(request=5, kind="text", payload=b"Hi", num_choices=2, rules=TextRules(("stop",))),
        second,
    ]
    assert [type(event) for event in orders.replied(texts(2, 3))] == [Detokenized, Detokenized]
    assert orders.died(DIED) == []


def test_what_is_to_be_spelled_out_goes_there_and_comes_back(orders: TextOrders) -> None:
    order = orders.tokens([replace(tokens(1, 11), spell=(11, 12))])
    assert isinstance(order, Tokens)
    assert order.answers[0].spell == (11, 12)
    (piece,) = texts(1).pieces
    spelled = (Spelling(written=b"x"), None)
    told = Texts(pieces=(msgspec.structs.replace(piece, spelled=spelled),))
    (event,) = orders.replied(told)
    assert isinstance(event, Detokenized)
    assert event.spelled == spelled
    assert Unpacker(Reply).feed(pack(told)) == [told]


def test_the_id_of_a_first_token_comes_with_the_prompt() -> None:
    orders = TextOrders()
    orders.prompt(prompt(1))
    told = msgspec.structs.replace(encoded(1, 7), first=9)
    assert Unpacker(Reply).feed(pack(told)) == [told]
    assert orders.replied(told) == [Tokenized(key(1), [7], first=9)]


def test_masks_come_with_the_prompt_and_with_every_text() -> None:
    orders = TextOrders()
    orders.prompt(prompt(1))
    first = msgspec.structs.replace(encoded(1, 7), mask=b"first")
    assert orders.replied(first) == [Tokenized(key(1), [7], b"first")]
    orders.tokens([tokens(1, 11)])
    (piece,) = texts(1).pieces
    told = Texts(pieces=(msgspec.structs.replace(piece, mask=b"next", complete=True),))
    (event,) = orders.replied(told)
    assert isinstance(event, Detokenized)
    assert (event.mask, event.complete) == (b"next", True)
    assert Unpacker(Reply).feed(pack(first) + pack(told)) == [first, told]


def test_an_idle_text_process_takes_no_request_with_it() -> None:
    orders = TextOrders()
    orders.prompt(prompt(1))
    orders.replied(encoded(1, 7))
    assert orders.died(DIED) == []
    assert len(orders.again()) == 1


def test_what_has_ended_is_neither_failed_nor_told_again(orders: TextOrders) -> None:
    orders.tokens([tokens(1, 11), tokens(2, 21)])
    for number in (1, 4, 5):
        assert orders.forget(Forget(key(number))) == Drop(request=number)
        assert orders.forget(Forget(key(number))) is None
    assert orders.replied(encoded(4, 9)) == []
    assert orders.replied(Failed(request=5, code="text_error", message="x")) == []
    assert orders.died(DIED) == [TextFailed(key(2), DIED)]
    assert [order.request for order in orders.again() if isinstance(order, Resume)] == [3]
    assert len(orders.again()) == 1


def test_all_are_given_up_where_no_process_can_go_on(orders: TextOrders) -> None:
    orders.tokens([tokens(1, 11)])
    failed = orders.give_up_all(DIED)
    assert failed == [TextFailed(key(number), DIED) for number in range(1, 6)]
    assert orders.again() == []


def test_a_failure_has_the_class_that_it_was_raised_with(orders: TextOrders) -> None:
    refused = Failed(request=4, code="invalid_request", message="No.")
    (event,) = orders.replied(refused)
    assert isinstance(event, TextFailed)
    assert (event.key, type(event.error), str(event.error)) == (key(4), InvalidRequest, "No.")
    orders.tokens([tokens(1, 11), tokens(2, 21)])
    failure = Failed(request=2, code="text_error", message="A bug.")
    one, other = orders.replied(texts(1, failures=[failure]))
    assert isinstance(one, Detokenized)
    assert isinstance(other, TextFailed)
    assert type(other.error) is TextError


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_messages_are_cut_out_of_any_stream(size: int) -> None:
    sent: list[Order] = [
        Prompt(request=1, kind="chat", payload=b"x" * 999, num_choices=1, rules=TextRules(("é",))),
        Drop(request=2),
        Tokens(answers=()),
    ]
    stream = b"".join(map(pack, sent))
    unpacker = Unpacker(Order)
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert [order for piece in pieces for order in unpacker.feed(piece)] == sent


def test_what_is_no_message_is_an_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        Unpacker(Reply).feed((3).to_bytes(8, "big") + b"\xc1\xc1\xc1")


def test_a_question_is_asked_again_of_the_next_process_unless_the_last_worked_on_it() -> None:
    orders = TextOrders()
    order = orders.question(AskText(key(1), "text", b"Hi", special=False))
    assert order == Question(request=1, kind="text", payload=b"Hi", special=False)
    assert orders.died(DIED) == []
    assert orders.again() == [order]
    orders.replied(Begun(request=1, num_bytes=2))
    assert orders.died(DIED) == [TextFailed(key(1), DIED)]
    orders.question(AskText(key(2), "text", b"Hi", special=False))
    answered = Answered(request=2, payload=b"four")
    assert orders.replied(answered) == [TextAnswered(key(2), b"four")]
    assert orders.replied(answered) == []
    assert orders.again() == []
