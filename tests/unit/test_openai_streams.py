"""Transcripts of OpenAI's streams: every byte that is sent for what comes of a request."""

import json
from typing import Any

import pytest

from distributed_llm.api.chat.events import (
    AnswerEnded,
    ReasoningDelta,
    TextDelta,
    ToolCallBegun,
    ToolCallDelta,
    TurnEnded,
    TurnEvent,
)
from distributed_llm.api.openai.answer_head import AnswerHead
from distributed_llm.api.openai.chat_answers import ChatStream, whole_chat
from distributed_llm.api.openai.completion_answers import (
    Choices,
    CompletionStream,
    Piece,
    whole_completion,
)
from distributed_llm.api.openai.tracing import hops_of
from distributed_llm.client.answers import Chunk, Generation, LikelyToken, PickedToken
from distributed_llm.common.messages import StageHop, StageTiming, StepTrace, Timings, Usage
from distributed_llm.common.types import Epoch, LayerRange

HEAD = AnswerHead("chatcmpl-1", 7, "m", "fp_1")
TIMINGS = Timings(
    queued_s=0.5,
    first_token_s=0.25,
    decode_s=1.0,
    stages=(StageTiming(worker="pc", layers=LayerRange(0, 2), tasks=3, compute_s=0.125),),
)
TRACE = StepTrace(
    index=0,
    sampled=True,
    epoch=Epoch(1),
    start=0,
    tokens=3,
    step_tokens=4,
    step_sequences=2,
    began_s=0.0,
    took_s=1.0,
    outside_s=0.5,
    hops=(
        StageHop(
            worker="pc",
            layers=LayerRange(0, 2),
            bytes_in=16,
            link_s=None,
            queued_s=0.0,
            compute_s=0.5,
        ),
    ),
)


def generation(choice: int = 0, tokens: int = 2) -> Generation:
    return Generation(
        text="",
        token_ids=[1] * tokens,
        finish_reason="stop",
        choice=choice,
        logprobs=None,
        usage=Usage(prompt_tokens=5, completion_tokens=tokens, cached_tokens=3),
        timings=TIMINGS,
        request_id="r",
    )


def picked(text: str, logprob: float, *top: tuple[str, float]) -> PickedToken:
    likely = [
        LikelyToken(token_id=1, logprob=p, text=one, bytes=tuple(one.encode())) for one, p in top
    ]
    return PickedToken(
        token_id=1, logprob=logprob, text=text, bytes=tuple(text.encode()), top=tuple(likely)
    )


def head(kind: str) -> str:
    return (
        f'"id":"chatcmpl-1","object":"{kind}","created":7,"model":"m","system_fingerprint":"fp_1"'
    )


CHAT = head("chat.completion.chunk")
TEXT = head("text_completion")
LOGPROBS = '"logprobs":null,"finish_reason":null'
USAGE = (
    '{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,'
    '"prompt_tokens_details":{"cached_tokens":3}}'
)


def sent(events: list[TurnEvent], **options: Any) -> list[str]:
    stream = ChatStream(HEAD, **{"with_usage": False, "with_trace": False, **options})
    return b"".join(map(stream.write, events)).decode().split("\n\n")[:-1]


def test_text_of_a_chat() -> None:
    events: list[TurnEvent] = [
        TextDelta(choice=0, text="Hé\n"),
        TextDelta(choice=0, text="!"),
        AnswerEnded(choice=0, reason="stop"),
        TurnEnded(generations=(generation(),)),
    ]
    assert sent(events) == [
        f'data: {{{CHAT},"choices":[{{"index":0,"delta":{{"role":"assistant","content":""}},'
        f"{LOGPROBS}}}]}}",
        f'data: {{{CHAT},"choices":[{{"index":0,"delta":{{"content":"Hé\\n"}},{LOGPROBS}}}]}}',
        f'data: {{{CHAT},"choices":[{{"index":0,"delta":{{"content":"!"}},{LOGPROBS}}}]}}',
        f'data: {{{CHAT},"choices":[{{"index":0,"delta":{{}},"logprobs":null,'
        '"finish_reason":"stop"}]}',
        "data: [DONE]",
    ]


def test_token_counts_come_in_a_chunk_without_choices_and_are_null_in_all_others() -> None:
    *others, last, done = sent(
        [
            TextDelta(choice=0, text="a"),
            AnswerEnded(choice=0, reason="length"),
            TurnEnded(generations=(generation(),)),
        ],
        with_usage=True,
    )
    assert all(one.endswith(',"usage":null}') for one in others)
    assert last == f'data: {{{CHAT},"choices":[],"usage":{USAGE}}}'
    assert done == "data: [DONE]"


def test_reasoning_and_calls_of_tools() -> None:
    events: list[TurnEvent] = [
        ReasoningDelta(choice=0, text="hm"),
        ToolCallBegun(choice=0, index=0, id="abc", name="look"),
        ToolCallDelta(choice=0, index=0, arguments='{"a":'),
        ToolCallDelta(choice=0, index=0, arguments="1}"),
        AnswerEnded(choice=0, reason="tool_calls"),
        TurnEnded(generations=(generation(),)),
    ]
    deltas = [json.loads(one[6:])["choices"][0] for one in sent(events)[:-1]]
    assert [one["delta"] for one in deltas] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {
            "tool_calls": [
                {
                    "index": 0,
                    "id": "abc",
                    "type": "function",
                    "function": {"name": "look", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {},
    ]
    assert deltas[-1]["finish_reason"] == "tool_calls"
    whole = whole_chat(events, HEAD, with_logprobs=False, with_trace=False)
    (choice,) = json.loads(json.dumps(whole, default=_fields))["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "abc",
                    "type": "function",
                    "function": {"name": "look", "arguments": '{"a":1}'},
                }
            ],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
    }


def _fields(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


def test_log_probabilities_of_a_chat_have_bytes() -> None:
    tokens = (picked("é", -0.5, ("é", -0.5), ("e", -1.5)),)
    (_, piece) = sent([TextDelta(choice=0, text="é", tokens=tokens)])
    assert json.loads(piece[6:])["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "é",
                "logprob": -0.5,
                "bytes": [195, 169],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
                    {"token": "e", "logprob": -1.5, "bytes": [101]},
                ],
            }
        ],
        "refusal": None,
    }


@pytest.mark.parametrize("with_usage", [True, False])
def test_who_asks_is_told_which_machines_computed(with_usage: bool) -> None:
    stream = ChatStream(HEAD, with_usage=with_usage, with_trace=True)
    piece = stream.write(TextDelta(choice=0, text="a"), hops_of([TRACE])).split(b"\n\n")[1]
    assert json.loads(piece[6:])["dllm_hops"] == [
        {
            "worker": "pc",
            "layers": {"start": 0, "stop": 2},
            "tokens": 4,
            "bytes": 16,
            "link_s": None,
            "queued_s": 0.0,
            "compute_s": 0.5,
        }
    ]
    last = json.loads(stream.write(TurnEnded(generations=(generation(),))).split(b"\n\n")[0][6:])
    assert last["dllm_timings"]["stages"] == [
        {"worker": "pc", "layers": {"start": 0, "stop": 2}, "tasks": 3, "compute_s": 0.125}
    ]
    assert ("usage" in last) == with_usage


def written(pieces: list[Piece], choices: Choices, *, with_usage: bool = False) -> list[str]:
    stream = CompletionStream(HEAD, choices, with_usage=with_usage)
    data = b"".join(map(stream.write, pieces)) + stream.end()
    return data.decode().split("\n\n")[:-1]


def answer(prompt: int, *texts: str, choice: int = 0) -> list[Piece]:
    chunks = [Chunk(text, [1], choice) for text in texts]
    end = Chunk("", [2], choice, finish_reason="stop")
    return [(prompt, one) for one in (*chunks, end)]


ENDS: list[Piece] = [(0, Chunk("", [], generation=generation()))]


def test_text_of_a_completion() -> None:
    pieces = [*answer(0, "a", "", "b"), *ENDS]
    assert written(pieces, Choices(1, [""], with_trace=False), with_usage=True) == [
        f'data: {{{TEXT},"choices":[{{"index":0,"text":"a",{LOGPROBS}}}],"usage":null}}',
        f'data: {{{TEXT},"choices":[{{"index":0,"text":"b",{LOGPROBS}}}],"usage":null}}',
        f'data: {{{TEXT},"choices":[{{"index":0,"text":"","logprobs":null,'
        '"finish_reason":"stop"}],"usage":null}',
        f'data: {{{TEXT},"choices":[],"usage":{USAGE}}}',
        "data: [DONE]",
    ]


def test_answers_to_several_prompts_are_counted_on() -> None:
    pieces = [
        *answer(1, "d", choice=1),
        *answer(0, "a"),
        *answer(0, "b", choice=1),
        *answer(1, "c"),
        *[(p, Chunk("", [], n, generation=generation(n))) for p in (0, 1) for n in (0, 1)],
    ]
    choices = Choices(2, ["x", "y"], with_trace=False)
    body = whole_completion(pieces, HEAD, choices)
    assert [(one.index, one.text) for one in body.choices] == [
        (0, "xa"),
        (1, "xb"),
        (2, "yc"),
        (3, "yd"),
    ]
    assert (choices.usage.prompt_tokens, choices.usage.completion_tokens) == (10, 8)


def test_log_probabilities_of_a_completion_say_where_tokens_are() -> None:
    first = Chunk("ab", [1], logprobs=[picked("ab", -0.25, ("ab", -0.25), ("x", -2.0))])
    tokens = [picked("c", -3.0, ("y", -0.5)), picked("d", -1.0)]
    second = Chunk("cd", [1, 1], logprobs=tokens, finish_reason="length")
    pieces: list[Piece] = [(0, first), (0, second), *ENDS]
    (choice,) = whole_completion(pieces, HEAD, Choices(1, [""], with_trace=False)).choices
    assert _fields(choice.logprobs) == {
        "text_offset": [0, 2, 3],
        "token_logprobs": [-0.25, -3.0, -1.0],
        "tokens": ["ab", "c", "d"],
        "top_logprobs": [{"ab": -0.25, "x": -2.0}, {"y": -0.5, "c": -3.0}, {"d": -1.0}],
    }
