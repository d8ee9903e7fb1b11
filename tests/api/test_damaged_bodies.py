"""Bodies of agents with one value replaced by another: understood or refused, never a fault."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_llm.api.anthropic import conversation as anthropic
from distributed_llm.api.anthropic.bodies import MessagesBody
from distributed_llm.api.chat.forced_calls import calls_grammar
from distributed_llm.api.chat.parsing.answer_parser import AnswerParser
from distributed_llm.api.chat.turn import Turn
from distributed_llm.api.errors import ApiError
from distributed_llm.api.openai.responses import conversation as responses
from distributed_llm.api.openai.responses.bodies import ResponsesBody
from distributed_llm.client.prompts import encode_chat
from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.sampling_params import SamplingParams
from tests.api.chat_texts import QWEN
from tests.api.test_anthropic import AGENT
from tests.api.test_responses import CODEX

VALUES: list[Any] = [None, True, 0, -1.5, "", "x", "tool", [], {}, [{}], ["x"], [[1]], {"type": {}}]
VALUES += [{"type": "text"}, {"type": "function", "name": []}, {"role": "user"}, {"text": 1}]


def turn_of_messages(body: Any) -> Turn:
    return anthropic.turn_of(MessagesBody.model_validate(body), QWEN)


def turn_of_responses(body: Any) -> Turn:
    request = ResponsesBody.model_validate(body)
    responses.left_out_tools(request)
    return responses.turn_of(request, responses.items_of(request.input), QWEN)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value inside."""
    inside: Any = value.items() if isinstance(value, dict) else ()
    for key, child in enumerate(value) if isinstance(value, list) else inside:
        yield (*path, key)
        yield from places(child, (*path, key))


@settings(max_examples=120, deadline=None)
@pytest.mark.parametrize(
    ("body", "turn_of"), [(AGENT, turn_of_messages), (CODEX, turn_of_responses)]
)
@given(data=st.data())
def test_one_wrong_value(body: Any, turn_of: Callable[[Any], Turn], data: st.DataObject) -> None:
    damaged = copy.deepcopy(body)
    *way, last = data.draw(st.sampled_from(list(places(damaged))))
    inside = damaged
    for key in way:
        inside = inside[key]
    inside[last] = data.draw(st.sampled_from(VALUES))
    try:
        turn = turn_of(damaged)
        encode_chat(turn.messages, turn.tools, turn.template_arguments)
        SamplingParams.from_arguments(
            {name: value for name, value in turn.params.items() if name != "grammar"}
        )
        parser = AnswerParser(QWEN, tools=turn.tools, new_call_id=str)
        parser.add("<tool_call><function=exec_command><parameter=cmd>ls</parameter></function>")
        if turn.tools:
            calls_grammar(turn.tools, several=True)
    except (ApiError, InvalidRequest, pydantic.ValidationError):
        pass
