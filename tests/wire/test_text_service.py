"""The text process: it works beside the coordinator, is started again, and ends with it."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from distributed_llm.common.codec import encode_payload
from distributed_llm.common.errors import CheckpointError, TextError
from distributed_llm.common.messages import Chat, ChatMessage
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
from distributed_llm.coordinator.text import service as text_service
from distributed_llm.coordinator.text.orders import TextEvent
from distributed_llm.coordinator.text.service import TextService
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from tests.unit.made_tokenizers import byte_fallback, folder_of, save, tokenizer_of
from tests.wire.test_transport import on_loop

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]

CONTEXT = 1 << 24
LONG = b"he stop wo " * 100_000


class Bench:
    """A text service, and the events that come from it."""

    def __init__(self, folder: Path) -> None:
        self.events: asyncio.Queue[TextEvent] = asyncio.Queue()
        self.service = TextService(folder, CONTEXT, self._tell)

    def _tell(self, events: Sequence[TextEvent]) -> None:
        for event in events:
            self.events.put_nowait(event)

    def prompt(self, number: int, payload: bytes = b"he") -> None:
        self.service.perform([Tokenize(key(number), "text", payload, 1, TextRules())])

    def tokens(self, number: int, *ids: int) -> None:
        self.service.perform([Detokenize(key(number), 0, ids, last=False)])

    async def encoded(self, number: int) -> list[int]:
        event = await self.events.get()
        assert isinstance(event, Tokenized)
        assert event.key == key(number)
        return event.token_ids

    async def text(self, number: int) -> str:
        event = await self.events.get()
        assert isinstance(event, Detokenized), event
        assert event.key == key(number)
        return event.text

    async def failure(self, number: int) -> Exception:
        event = await self.events.get()
        assert isinstance(event, TextFailed)
        assert event.key == key(number)
        return event.error


def key(number: int) -> RequestKey:
    return (PeerId(b"client"), "r", number)


@asynccontextmanager
async def bench(folder: Path | None = None) -> AsyncIterator[Bench]:
    made = Bench(folder or folder_of("byte-fallback"))
    try:
        await made.service.ready()
        yield made
    finally:
        made.service.close()


def ids_after(start: str, rest: str) -> list[int]:
    tokenizer = tokenizer_of("byte-fallback")
    return tokenizer.encode(start + rest)[len(tokenizer.encode(start)) :]


@on_loop
async def test_prompts_and_answers() -> None:
    async with bench() as made:
        made.prompt(1)
        assert await made.encoded(1) == tokenizer_of("byte-fallback").encode("he")
        made.tokens(1, *ids_after("he", " wo"))
        assert await made.text(1) == " wo"
        ready = await made.service.ready()
        assert ready.facts.end_token == Tokenizer.load(folder_of("byte-fallback")).end_token


@on_loop
async def test_a_long_prompt_delays_neither_texts_nor_other_prompts() -> None:
    async with bench() as made:
        made.prompt(1)
        await made.encoded(1)
        made.prompt(2, LONG)
        made.tokens(1, *ids_after("he", " wo"))
        assert await made.text(1) == " wo"
        made.prompt(3)
        await made.encoded(3)
        assert len(await made.encoded(2)) > 400_000


@on_loop
async def test_a_long_question_delays_neither_texts_nor_prompts() -> None:
    async with bench() as made:
        made.prompt(1)
        await made.encoded(1)
        made.service.perform([AskText(key(2), "text", LONG, special=False)])
        made.tokens(1, *ids_after("he", " wo"))
        assert await made.text(1) == " wo"
        made.prompt(3)
        await made.encoded(3)
        answer = await made.events.get()
        assert isinstance(answer, TextAnswered)
        assert len(answer.payload) > 4 * 400_000


@on_loop
async def test_a_prompt_that_was_cancelled_has_no_answer() -> None:
    async with bench() as made:
        for number in (1, 2, 3):
            made.prompt(number, LONG)
        made.service.perform([Forget(key(number)) for number in (1, 2, 3)])
        made.prompt(4)
        await made.encoded(4)
        assert made.events.empty()


@on_loop
async def test_if_it_dies_what_it_worked_on_fails_and_the_rest_goes_on() -> None:
    async with bench() as made:
        made.prompt(1)
        await made.encoded(1)
        ids = ids_after("he", " wo é")
        made.tokens(1, *ids[:-1])  # half a character
        before = await made.text(1)
        pid = made.service.pid
        assert pid is not None
        made.prompt(2, LONG)
        made.prompt(3, LONG)
        requests = made.service._orders._requests
        while not (requests[2].begun and requests[3].begun):  # noqa: ASYNC110
            await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        errors = [await made.failure(2), await made.failure(3)]
        assert {type(error) for error in errors} == {TextError}
        assert "was killed by signal 9 while it worked on this request" in str(errors[0])
        made.tokens(1, ids[-1])
        assert before + await made.text(1) == " wo é"
        assert made.service.pid not in (None, pid)
        made.prompt(4)
        await made.encoded(4)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@on_loop
async def test_a_chat_template_that_never_ends_costs_one_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", byte_fallback(), chat_template=ENDLESS)
    chat = encode_payload(Chat(messages=(ChatMessage(role="user", content="hi"),)))
    async with bench(folder) as made:
        made.prompt(1)
        await made.encoded(1)
        monkeypatch.setattr(text_service, "_PROMPT_S", 0.0)
        made.service.perform([Tokenize(key(2), "chat", chat, 1, TextRules())])
        error = await made.failure(2)
        assert isinstance(error, TextError)
        assert "made no progress" in str(error)
        made.tokens(1, *ids_after("he", " wo"))
        assert await made.text(1) == " wo"


@on_loop
async def test_a_text_process_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench() as made:
        for number in (1, 2):
            made.prompt(number)
            await made.encoded(number)
        pid = made.service.pid
        assert pid is not None
        monkeypatch.setattr(text_service, "_STEP_S", 0.0)
        os.kill(pid, signal.SIGSTOP)
        made.tokens(1, *ids_after("he", " wo"))
        assert "made no progress" in str(await made.failure(1))
        monkeypatch.undo()
        made.tokens(2, *ids_after("he", " wo"))
        assert await made.text(2) == " wo"


@on_loop
async def test_signals_to_a_terminals_processes_do_not_reach_it() -> None:
    async with bench() as made:
        pid = made.service.pid
        assert pid is not None
        assert os.getpgid(pid) != os.getpgid(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        made.prompt(1)
        await made.encoded(1)
        assert made.service.pid == pid


@on_loop
async def test_it_ends_when_it_is_closed() -> None:
    async with bench() as made:
        pid = made.service.pid
        assert pid is not None
        made.prompt(1, LONG)
    assert not psutil.pid_exists(pid)


@on_loop
async def test_a_tokenizer_that_cannot_be_read_is_told_with_its_class(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        async with bench(tmp_path):
            pass


@on_loop
async def test_it_is_started_until_it_works_and_requests_fail_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_service, "_RETRY_S", 0.0)
    folder = tmp_path / "model"
    shutil.copytree(folder_of("byte-fallback"), folder)
    async with bench(folder) as made:
        pid = made.service.pid
        assert pid is not None
        made.prompt(1)
        await made.encoded(1)
        content = (folder / "tokenizer.json").read_bytes()
        (folder / "tokenizer.json").write_text("{")
        os.kill(pid, signal.SIGKILL)
        error = await made.failure(1)
        assert isinstance(error, CheckpointError)
        (folder / "tokenizer.json").write_bytes(content)
        for number in range(2, 1000):
            made.prompt(number)
            event = await made.events.get()
            if isinstance(event, Tokenized):
                break
        assert event == Tokenized(key(number), tokenizer_of("byte-fallback").encode("he"))


PARENT = """
import asyncio, sys
from pathlib import Path
from distributed_llm.coordinator.text.service import TextService

async def main():
    service = TextService(Path(sys.argv[1]), 99, print)
    await service.ready()
    print(service.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_it_ends_with_a_coordinator_that_is_killed() -> None:
    command = [sys.executable, "-c", PARENT, str(folder_of("byte-fallback"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        text_process = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        text_process.wait(60)
