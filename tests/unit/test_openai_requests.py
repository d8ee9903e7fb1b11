"""What bodies of OpenAI's clients ask for."""

from typing import Any

import pytest

from distributed_llm.api.bodies import warning_headers
from distributed_llm.api.chat.parsing.formats import Formats
from distributed_llm.api.chat.turn import Turn
from distributed_llm.api.errors import ApiError
from distributed_llm.api.openai.chat_request import ChatRequest, turn_of
from distributed_llm.api.openai.completion_request import CompletionRequest, completions_of
from distributed_llm.api.openai.refusals import KNOWN, refuse_fields
from distributed_llm.api.openai.sampling import NAMES, error_of
from distributed_llm.common.errors import ContextLengthExceeded, InvalidRequest
from distributed_llm.common.grammar import Grammar
from distributed_llm.common.sampling_params import SamplingParams

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "look"}}
THINKER = Formats(reasoning=("<think>", "</think>"), thinking_switch="enable_thinking")


NO_FORMATS = Formats()


def turn(formats: Formats = NO_FORMATS, template: str = "", **body: Any) -> Turn:
    asked = ChatRequest.model_validate({"messages": HI, **body})
    refuse_fields(asked)
    return turn_of(asked, formats, template)


def refused(**body: Any) -> ApiError:
    with pytest.raises(ApiError) as raised:
        turn(**body)
    assert raised.value.status == 400
    return raised.value


def test_names_are_those_of_parameters() -> None:
    assert set(NAMES.values()) <= set(SamplingParams.__struct_fields__)
    assert set(NAMES) <= set(ChatRequest.model_fields)


def test_null_is_not_given() -> None:
    fields: dict[str, Any] = {
        name: None for name in ChatRequest.model_fields if name not in ("messages", "model")
    }
    assert turn(**fields) == turn()
    assert turn().params == {"max_new_tokens": 4096, "fit_context": True}


def test_both_lengths_may_be_given_if_they_are_the_same() -> None:
    assert turn(max_tokens=5).params == turn(max_completion_tokens=5).params
    assert turn(max_tokens=5, max_completion_tokens=5).params == {"max_new_tokens": 5}
    assert refused(max_tokens=5, max_completion_tokens=6).param == "max_tokens"


@pytest.mark.parametrize(
    ("given", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
    ],
)
def test_log_probabilities_of_chats(given: dict[str, Any], logprobs: int | None) -> None:
    assert turn(**given).params.get("logprobs") == logprobs


def test_what_clients_send_back_is_left_out() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    sent = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [call],
        "reasoning_content": "hm",
    }
    assert turn(messages=[*HI, sent]).messages[1] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [call],
        "reasoning_content": "hm",
    }
    parts = [
        {"type": "text", "text": "a", "cache_control": {}},
        {"type": "refusal", "refusal": "b"},
    ]
    told = turn(messages=[{"role": "user", "content": parts}]).messages[0]["content"]
    assert told == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
    ],
)
def test_only_text_is_served(part: dict[str, Any]) -> None:
    error = refused(messages=[{"role": "user", "content": [part]}])
    assert (error.param, error.code) == ("messages.0.content", "unsupported_parameter")
    assert "Only text" in error.message


def test_what_a_template_may_know_reaches_it() -> None:
    given = {"date_string": "1 May", "documents": [{"title": "Tea"}], "enable_thinking": False}
    assert turn(chat_template_kwargs=given).template_arguments == given


@pytest.mark.parametrize(
    ("choice", "told"),
    [(None, "auto"), ("auto", "auto"), ("none", "none"), ("required", "required"), (NAMED, "look")],
)
def test_tools(choice: Any, told: str) -> None:
    asked = turn(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert (asked.tools, asked.tool_choice, asked.parallel_tool_calls) == ([TOOL], told, False)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "look"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"functions": [{"name": "x"}]}, "functions"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "x"}}]}, None),
        ({"messages": []}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": [1]}}, "chat_template_kwargs"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"base_url": "http://x"}, "base_url"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"echo": True}, "echo"),
    ],
)
def test_what_cannot_be_done_is_refused(body: dict[str, Any], param: str | None) -> None:
    error = refused(**body)
    assert error.param == (param or "messages.0.function_call")


def test_usual_values_of_what_cannot_be_done_are_fine() -> None:
    usual: dict[str, Any] = {
        "modalities": ["text"],
        "verbosity": "medium",
        "trust_remote_code": False,
        "length_penalty": 1.0,
        "audio": None,
        "parallel_tool_calls": True,
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "user": "me",
    }
    assert turn(**usual) == turn()
    asked = ChatRequest.model_validate({"messages": HI, **usual, "sparkle": 1})
    warning = "ignored unknown fields: sparkle"
    assert warning_headers(asked, KNOWN) == {"x-dllm-warning": warning}


@pytest.mark.parametrize(
    ("effort", "formats", "template", "arguments"),
    [
        ("none", THINKER, "", {"enable_thinking": False}),
        ("high", THINKER, "", {"enable_thinking": True}),
        ("low", Formats(), "{{ reasoning_effort }}", {"reasoning_effort": "low"}),
        ("medium", Formats(), "", {}),
        ("none", Formats(), "", {}),
    ],
)
def test_effort_goes_to_the_template(
    effort: str, formats: Formats, template: str, arguments: dict[str, Any]
) -> None:
    assert turn(formats, template, reasoning_effort=effort).template_arguments == arguments


def test_effort_that_the_template_does_not_know_is_refused() -> None:
    assert refused(reasoning_effort="high").code == "unsupported_parameter"
    assert refused(reasoning_effort="much").code == "invalid_value"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
JSON = Grammar("json_schema", '{"type":"object","properties":{"a":{"type":"integer"}}}')


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            JSON,
        ),
        ({"guided_json": SCHEMA}, JSON),
        ({"guided_json": '{"type": "boolean"}'}, Grammar("json_schema", '{"type":"boolean"}')),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["a", 'b"']}, Grammar("lark", r'start: "a" | "b\""')),
        ({"guided_grammar": 'start: "x"'}, Grammar("lark", 'start: "x"')),
        ({"guided_grammar": 'root ::= "x"'}, Grammar("gbnf", 'root ::= "x"')),
        ({"structured_outputs": {"json": SCHEMA}}, JSON),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"structured_outputs": {"regex": "a", "disable_fallback": True}}, Grammar("regex", "a")),
    ],
)
def test_grammars(body: dict[str, Any], grammar: Grammar | None) -> None:
    assert turn(**body).params.get("grammar") == grammar
    completion = CompletionRequest.model_validate({"prompt": "x", **body})
    assert completions_of(completion).params.get("grammar") == grammar


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ],
)
def test_wrong_grammars(body: dict[str, Any], param: str) -> None:
    assert refused(**body).param == param


@pytest.mark.parametrize(
    ("message", "param", "told"),
    [
        ("Bad generation parameter stop_strings=3: no.", "stop", "stop=3"),
        ("min_new_tokens (5) is above max_new_tokens (3).", "min_tokens", "above max_tokens"),
        ("Token id 7 is not in the model's vocabulary of 5.", "logit_bias", "vocabulary"),
        ("Token id 9 is not in the model's vocabulary of 5.", "stop_token_ids", "vocabulary"),
        ("Token id 8 is not in the model's vocabulary of 5.", "prompt", "vocabulary"),
        ("The grammar cannot be followed: why.", "guided_regex", "cannot be followed"),
        ("The model's chat template knows no tools.", "tools", "knows no tools"),
        ("The prompt is empty. Give at least one token.", "prompt", "empty"),
        ("Bad message 1: Invalid enum value 'tool'.", "prompt", "Bad message"),
    ],
)
def test_what_the_coordinator_says_is_told_in_the_names_of_the_request(
    message: str, param: str, told: str
) -> None:
    given = {"logit_bias": {"7": 1}, "stop_token_ids": [9], "guided_regex": "["}
    error = error_of(InvalidRequest(message), NAMES, "prompt", given)
    assert (error.param, error.code) == (param, "invalid_value")
    assert told in error.message


@pytest.mark.parametrize(
    ("message", "param", "told"),
    [
        ("The prompt has 9 tokens: lower max_new_tokens.", "prompt", "prompt has 9 tokens: lower"),
        ("The decoder starts with 1: lower max_new_tokens.", "max_tokens", "starts with 1: lower"),
    ],
)
def test_what_is_too_long_is_told_by_its_code(message: str, param: str, told: str) -> None:
    error = error_of(ContextLengthExceeded(message), NAMES, "prompt", {})
    assert (error.param, error.code) == (param, "context_length_exceeded")
    assert error.message.endswith(f"{told} max_tokens.")


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts(prompt: Any, prompts: list[Any]) -> None:
    body = CompletionRequest.model_validate({"prompt": prompt, "n": 2, "best_of": 2})
    assert (completions_of(body).prompts, completions_of(body).n) == (prompts, 2)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"echo": True, "logprobs": 0}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream_options": {}}, "stream_options"),
    ],
)
def test_wrong_completions(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        completions_of(CompletionRequest.model_validate({"prompt": "x", **body}))
    assert raised.value.param == param
