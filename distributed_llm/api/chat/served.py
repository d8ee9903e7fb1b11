"""The model that a caller's coordinator serves, and how it writes."""

import asyncio
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

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
    template: str


_known: WeakKeyDictionary[ModelClient, Served] = WeakKeyDictionary()


async def served_model(client: ModelClient) -> Served:
    """Return the model that is served; it is asked about once per connection and name.

    Raises:
        ConnectionFailed: the coordinator cannot be reached, or was lost.
    """
    name = (await client.identity()).model
    served = _known.get(client)
    if served is None or served.name != name:
        template = (await client.model()).chat_template or ""
        served = Served(name, await asyncio.to_thread(detect_formats, template), template)
        _known[client] = served
    return served
