"""Says in the log whether the API's coordinator is there, whenever that changes."""

import asyncio
import logging

from distributed_llm.client.async_client import AsyncDistributedClient
from distributed_llm.common.errors import DistributedLLMError, NotAllowed

logger = logging.getLogger(__name__)

EVERY_S = 1.0
"""Time between two looks, seconds; a connection that is there answers without asking."""


async def watch(client: AsyncDistributedClient, address: str, every_s: float = EVERY_S) -> None:
    """Keep a connection to the coordinator, and tell when it comes and goes.

    Args:
        client: of this machine's own key.
        address: of the coordinator, for people.
    """
    logger.info("looking for the coordinator at %s", address)
    known: object = None
    while True:
        level = logging.WARNING
        try:
            model = (await client.identity()).model
            level, now, text = logging.INFO, model, f"the coordinator at {address} serves {model}"
        except NotAllowed as exc:
            now, text = exc.code, f"requests with keys are served, others not: {exc}"
        except DistributedLLMError as exc:
            now, text = "", f"requests get 503 until there is a coordinator: {exc}"
        if now != known:
            logger.log(level, "%s", text)
            known = now
        await asyncio.sleep(every_s)
