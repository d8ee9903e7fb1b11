"""Running a coordinator by its settings, or only its plan."""

import ipaddress
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distributed_llm.common.addresses import address_text, hosts_for_others, outward_hosts
from distributed_llm.common.architectures import VERIFIED, check_architecture
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.hub import fingerprints, resolve_for_coordinator
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.model_folder import folder_of_config, read_config
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.stopping import exit_code
from distributed_llm.common.types import LayerRange
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.inspect_model import served_model
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.planning.dry_run import DryRun, dry_run
from distributed_llm.coordinator.planning.strategies import check_custom
from distributed_llm.coordinator.service import Coordinator, raise_file_limit

logger = logging.getLogger(__name__)

_MAX_ADDRESSES = 4
"""Addresses of this machine that are told to people."""


@dataclass(frozen=True)
class HowToJoin:
    """How workers join a coordinator.

    Attributes:
        text: for people, with the commands.
        by_others: whether other machines may be able to.
    """

    text: str
    by_others: bool


def how_to_join(bound: str) -> HowToJoin:
    """Return how workers join a coordinator that listens at `bound`, "HOST:PORT" with a number."""
    host, port = split_address(bound)
    hosts = hosts_for_others(ipaddress.ip_address(host), outward_hosts())
    best, *others = [one for one in hosts if not one.is_loopback] or hosts
    command = f"dllm worker --coordinator {address_text(best, port)}"
    if best.is_loopback:
        return HowToJoin(
            f"only this machine can reach {bound}; workers on it join with: {command} (for workers "
            f"on other machines, start the coordinator with --bind 0.0.0.0:{port})",
            by_others=False,
        )
    more = ", ".join(address_text(one, port) for one in others[: _MAX_ADDRESSES - 1])
    return HowToJoin(
        f"workers join with: {command}" + (f" (or, in other networks: {more})" if more else ""),
        by_others=True,
    )


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
    model, checkpoint = open_model(settings.model, settings)
    if settings.strategy == "custom":
        check_custom(settings.layers, model.cost.num_layers)

    def listening(address: str) -> None:
        logger.info("serving %s (%s)", model.name, model.dtype)
        if checkpoint.model_type not in VERIFIED:
            logger.info("%s is no tested kind; the first worker checks it", checkpoint.model_type)
        at = how_to_join(address)
        logger.info("%s", at.text)
        if at.by_others:
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


def plan(
    model: str,
    workers: Sequence[str],
    settings: CoordinatorSettings,
    *,
    parameters_of: Callable[[Mapping[str, Any]], Mapping[str, TensorInfo]],
) -> DryRun:
    """Return which workers would get which layers of `model`, and how fast that would be.

    Args:
        model: checkpoint folder or hub id; a config.json alone, or its folder; empty for the
            built-in model.
        workers: descriptions of workers, as `dry_run` reads them.
        settings: of the coordinator.
        parameters_of: returns the tensors that a model with a given config.json would have.

    Raises:
        NotEnoughMemory: with how much is missing and what would fit.
        ConfigError: a worker cannot be read.
        CheckpointError: the model cannot be read or split.
    """
    folder = folder_of_config(Path(model)) if model else None
    if folder is None:
        served, _ = open_model(model, settings)
        return dry_run(served, workers, settings)
    config = read_config(folder)
    check_architecture(config)
    checkpoint = Checkpoint(folder, config, parameters_of(config))
    source = ModelSource(kind="folder", name=str(folder))
    run = dry_run(served_model(source, checkpoint, settings, {}), workers, settings)
    return replace(run, assumed=("weights as config.json describes them", *run.assumed))


def open_model(model: str, settings: CoordinatorSettings) -> tuple[ServedModel, Checkpoint]:
    """Return a model as it would be served, and its checkpoint.

    Args:
        model: checkpoint folder or hub id; empty for the built-in model.
        settings: with the dtypes to run it in.

    Raises:
        CheckpointError: the model cannot be read or split.
        InvalidRequest: generation_config.json has a value out of range.
    """
    source, checkpoint = resolve_for_coordinator(model)
    check_architecture(checkpoint.config)
    prints = fingerprints(source, checkpoint, LayerRange(0, checkpoint.num_layers))
    return served_model(source, checkpoint, settings, prints), checkpoint
