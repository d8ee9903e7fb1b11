"""Bodies of requests for responses."""

from typing import Annotated, Any, Literal

from pydantic import Field

from distributed_llm.api.bodies import Body, Part
from distributed_llm.api.models import DEFAULT

Item = dict[str, Any]
"""A message, a thought, a call of a tool, or what a tool answered."""


class TextFormat(Part):
    """The form that the answer's text is to have."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class Text(Part):
    """What the answer's text is to be like; its verbosity cannot be told to the model."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Part):
    """How hard the model is to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None


class ResponsesBody(Body):
    """Body of `POST /v1/responses`."""

    model: str = DEFAULT
    input: Annotated[str | list[Item], Field(union_mode="left_to_right")]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Annotated[str | dict[str, Any] | None, Field(union_mode="left_to_right")] = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    user: str | None = None
    safety_identifier: str | None = None
    max_tool_calls: Any = None  # of the tools that OpenAI runs
    stream_options: Any = None
    prompt_cache_key: Any = None  # the KV cache needs no telling
    prompt_cache_retention: Any = None
    service_tier: Any = None
    client_metadata: Any = None
