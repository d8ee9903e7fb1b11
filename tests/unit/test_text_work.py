"""What the text process does with prompts and tokens, without a process."""

import threading
from typing import Any

import msgspec
import pytest

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.grammar import Grammar
from distributed_llm.common.messages import Chat, ChatMessage
from distributed_llm.common.tensors import frame_of_token_ids, token_ids_of_frame
from distributed_llm.coordinator.events import TextRules
from distributed_llm.coordinator.text import grammar_trial
from distributed_llm.coordinator.text.grammar_trial import Trials
from distributed_llm.coordinator.text.messages import (
    Answered,
    AnswerText,
    AnswerTokens,
    Drop,
    Encoded,
    Failed,
    Prompt,
    Question,
    Resume,
    Tokens,
)
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from distributed_llm.coordinator.text.work import TextWork
from tests.unit.made_tokenizers import reference_of, tokenizer_of

CONTEXT = 64


def work(tokenizer: Tokenizer | None = None) -> TextWork:
    return TextWork(tokenizer or tokenizer_of("byte-fallback"), CONTEXT)


def prompt(request: int, text: str = "he", **changes: Any) -> Prompt:
    usual = Prompt(
        request=request, kind="text", payload=text.encode(), num_choices=1, rules=TextRules()
    )
    return msgspec.structs.replace(usual, **changes)


def encoded(done: TextWork, order: Prompt) -> list[int]:
    done.put(order)
    answer = done.do(done.take())
    assert isinstance(answer, Encoded), answer
    return token_ids_of_frame(answer.token_ids)


def text_of(done: TextWork, request: int, *token_ids: int, last: bool = False) -> str:
    order = Tokens(answers=(AnswerTokens(request, 0, token_ids, last),))
    (piece,) = done.texts(order).pieces
    return piece.text


def test_prompts_of_ended_requests_are_not_tokenized() -> None:
    done = work()
    for request in range(4):
        done.put(prompt(request))
    for request in (0, 2):
        done.drop(Drop(request=request))
    assert [done.take().request for _ in range(2)] == [1, 3]


def test_prompts_with_grammars_leave_a_thread_to_the_others() -> None:
    done = work()
    slow = TextRules(grammar=Grammar("regex", "a+"))
    for request in (1, 2):
        done.put(prompt(request, rules=slow))
    done.put(prompt(3))
    first = done.take()
    assert (first.request, done.take().request) == (1, 3)
    done.drop(Drop(request=1))  # its thread is still at it
    done.put(prompt(4))
    assert done.take().request == 4
    done.do(first)
    assert done.take().request == 2


def test_a_prompt_whose_request_ends_meanwhile_leaves_nothing() -> None:
    done = work()
    done.put(prompt(1))
    taken = done.take()
    done.drop(Drop(request=1))
    assert isinstance(done.do(taken), Failed)
    assert done.texts(Tokens(answers=(AnswerTokens(1, 0, (3,), False),))).pieces == ()


def test_whoever_waits_for_a_prompt_gets_the_next() -> None:
    done = work()
    taken: list[Prompt | Question] = []
    waiting = threading.Thread(target=lambda: taken.append(done.take()))
    waiting.start()
    done.put(prompt(1))
    waiting.join(30)
    assert taken == [prompt(1)]


@pytest.mark.parametrize("kind", ["text", "token_ids"])
def test_an_answer_continues_its_prompt(kind: str) -> None:
    tokenizer = tokenizer_of("byte-fallback")
    start, both = tokenizer.encode("he"), tokenizer.encode("he wo")
    _, frame = frame_of_token_ids(start)
    done = work()
    payload = b"he" if kind == "text" else bytes(frame)
    assert encoded(done, prompt(1, kind=kind, payload=payload)) == start
    assert text_of(done, 1, *both[len(start) :], last=True) == " wo"


def test_a_turn_of_a_conversation_is_a_text_of_its_own() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    chat = encode_payload(Chat(messages=(ChatMessage(role="user", content="he"),)))
    done = work()
    encoded(done, prompt(1, kind="chat", payload=chat))
    assert text_of(done, 1, *tokenizer.encode("wo")[1:]) == "wo"


def test_a_resumed_answer_goes_on_where_it_was() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    start, both = tokenizer.encode("he"), tokenizer.encode("he é wo stop")
    rest = both[len(start) :]
    for cut in range(len(rest)):
        whole, first, second = work(), work(), work()
        order = prompt(1, rules=TextRules(("stop",)))
        context = encoded(whole, order)
        encoded(first, order)
        before = text_of(first, 1, *rest[:cut])
        resumed = Resume(
            request=1,
            rules=TextRules(("stop",)),
            context=tuple(context),
            answers=(tuple(rest[:cut]),),
        )
        assert second.resume(resumed) is None
        after = text_of(second, 1, *rest[cut:], last=True)
        assert before + after == text_of(whole, 1, *rest, last=True) == " é wo "


def test_tokens_are_spelled_out_beside_the_text() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    done = work()
    encoded(done, prompt(1))
    wo, stop = tokenizer.encode("wo stop")[1], tokenizer.encode("stop")[-1]
    order = Tokens(answers=(AnswerTokens(1, 0, (wo,), False, (wo, stop, 10**6)),))
    (piece,) = done.texts(order).pieces
    assert piece.spelled == tokenizer.spell([wo, stop, 10**6])
    assert len(piece.spelled) == 3


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"payload": b"\xff"}, "invalid_request", "not UTF-8"),
        ({"kind": "chat", "payload": b"\xc1"}, "invalid_request", "cannot be read"),
        ({"kind": "chat", "payload": b"\x81\xa8messages\x90"}, "invalid_request", "empty"),
        (
            {"payload": b"hello " * 99},
            "context_length_exceeded",
            "maximum context length is 64 tokens",
        ),
        (
            {"kind": "token_ids", "payload": b"\x01\0\0\0" * 65},
            "context_length_exceeded",
            "65 tokens",
        ),
    ],
)
def test_what_cannot_be_tokenized_says_why(change: dict[str, Any], code: str, said: str) -> None:
    done = work()
    done.put(prompt(1, **change))
    answer = done.do(done.take())
    assert isinstance(answer, Failed)
    assert (answer.request, answer.code) == (1, code)
    assert said in answer.message


class Broken(Tokenizer):
    """A tokenizer with a bug."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        raise ZeroDivisionError("a bug")

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True) -> str:
        if list(token_ids) == [300]:
            raise ZeroDivisionError("a bug")
        return "x" * len(token_ids)

    def is_silent(self, token_id: int) -> bool:
        return False


def test_a_bug_fails_the_request_that_shows_it_and_no_other() -> None:
    done = work(Broken(None))
    done.put(prompt(1))
    answer = done.do(done.take())
    assert isinstance(answer, Failed)
    assert (answer.code, "a bug" in answer.message) == ("text_error", True)
    for request in (2, 3):
        _, frame = frame_of_token_ids([1])
        encoded(done, prompt(request, kind="token_ids", payload=bytes(frame)))
    done.resume(Resume(request=3, rules=TextRules(), context=(), answers=((),)))
    step = Tokens(answers=(AnswerTokens(2, 0, (5,), False), AnswerTokens(3, 0, (300,), False)))
    texts = done.texts(step)
    assert [piece.request for piece in texts.pieces] == [2]
    assert [failure.request for failure in texts.failures] == [3]


# ------------------------------------------------------------------ grammars


@pytest.fixture(scope="module")
def trials() -> Trials:
    return Trials([])


@pytest.fixture
def one_trial_for_all(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_trial, "Trials", lambda special: trials)


needs_trials = pytest.mark.usefixtures("one_trial_for_all")


def constrained(done: TextWork, expression: str, **changes: Any) -> Encoded:
    rules = TextRules(grammar=Grammar("regex", expression), ends=(END,), **changes)
    done.put(prompt(1, rules=rules, num_choices=2))
    answer = done.do(done.take())
    assert isinstance(answer, Encoded), answer
    return answer


def step(done: TextWork, *token_ids: int, choice: int = 0, last: bool = False) -> AnswerText:
    order = Tokens(answers=(AnswerTokens(1, choice, token_ids, last),))
    (piece,) = done.texts(order).pieces
    return piece


END = reference_of("byte-fallback").convert_tokens_to_ids("</s>")
H, E = (reference_of("byte-fallback").convert_tokens_to_ids(letter) for letter in "he")


def admits(mask: bytes, token: int) -> bool:
    return token // 8 < len(mask) and bool(mask[token // 8] >> token % 8 & 1)


@needs_trials
def test_each_answer_has_a_mask_until_its_grammar_is_complete() -> None:
    done = work()
    first = constrained(done, "hee?").mask
    assert [admits(first, token) for token in (H, E, END)] == [True, False, False]
    piece = step(done, H)
    assert (piece.text, piece.complete) == ("h", False)
    assert [admits(piece.mask, token) for token in (H, E, END)] == [False, True, False]
    optional = step(done, E)
    assert [admits(optional.mask, token) for token in (H, E, END)] == [False, True, True]
    end = step(done, E)
    assert (end.mask, end.complete, end.text) == (b"", True, "e")
    assert admits(step(done, H, choice=1).mask, E)  # another answer is where it was


@needs_trials
def test_what_was_held_back_is_shown_when_the_grammar_is_complete() -> None:
    done = work()
    constrained(done, "he", stop_strings=("hello",))
    assert step(done, H).text == ""
    assert step(done, E).text == "he"


@needs_trials
def test_the_last_token_of_a_grammar_completes_it_whatever_ends_the_answer() -> None:
    done = work()
    constrained(done, "he*")
    assert not step(done, H, last=True).complete
    done = work()
    constrained(done, "he")
    step(done, H)
    assert step(done, E, last=True).complete
    done = work()
    constrained(done, "he*")
    step(done, H)
    ended = step(done, END, last=True)
    assert (ended.text, ended.complete) == ("", False)


@needs_trials
def test_a_new_process_goes_on_with_the_same_masks() -> None:
    old, new = work(), work()
    constrained(old, "(he)+")
    rules = TextRules(grammar=Grammar("regex", "(he)+"), ends=(END,))
    for token in (H, E, H):
        step(old, token)
    assert new.resume(Resume(request=1, rules=rules, context=(), answers=((H, E, H), (H,)))) is None
    assert step(new, E) == msgspec.structs.replace(step(old, E), num_tokens=4)
    assert step(new, E, choice=1).mask == step(old, H, E, choice=1).mask


@needs_trials
def test_a_grammar_may_admit_nothing_but_the_empty_answer() -> None:
    done = work()
    done.put(prompt(1, rules=TextRules(grammar=Grammar("regex", "(hx)?y?z*h{0}"))))
    assert isinstance(done.do(done.take()), Encoded)
    done.put(prompt(2, rules=TextRules(grammar=Grammar("regex", ""))))
    refused = done.do(done.take())
    assert isinstance(refused, Failed)
    assert (refused.code, "empty" in refused.message) == ("invalid_request", True)


@needs_trials
def test_a_token_that_its_grammar_forbids_fails_the_request_alone() -> None:
    done = work()
    constrained(done, "he")
    order = Tokens(answers=(AnswerTokens(1, 0, (E,), False),))
    texts = done.texts(order)
    assert texts.pieces == ()
    assert [(one.request, one.code) for one in texts.failures] == [(1, "stage_error")]


# ------------------------------------------------------------------ questions


def asked(done: TextWork, kind: Any, payload: bytes, *, special: bool = True) -> bytes:
    done.put(Question(request=1, kind=kind, payload=payload, special=special))
    answer = done.do(done.take())
    assert isinstance(answer, Answered), answer
    return answer.payload


def test_a_text_has_token_ids_with_and_without_special_tokens_however_many() -> None:
    tokenizer = tokenizer_of("byte-fallback")
    text = "he wo" * CONTEXT  # a prompt of that length is refused
    bare = asked(work(), "text", text.encode(), special=False)
    assert token_ids_of_frame(bare) == tokenizer.encode(text)[1:]
    assert token_ids_of_frame(asked(work(), "text", text.encode())) == tokenizer.encode(text)
    assert asked(work(), "text", b"", special=False) == b""


def test_token_ids_have_a_text_with_and_without_special_tokens() -> None:
    _, frame = frame_of_token_ids(tokenizer_of("byte-level").encode("he"))
    levels = work(tokenizer_of("byte-level"))
    assert asked(levels, "token_ids", bytes(frame)) == b"<s>he"
    assert asked(levels, "token_ids", bytes(frame), special=False) == b"he"


@pytest.mark.parametrize(
    ("tokenizer", "kind", "payload", "code"),
    [
        ("byte-level", "token_ids", (-1).to_bytes(4, "little", signed=True), "invalid_request"),
        ("byte-level", "text", b"\xff", "invalid_request"),
        ("byte-level", "chat", b"\xff", "invalid_request"),
        (None, "text", b"he", "invalid_request"),
        (None, "token_ids", bytes(4), "invalid_request"),
        ("broken", "text", b"he", "text_error"),
    ],
)
def test_a_question_without_an_answer_is_told_why(
    tokenizer: str | None, kind: Any, payload: bytes, code: str
) -> None:
    known = {None: Tokenizer(None), "broken": Broken(None)}
    done = work(known[tokenizer] if tokenizer in known else tokenizer_of(str(tokenizer)))
    answer = done.do(Question(request=1, kind=kind, payload=payload, special=True))
    assert isinstance(answer, Failed)
    assert answer.code == code


def test_what_a_tokenizer_says_of_itself() -> None:
    assert not Tokenizer(None).facts().available
    facts = tokenizer_of("byte-level").facts()
    assert (facts.available, facts.special_tokens["bos_token"]) == (True, "<s>")
