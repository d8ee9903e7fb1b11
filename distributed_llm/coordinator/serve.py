"""Running a coordinator by its settings, or only its plan."""

import logging
import socket
from collections.abc import Callable, Sequence

from distributed_llm.common.architectures import VERIFIED, check_architecture
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.hub import resolve_for_coordinator
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.stopping import exit_code
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.inspect_model import served_model
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.planning.dry_run import DryRun, dry_run
from distributed_llm.coordinator.planning.strategies import check_custom
from distributed_llm.coordinator.service import Coordinator, raise_file_limit

logger = logging.getLogger(__name__)

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_EVERYWHERE = {"0.0.0.0", "::", "*"}  # noqa: S104 - compared with, not listened on


async def serve(settings: CoordinatorSettings, *, on_listening: Callable[[str], None]) -> int:
    """Serve the model that `settings` names until SIGINT or SIGTERM; return the exit code.

    Args:
        on_listening: called with the address once the coordinator listens.

    Raises:
        CheckpointError: the model cannot be read or split.
        ConfigError: the setting `layers` does not suit the model.
        AddressInUse: the address cannot be listened on.
    """
    raise_file_limit()
    model, checkpoint = _open(settings.model, settings)
    if settings.strategy == "custom":
        check_custom(settings.layers, model.cost.num_layers)

    def listening(address: str) -> None:
        logger.info("serving %s (%s)", model.name, model.dtype)
        if checkpoint.model_type not in VERIFIED:
            logger.info("%s is no tested kind; the first worker checks it", checkpoint.model_type)
        host, port = split_address(address)
        if host in _EVERYWHERE:
            host = socket.gethostname()
        logger.info("workers join with: dllm worker --coordinator %s:%d", host, port)
        if host not in _LOOPBACK:
            logger.warning(
                "whoever can reach this port can send prompts and join as a worker; the traffic is "
                "not encrypted. Use it in a network that you trust."
            )
        on_listening(address)

    service = Coordinator(
        model,
        checkpoint.folder,
        settings,
        bind=settings.bind,
        on_listening=listening,
    )
    return exit_code(await service.run())


def plan(model: str, workers: Sequence[str], settings: CoordinatorSettings) -> DryRun:
    """Return which workers would get which layers of `model`, and how fast that would be.

    Args:
        model: checkpoint folder or hub id; empty for the built-in model.
        workers: descriptions of workers, as `dry_run` reads them.

    Raises:
        NotEnoughMemory: with how much is missing and what would fit.
        ConfigError: a worker cannot be read.
        CheckpointError: the model cannot be read or split.
    """
    served, _ = _open(model, settings)
    return dry_run(served, workers, settings)


def _open(model: str, settings: CoordinatorSettings) -> tuple[ServedModel, Checkpoint]:
    source, checkpoint = resolve_for_coordinator(model)
    check_architecture(checkpoint.config)
    return served_model(source, checkpoint, settings), checkpoint
