"""The bodies of Ollama's requests."""

from typing import Any, Literal

from distributed_llm.api.bodies import Body

Level = Literal["low", "medium", "high"]
"""How much to think."""


class ModelBody(Body):
    """A request about a model.

    Attributes:
        model: its name.
        name: the same, as older clients say it.
    """

    model: str = ""
    name: str = ""

    @property
    def asked_model(self) -> str:
        """The name of the model that is asked for."""
        return self.model or self.name


class GeneratingBody(ModelBody):
    """What requests for chats and for completions share.

    Attributes:
        options: parameters of generation, and of Ollama's own engine.
        format: "json", or the JSON schema that the answer follows.
        think: whether to think before the answer, or how much.
        keep_alive: how long Ollama would keep the model loaded; nothing here.
        top_logprobs: likely tokens to tell in each place, besides those of the answer.
    """

    stream: bool | None = None
    options: dict[str, Any] | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    think: bool | Level | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ChatBody(GeneratingBody):
    """A turn of a conversation; an empty one asks whether the model is there."""

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateBody(GeneratingBody):
    """A prompt; an empty one asks whether the model is there.

    Attributes:
        raw: take the prompt as it is, without the chat template.
        template: that would replace the model's own.
        context: the token ids of an earlier answer.
    """

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[Any] | None = None


class EmbedBody(ModelBody):
    """Texts whose meaning is to be told in numbers."""

    input: str | list[str] | None = None
    prompt: str | None = None
