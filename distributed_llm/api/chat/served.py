"""The model that a caller's coordinator serves, and how it writes."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from distributed_llm.api.chat.parsing.formats import Formats, detect_formats


class Known(Protocol):
    """Who a client is to the coordinator."""

    @property
    def model(self) -> str:
        """Name of the model that is served."""


class Described(Protocol):
    """What is known of a model."""

    @property
    def chat_template(self) -> str | None:
        """Jinja text that writes out conversations; None if there is none."""

    @property
    def tool_template(self) -> str | None:
        """Jinja text that writes out those with tools, if that is another one."""


class ModelClient(Protocol):
    """What is asked about the model; an `AsyncDistributedClient`."""

    async def identity(self) -> Known:
        """Return who this client is, which its connection knows."""

    async def model(self) -> Described:
        """Return what the coordinator tells of its model."""


@dataclass(frozen=True)
class Served:
    """A model that is served.

    Attributes:
        name: by which the coordinator knows it.
        formats: how it writes reasoning and calls of tools.
        template: its chat template; empty if it has none.
    """

    name: str
    formats: Formats
    template: str = ""


async def served_model(client: ModelClient) -> Served:
    """Return the model that is served.

    Raises:
        ConnectionFailed: the coordinator cannot be reached, or was lost.
    """
    name = (await client.identity()).model
    model = await client.model()
    formats = await asyncio.to_thread(detect_formats, model.chat_template, model.tool_template)
    return Served(name, formats, model.chat_template or "")
