"""Finds the coordinator that a worker is for, and the keys that it is let in with.

Needs no torch, so whoever cannot join is told at once, and not after the seconds that it takes to
import that.
"""

import asyncio
import logging
from dataclasses import dataclass

from distributed_llm.common.addresses import addresses_of
from distributed_llm.common.architectures import check_architecture
from distributed_llm.common.errors import CoordinatorUnreachable
from distributed_llm.common.keyring import find_login
from distributed_llm.common.model_names import own_checkpoint
from distributed_llm.common.settings import WorkerSettings
from distributed_llm.common.transport import Login

logger = logging.getLogger(__name__)

_RESOLVE_EVERY_S = 2.0
"""Time between two looks for a coordinator whose name is not known yet."""


@dataclass(frozen=True)
class WayIn:
    """How a worker gets to its coordinator.

    Attributes:
        addresses: "HOST:PORT"s to dial the coordinator at.
        login: keys for it; None without keys.
    """

    addresses: tuple[str, ...]
    login: Login | None


async def find_way_in(settings: WorkerSettings) -> WayIn:
    """Return the way in, once the coordinator's name is known and there are keys for it.

    Before that, a worker's own copy of the model is looked at.

    Raises:
        CheckpointError: `model` is no folder with a model that can be served.
        NotAllowed: this machine has no key for the coordinator.
        CoordinatorUnreachable: the coordinator's name is not known, or there is no key and none
            started in time; unless this worker is to wait.
        ConfigError: the key file is damaged, or others can read it.
    """
    if settings.model:
        check_architecture(own_checkpoint(settings.model).config)
    return WayIn(await _addresses(settings), await _login(settings))


async def _addresses(settings: WorkerSettings) -> tuple[str, ...]:
    """Return the "HOST:PORT"s to dial the coordinator at, once its name is known.

    Raises:
        CoordinatorUnreachable: it is not known, and this worker is not to wait.
    """
    told = False
    while True:
        try:
            addresses = await addresses_of(settings.coordinator)
        except CoordinatorUnreachable as exc:
            if settings.connect_timeout_s:
                raise
            if not told:
                logger.warning("%s Waiting until it is.", exc)
                told = True
            await asyncio.sleep(_RESOLVE_EVERY_S)
        else:
            if not settings.connect_timeout_s:
                logger.info("waiting for the coordinator at %s", settings.coordinator)
            return addresses


async def _login(settings: WorkerSettings) -> Login | None:
    """Return the keys for the coordinator, None without keys; wait for a coordinator here.

    Raises:
        NotAllowed: this machine has no key for it.
        CoordinatorUnreachable: it has none, and no coordinator started in time.
    """
    if settings.insecure:
        return None
    wait_s = settings.connect_timeout_s
    give_up_at = asyncio.get_running_loop().time() + wait_s if wait_s else None
    return await find_login(settings.coordinator, give_up_at)
