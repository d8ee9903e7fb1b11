"""Bodies of requests, as Anthropic's clients send them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from distributed_llm.api.bodies import Body, Part

Blocks = Annotated[str | list[dict[str, Any]], Field(union_mode="left_to_right")]
"""A text, or blocks of it and others."""


class InputMessage(Part):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class Thinking(Part):
    """Whether the model is to think first."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class ToolChoice(Part):
    """Whether a tool is to be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class OutputFormat(Part):
    """The form that the answer is to have."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    """What the answer is to be like; how hard the model tries cannot be told to it."""

    format: OutputFormat | None = None


class CountTokensBody(Body):
    """Body of `POST /v1/messages/count_tokens`."""

    model: str
    messages: list[InputMessage] = Field(min_length=1)
    system: Blocks | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None  # the KV cache needs no telling
    context_management: Any = None  # a wish: the client's own messages say what counts
    speed: Any = None


class MessagesBody(CountTokensBody):
    """Body of `POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Mapping[str, Any] | None = None
    service_tier: Any = None
    inference_geo: Any = None
    diagnostics: Any = None
