"""The clients against a coordinator that plays its part: choices, log-probabilities, failures."""

import asyncio
import gc
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec
import pytest
from msgspec import structs

from distributed_llm import (
    AsyncDistributedClient,
    Chunk,
    CoordinatorLost,
    DistributedClient,
    DistributedLLMError,
    Generation,
    InvalidRequest,
    LikelyToken,
    NotEnoughMemory,
    Overloaded,
    PickedToken,
    RequestCancelled,
)
from distributed_llm.common import codec
from distributed_llm.common.errors import DeadlineExceeded, RemoteProtocolError
from distributed_llm.common.messages import (
    Cancel,
    Chat,
    ChatMessage,
    DrainWorker,
    FinishReason,
    Generate,
    RequestFailed,
    Spelling,
    StepTrace,
    ToClient,
    TokenLogprobs,
    WorkerDrained,
)
from distributed_llm.common.tensors import token_ids_of_frame
from tests.fake_coordinator import TIMINGS, USAGE, FakeCoordinator, Script, failed, finished, piece
from tests.fault_proxy import FaultProxy, Faults
from tests.waiting import eventually
from tests.wire.strategies import example

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    with FakeCoordinator() as fake:
        yield fake


@pytest.fixture
def client(coordinator: FakeCoordinator) -> Iterator[DistributedClient]:
    with DistributedClient(coordinator.address) as client:
        yield client


def numbered(request: Generate) -> list[ToClient]:
    """Answer i of a request is the text "<i>" and the token ids [i, i]; the last ends first."""
    choices = range(request.params.n)
    return [
        *(piece(request, "<", i, choice=i) for i in choices),
        *(piece(request, f"{i}>", i, choice=i, index=1, end="stop") for i in reversed(choices)),
        finished(request),
    ]


# ------------------------------------------------------------------ choices


def interleaved(request: Generate) -> list[ToClient]:
    return [
        piece(request, "a", 1, choice=1),
        piece(request, "x", 7, 8, choice=0),
        piece(request, "b", 2, choice=1, index=1, end="stop"),
        piece(request, "", 4, choice=2, end="length"),
        piece(request, "y", choice=0, index=2),
        piece(request, "z", 9, choice=0, index=2, end="length"),
        finished(request),
    ]


def test_a_trace_comes_with_its_tokens(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    step = example(StepTrace)
    coordinator.script = lambda request: [
        structs.replace(piece(request, ""), trace=(step,)),
        structs.replace(piece(request, "a", 1), trace=(step, step)),
        piece(request, "b", 2, index=1, end="length"),
        finished(request),
    ]
    chunks = list(client.stream("Hi", trace=True))
    assert [chunk.trace for chunk in chunks] == [(step,), (step, step), (), ()]
    assert coordinator.requests[0].params.trace


ENDED: list[tuple[str, list[int], FinishReason]] = [
    ("xyz", [7, 8, 9], "length"),
    ("ab", [1, 2], "stop"),
    ("", [4], "length"),
]
"""Text, token ids and end of each answer of `interleaved`."""


def test_choices_come_in_between_one_another_and_end_in_any_order(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = interleaved
    chunks = list(client.stream("Hi", n=3))
    assert chunks[:-3] == [
        Chunk("a", [1], 1),
        Chunk("x", [7, 8], 0),
        Chunk("b", [2], 1, finish_reason="stop"),
        Chunk("", [4], 2, finish_reason="length"),
        Chunk("y", [], 0),
        Chunk("z", [9], 0, finish_reason="length"),
    ]
    generations = [chunk.generation for chunk in chunks[-3:]]
    assert chunks[-3:] == [Chunk("", [], i, generation=generations[i]) for i in range(3)]
    (request,) = coordinator.requests
    shared: dict[str, Any] = {
        "logprobs": None,
        "timings": TIMINGS,
        "request_id": request.request_id,
    }
    assert generations == [
        Generation(
            text=text,
            token_ids=ids,
            finish_reason=reason,
            choice=choice,
            usage=msgspec.structs.replace(USAGE, completion_tokens=len(ids)),
            **shared,
        )
        for choice, (text, ids, reason) in enumerate(ENDED)
    ]


SHAPES: list[tuple[Any, int | None, Any]] = [
    ("Hi", None, "<0>"),
    ("Hi", 1, ["<0>"]),
    ("Hi", 3, ["<0>", "<1>", "<2>"]),
    ([5, 6], 2, ["<0>", "<1>"]),
    (["Hi", "Ho"], None, ["<0>", "<0>"]),
    (["Hi", "Ho"], 1, [["<0>"], ["<0>"]]),
    ([[5, 6], [7]], 2, [["<0>", "<1>"], ["<0>", "<1>"]]),
]


def texts(answer: Any) -> Any:
    """The same shape with texts in the place of generations."""
    if isinstance(answer, list):
        return [texts(one) for one in answer]
    assert isinstance(answer, Generation)
    return answer.text


@pytest.mark.parametrize(("prompt", "n", "expected"), SHAPES)
def test_a_list_stands_where_n_or_prompts_are_several(
    coordinator: FakeCoordinator, client: DistributedClient, prompt: Any, n: Any, expected: Any
) -> None:
    coordinator.script = numbered
    assert client.generate(prompt, n=n) == expected
    assert texts(client.generate(prompt, n=n, details=True)) == expected

    async def ask() -> tuple[Any, Any]:
        async with AsyncDistributedClient(coordinator.address) as other:
            plain: Any = await other.generate(prompt, n=n)
            return plain, await other.generate(prompt, n=n, details=True)

    plain, detailed = asyncio.run(ask())
    assert (plain, texts(detailed)) == (expected, expected)
    assert {request.params.n for request in coordinator.requests} == {n or 1}


def test_choices_of_a_conversation(coordinator: FakeCoordinator, client: DistributedClient) -> None:
    coordinator.script = numbered
    messages = [{"role": "user", "content": "Hi"}]
    assert client.chat(messages) == "<0>"
    assert client.chat(messages, n=2) == ["<0>", "<1>"]
    assert [one.choice for one in client.chat(messages, n=2, details=True)] == [0, 1]
    chunks = client.stream_chat(messages, n=2)
    assert [chunk.choice for chunk in chunks if not chunk.generation] == [0, 1, 1, 0]
    assert {request.prompt for request in coordinator.requests} == {"chat"}
    assert all(
        codec.decode_chat(frame) == Chat(messages=(ChatMessage(role="user", content="Hi"),))
        for (frame,) in coordinator.prompts
    )


def test_tools_and_arguments_of_the_template_arrive(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = numbered
    messages = [{"role": "user", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    more: dict[str, Any] = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    assert client.chat(messages, **more) == "<0>"
    assert "".join(chunk.text for chunk in client.stream_chat(messages, **more)) == "<0>"
    for (frame,) in coordinator.prompts:
        chat = codec.decode_chat(frame)
        assert json.loads(chat.tools) == tools
        assert json.loads(chat.template_arguments) == {"enable_thinking": False}
    for ask in (client.chat, client.stream_chat):
        with pytest.raises(InvalidRequest, match=r"'enable_thinking'.*chat_template_kwargs"):
            ask(messages, enable_thinking=False)


def test_prompts_arrive_as_they_were_given(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = numbered
    for prompt in ("Grüße", [5, 2**31 - 1], ""):
        client.generate(prompt)
    assert [request.prompt for request in coordinator.requests] == ["text", "token_ids", "text"]
    text, ids, empty = coordinator.prompts
    assert text == ["Grüße".encode()]
    assert token_ids_of_frame(ids[0]) == [5, 2**31 - 1]
    assert empty == []


def test_parameters_arrive_as_they_were_given(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = numbered
    client.generate("Hi", n=2, timeout_s=3, logit_bias={"5": -1}, presence_penalty=0.5)
    params = coordinator.requests[0].params
    assert (params.n, params.timeout_s, params.presence_penalty) == (2, 3.0, 0.5)
    assert params.logit_bias == {5: -1.0}


@pytest.mark.parametrize("n", [0, 65, True, 1.0, "2"])
def test_a_number_of_answers_that_is_none(client: DistributedClient, n: Any) -> None:
    with pytest.raises(InvalidRequest, match="from 1 to 64"):
        client.generate("Hi", n=n)
    with pytest.raises(InvalidRequest, match="from 1 to 64"):
        client.stream("Hi", n=n)


# ------------------------------------------------------------------ log-probabilities

PART = Spelling(written=b" \xc3")
FIRST = TokenLogprobs(
    logprob=-0.5,
    top=((7, -0.5), (3, -1.25)),
    spelled=(PART, PART, Spelling(written=b"</s>", is_text=False)),
)
SECOND = TokenLogprobs(logprob=math.log(0.125), top=((3, -0.75), (8, -2.0)))  # no tokenizer
WRONG = TokenLogprobs(logprob=-0.5, top=((7, -0.5),), spelled=(PART,))

SEVEN = LikelyToken(token_id=7, logprob=-0.5, text=" \ufffd", bytes=(32, 0xC3))
END = LikelyToken(token_id=3, logprob=-1.25, text="</s>", bytes=None)
PICKED_SEVEN = PickedToken(
    token_id=7, logprob=-0.5, text=" \ufffd", bytes=(32, 0xC3), top=(SEVEN, END)
)
PICKED_EIGHT = PickedToken(
    token_id=8,
    logprob=math.log(0.125),
    text="",
    bytes=None,
    top=(
        LikelyToken(token_id=3, logprob=-0.75, text="", bytes=None),
        LikelyToken(token_id=8, logprob=-2.0, text="", bytes=None),
    ),
)


def with_logprobs(request: Generate) -> list[ToClient]:
    return [
        piece(request, "a", 7, logprobs=(FIRST,)),
        piece(request, "", index=1),
        piece(request, "b", 8, 7, index=1, logprobs=(SECOND, FIRST), end="stop"),
        finished(request),
    ]


def test_every_token_has_its_log_probability(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = with_logprobs
    *chunks, last = client.stream("Hi", logprobs=2)
    assert [chunk.logprobs for chunk in chunks] == [
        [PICKED_SEVEN],
        [],
        [PICKED_EIGHT, PICKED_SEVEN],
    ]
    assert last.generation
    assert last.generation.logprobs == [PICKED_SEVEN, PICKED_EIGHT, PICKED_SEVEN]
    assert last.generation.token_ids == [7, 8, 7]


def test_none_were_asked_for_and_none_is_given(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = numbered
    assert client.generate("Hi", details=True).logprobs is None
    assert [chunk.logprobs for chunk in client.stream("Hi")] == [None, None, None]


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("deadline_exceeded", DeadlineExceeded),
        ("overloaded", Overloaded),
        ("cancelled", RequestCancelled),
        ("of_a_later_release", DistributedLLMError),
    ],
)
def test_a_failure_has_its_class_and_its_sentence(
    coordinator: FakeCoordinator,
    client: DistributedClient,
    code: str,
    kind: type[DistributedLLMError],
) -> None:
    coordinator.script = lambda request: [failed(request, code, "Not within 1 s.")]
    with pytest.raises(DistributedLLMError, match=r"^Not within 1 s\.$") as caught:
        client.generate("Hi", timeout_s=1.0)
    assert type(caught.value) is kind


def test_being_refused_tells_when_to_come_again(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = lambda request: [
        RequestFailed(
            request_id=request.request_id, code="overloaded", message="Full.", retry_after_s=2.5
        )
    ]
    with pytest.raises(Overloaded) as caught:
        client.generate("Hi")
    assert caught.value.retry_after_s == 2.5


def test_a_failure_ends_all_choices_and_what_came_before_stays(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = lambda request: [
        *interleaved(request)[:3],  # choice 1 has ended, 0 and 2 have not
        failed(request, "deadline_exceeded"),
    ]
    got: list[Chunk] = []
    with pytest.raises(DeadlineExceeded):
        got.extend(client.stream("Hi", n=3))
    assert [chunk.choice for chunk in got] == [1, 0, 1]
    with pytest.raises(DeadlineExceeded):
        client.generate("Hi", n=3)
    coordinator.script = numbered
    assert client.generate("Hi") == "<0>"
    assert len(coordinator.heard) == 3  # no cancelling of what is over


def test_one_failure_of_several_prompts_cancels_the_others(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    def script(request: Generate) -> list[ToClient]:
        third = len(coordinator.requests) == 3
        return [failed(request, "deadline_exceeded")] if third else []

    coordinator.script = script
    with pytest.raises(DeadlineExceeded):
        client.generate(["a", "b", "c"], n=2)
    eventually(lambda: len(coordinator.heard) == 5)
    first, second, _, *cancels = coordinator.heard
    assert isinstance(first, Generate)
    assert isinstance(second, Generate)
    assert sorted(cancels, key=str) == sorted(
        [Cancel(request_id=first.request_id), Cancel(request_id=second.request_id)], key=str
    )


BROKEN: list[tuple[Callable[[Generate], list[ToClient]], str]] = [
    (lambda r: [piece(r, "a", 1, choice=2)], "choice 2 was not asked for"),
    (lambda r: [piece(r, "a", 1), piece(r, "a", 1)], "goes on at token 0, but 1 have come"),
    (lambda r: [piece(r, "a", 1), piece(r, "b", 2, index=2)], "goes on at token 2, but 1"),
    (lambda r: [piece(r, "a", 1, index=1)], "goes on at token 1, but 0"),
    (lambda r: [piece(r, "a", 1, end="stop"), piece(r, "", index=1)], "goes on after its end"),
    (lambda r: [piece(r, "a", 1, logprobs=(FIRST,))], "1 log-probabilities where 0"),
]


@pytest.mark.parametrize(("script", "said"), BROKEN)
def test_an_answer_with_a_hole_is_no_answer(
    coordinator: FakeCoordinator, client: DistributedClient, script: Script, said: str
) -> None:
    coordinator.script = script
    with pytest.raises(RemoteProtocolError, match=said):
        client.generate("Hi", n=2)
    eventually(lambda: coordinator.heard[1:])
    assert coordinator.heard[1:] == [Cancel(request_id=coordinator.requests[0].request_id)]


def test_a_chunk_that_cannot_be_read_ends_its_request_alone(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = lambda request: [piece(request, "a", 1)]
    first, second = client.stream("one"), client.stream("two")
    assert next(first).text == next(second).text == "a"
    one, two = coordinator.requests
    coordinator.say(piece(one, "b", -1, index=1), piece(two, "b", 2, index=1, end="stop"))
    with pytest.raises(RemoteProtocolError, match=r"token_ids.*The answer is lost: ask again"):
        next(first)
    coordinator.say(finished(two))
    assert [chunk.text for chunk in second if chunk.text] == ["b"]
    eventually(lambda: coordinator.heard[2:])
    assert coordinator.heard[2:] == [Cancel(request_id=one.request_id)]


def test_tokens_without_a_spelling_each_are_not_passed_over(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = lambda r: [piece(r, "a", 7, logprobs=(WRONG,))]
    with pytest.raises(RemoteProtocolError, match="1 spellings where 2 tokens are"):
        client.generate("Hi", logprobs=1)


def test_missing_log_probabilities_are_not_passed_over(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = numbered
    with pytest.raises(RemoteProtocolError, match="0 log-probabilities where 1"):
        client.generate("Hi", logprobs=0)


def test_an_end_before_all_choices_have_ended(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = lambda r: [piece(r, "a", 1, end="stop"), finished(r)]
    with pytest.raises(RemoteProtocolError, match="choice 1 has no end"):
        client.generate("Hi", n=2)


def test_a_coordinator_that_goes_away_ends_every_choice(coordinator: FakeCoordinator) -> None:
    with FakeCoordinator(lambda r: interleaved(r)[:2]) as other:
        client = DistributedClient(other.address)
        stream = client.stream("Hi", n=3)
        assert [next(stream).choice, next(stream).choice] == [1, 0]
    with client, pytest.raises(CoordinatorLost, match="cannot be reached any more"):
        next(stream)


# ------------------------------------------------------------------ leaving early


def test_leaving_a_stream_cancels_its_request_once(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = lambda request: interleaved(request)[:3]
    for chunk in client.stream("Hi", n=3):
        if chunk.finish_reason:  # one choice is through, two are not
            break
    (request,) = coordinator.requests
    eventually(lambda: coordinator.heard[1:])
    coordinator.say(*interleaved(request)[3:], failed(request, "cancelled"))  # crossed the cancel
    coordinator.script = numbered
    assert client.generate("Hi", n=2) == ["<0>", "<1>"]
    assert coordinator.heard[1:-1] == [Cancel(request_id=request.request_id)]


def test_a_stream_keeps_its_client(coordinator: FakeCoordinator) -> None:
    coordinator.script = numbered
    stream = DistributedClient(coordinator.address).stream("Hi")  # nothing else refers to it
    gc.collect()
    assert "".join(chunk.text for chunk in stream) == "<0>"


def test_leaving_an_async_stream_cancels_its_request(coordinator: FakeCoordinator) -> None:
    coordinator.script = lambda request: interleaved(request)[:1]

    async def leave() -> None:
        async with AsyncDistributedClient(coordinator.address) as client:
            async with aclosing(client.stream("Hi", n=3)) as chunks:
                async for _ in chunks:
                    break
            waiting = asyncio.create_task(client.generate("Hi", n=2))
            while len(coordinator.requests) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(leave())
    expected = [Cancel(request_id=request.request_id) for request in coordinator.requests]
    eventually(lambda: len(coordinator.heard) == 4)
    assert [one for one in coordinator.heard if isinstance(one, Cancel)] == expected


def test_reading_to_the_end_cancels_nothing(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    coordinator.script = numbered
    for chunk in client.stream("Hi", n=2):
        if chunk.generation:  # the first of two; the request is over
            break
    client.generate("Hi")
    assert coordinator.heard == coordinator.requests


def test_a_reader_that_sleeps_delays_nobody_and_loses_nothing(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    count = 3000  # far more than one batch of the socket

    def script(request: Generate) -> list[ToClient]:
        pieces = [piece(request, "x", i, index=i) for i in range(count)]
        return [*pieces, piece(request, "", index=count, end="length"), finished(request)]

    coordinator.script = script
    slow = client.stream("Hi")
    assert next(slow).token_ids == [0]
    coordinator.script = numbered
    assert client.generate("Ho") == "<0>"
    *rest, last = slow
    assert [token for chunk in rest for token in chunk.token_ids] == list(range(1, count))
    assert last.generation
    assert last.generation.text == "x" * count


# ------------------------------------------------------------------ draining a worker


@contextmanager
def draining(
    coordinator: FakeCoordinator, client: DistributedClient, *names: str
) -> Iterator[list[Future[None]]]:
    """Yield what comes of draining these workers, which the coordinator was told one by one."""
    with ThreadPoolExecutor() as pool:
        waiting = []
        for name in names:
            told = len(coordinator.heard) + 1
            waiting.append(pool.submit(client.drain_worker, name))
            eventually(lambda told=told: len(coordinator.heard) == told)  # type: ignore[misc]
        yield waiting


def test_a_worker_has_left_when_the_coordinator_says_so(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    with draining(coordinator, client, "pc", "mac", "pc") as (pc, mac, again):
        assert coordinator.heard == [DrainWorker(worker=name) for name in ("pc", "mac", "pc")]
        coordinator.say(WorkerDrained(worker="nobody"), WorkerDrained(worker="mac"))
        mac.result(30)
        assert not pc.done()
        coordinator.say(WorkerDrained(worker="pc"))
        pc.result(30)
        assert not again.done()
        coordinator.say(WorkerDrained(worker="pc"))
        again.result(30)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", InvalidRequest),
        ("not_enough_memory", NotEnoughMemory),
        ("of_a_later_release", DistributedLLMError),
    ],
)
def test_why_a_worker_cannot_be_drained(
    coordinator: FakeCoordinator,
    client: DistributedClient,
    code: str,
    kind: type[DistributedLLMError],
) -> None:
    with draining(coordinator, client, "pc") as (pc,):
        coordinator.say(WorkerDrained(worker="pc", code=code, message="It cannot."))
        with pytest.raises(DistributedLLMError, match=r"^It cannot\.$") as caught:
            pc.result(30)
    assert type(caught.value) is kind


def test_draining_waits_as_long_as_the_coordinator_lives() -> None:
    with (
        FakeCoordinator(heartbeat_interval_s=0.05, silence_timeout_s=0.5) as coordinator,
        FaultProxy(coordinator.address) as proxy,
        DistributedClient(proxy.address, connect_timeout_s=0.5) as client,
        draining(coordinator, client, "pc") as (pc,),
    ):
        assert wait([pc], timeout=0.8).not_done  # beyond every time limit
        proxy.degrade(to_client=Faults(black_hole=True))
        with pytest.raises(CoordinatorLost, match=r"has been silent for 0\.5 s"):
            pc.result(30)


def test_a_name_that_no_worker_can_have(
    coordinator: FakeCoordinator, client: DistributedClient
) -> None:
    for name in ("", "my pc", "x" * 65):
        with pytest.raises(InvalidRequest, match=r"is no worker's name.*dllm status"):
            client.drain_worker(name)
    assert coordinator.heard == []


def test_whoever_no_longer_waits_for_a_worker_disturbs_nobody(
    coordinator: FakeCoordinator, caplog: pytest.LogCaptureFixture
) -> None:
    async def drain_twice() -> None:
        async with AsyncDistributedClient(coordinator.address) as client:
            first = asyncio.create_task(client.drain_worker("pc"))
            while not coordinator.heard:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            first.cancel()
            second = asyncio.create_task(client.drain_worker("pc"))
            while len(coordinator.heard) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            both = [WorkerDrained(worker="pc")] * 2
            await asyncio.get_running_loop().run_in_executor(None, coordinator.say, *both)
            await asyncio.wait_for(second, 30)

    asyncio.run(drain_twice())
    assert caplog.records == []


# ------------------------------------------------------------------ a bad network


def test_a_cut_connection_is_told_and_the_next_call_makes_another(
    coordinator: FakeCoordinator,
) -> None:
    coordinator.script = lambda request: interleaved(request)[:1]
    with FaultProxy(coordinator.address) as proxy, DistributedClient(proxy.address) as client:
        stream = client.stream("Hi", n=3)
        next(stream)
        proxy.cut()
        with pytest.raises(CoordinatorLost, match="cannot be reached any more"):
            next(stream)
        coordinator.script = numbered
        assert client.generate("Hi", n=2) == ["<0>", "<1>"]


def test_bytes_that_come_one_by_one(coordinator: FakeCoordinator) -> None:
    coordinator.script = numbered
    slices = Faults(slice_bytes=7)
    with FaultProxy(coordinator.address) as proxy, DistributedClient(proxy.address) as client:
        proxy.degrade(to_server=slices, to_client=slices)
        assert client.generate("Hi", n=3) == ["<0>", "<1>", "<2>"]


def test_a_coordinator_that_falls_silent_is_lost() -> None:
    with (
        FakeCoordinator(heartbeat_interval_s=0.05, silence_timeout_s=0.5) as coordinator,
        FaultProxy(coordinator.address) as proxy,
        DistributedClient(proxy.address) as client,
    ):
        stream = client.stream("Hi")
        coordinator.script = lambda request: [piece(request, "a", 1)]
        next(stream)
        proxy.degrade(to_client=Faults(black_hole=True))
        with pytest.raises(CoordinatorLost, match=r"has been silent for 0\.5 s"):
            next(stream)
