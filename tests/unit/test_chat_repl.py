"""A chat at a terminal: what is typed, what is asked, what is written."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from distributed_llm.chat.inputs import Command, Input, Reader, Say
from distributed_llm.chat.repl import HELP, Repl
from distributed_llm.client.answers import Chunk, Generation
from distributed_llm.common.errors import WorkerLost
from distributed_llm.common.messages import Timings, Usage

CTRL_C = "\x03"


def generation(text: str) -> Generation:
    return Generation(
        text=text,
        token_ids=[1],
        finish_reason="stop",
        choice=0,
        logprobs=None,
        usage=Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0),
        timings=Timings(queued_s=0.0, first_token_s=0.0, decode_s=0.0, stages=()),
        request_id="r",
    )


class FakeClient:
    """Answers "1 ", "2 ", ... in two pieces; may fail, or be interrupted, between them."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.params: dict[str, Any] = {}
        self.closed = 0
        self.between: BaseException | None = None
        self.at_once: BaseException | None = None

    def stream_chat(self, messages: Any, **params: Any) -> Iterator[Chunk]:
        self.asked.append(messages)
        self.params = params
        number = len(self.asked)
        try:
            if self.at_once:
                raise self.at_once
            yield Chunk(text=f"{number}", token_ids=[1], choice=0)
            if self.between:
                raise self.between
            yield Chunk(text=" ok", token_ids=[2], choice=0, finish_reason="stop")
            yield Chunk("", [], 0, generation=generation(f"{number} ok"))
        finally:
            self.closed += 1

    def stream(self, prompt: str, **params: Any) -> Iterator[Chunk]:
        return self.stream_chat(prompt, **params)


class FakeTerminal:
    """Gives lines; keeps what is written and told."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = iter(lines)
        self.prompts: list[str] = []
        self.written = ""
        self.notes: list[str] = []

    def read(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        if line == CTRL_C:
            raise KeyboardInterrupt
        return line

    def write(self, text: str) -> None:
        self.written += text

    def note(self, text: str) -> None:
        self.notes.append(text)


def chat(
    client: FakeClient, *lines: str, has_template: bool = True, keeps_going: bool = True
) -> FakeTerminal:
    terminal = FakeTerminal(lines)
    Repl(
        client,
        terminal,
        has_template=has_template,
        params={"temperature": 0.5},
        keeps_going=keeps_going,
        show_stats=lambda one: terminal.note(f"stats of {one.text}"),
    ).run()
    return terminal


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


def said(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]


# ------------------------------------------------------------------------ what is typed


def inputs(*lines: str) -> list[Input]:
    reader = Reader()
    return [found for line in lines if (found := reader.add(line))]


def test_a_line_is_a_message_or_a_command() -> None:
    assert inputs("Hi  ", "", "/System Be brief. ", "/exit") == [
        Say("Hi"),
        Command("system", "Be brief."),
        Command("exit"),
    ]


def test_a_message_may_have_several_lines() -> None:
    expected = [Say("one\n\n /two")]
    assert inputs('"""one', "", ' /two"""') == expected
    assert inputs('"""', "one", "", " /two", '"""') == expected
    assert inputs('"""one"""') == [Say("one")]
    assert inputs('"""', '"""', "Hi") == [Say("Hi")]
    reader = Reader()
    reader.add('"""one')
    assert reader.is_within
    assert reader.end() == Say("one")
    reader.add('"""one')
    reader.give_up()
    assert reader.add("two") == Say("two")


# ------------------------------------------------------------------------ a conversation


def test_answers_are_written_and_remembered(client: FakeClient) -> None:
    terminal = chat(client, "Hi", "More")
    assert terminal.written == "1 ok\n2 ok\n"
    assert client.asked == [said("Hi"), said("Hi", "1 ok", "More")]
    assert client.params == {"temperature": 0.5}
    assert terminal.notes == []


def test_an_answer_may_be_asked_for_once_more(client: FakeClient) -> None:
    terminal = chat(client, "/regenerate", "Hi", "/regenerate", "More")
    assert terminal.notes == ["Nothing was said yet."]
    assert client.asked == [said("Hi"), said("Hi"), said("Hi", "2 ok", "More")]


def test_what_the_model_is_told_stays_when_the_rest_is_forgotten(client: FakeClient) -> None:
    terminal = chat(client, "/system", "/system Be brief.", "Hi", "/clear", "Again")
    system = [{"role": "system", "content": "Be brief."}]
    assert client.asked == [system + said("Hi"), system + said("Again")]
    assert terminal.notes[:2] == ["The model is told: nothing", "The model is told: Be brief."]


def test_commands_tell_what_there_is(client: FakeClient) -> None:
    terminal = chat(client, "/stats", "/help", "/nonsense", "Hi", "/stats", "/exit", "never")
    assert terminal.notes[1] == HELP
    assert "/help" in terminal.notes[2]
    assert terminal.notes[3] == "stats of 1 ok"
    assert len(client.asked) == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(client: FakeClient) -> None:
    client.between = KeyboardInterrupt()
    terminal = chat(client, "Hi", "More")
    assert client.closed == 2
    assert client.asked[1] == said("Hi", "1", "More"), "what came counts"
    assert terminal.notes == ["\n(stopped)"] * 2


def test_ctrl_c_at_the_prompt_ends_nothing_but_the_message(client: FakeClient) -> None:
    terminal = chat(client, '"""one', CTRL_C, "two")
    assert client.asked == [said("two")]
    assert terminal.prompts == [">>> ", "... ", ">>> ", ">>> "]


def test_a_failure_is_told_and_the_message_may_be_sent_again(client: FakeClient) -> None:
    client.at_once = WorkerLost("pc is gone.")
    terminal = chat(client, "Hi")
    assert terminal.notes == ["Error (worker_lost): pc is gone."]
    client.at_once = WorkerLost("pc is gone.")
    with pytest.raises(WorkerLost):
        chat(client, "Hi", keeps_going=False)


def test_a_model_without_a_template_goes_on_from_the_text(client: FakeClient) -> None:
    terminal = chat(client, "/system Once.", "Hi", "More", has_template=False)
    assert client.asked == ["Once.\nHi", "Once.\nHi\n1 ok\nMore"]
    assert "no chat template" in terminal.notes[0]
