"""Running a coordinator by its settings, or only its plan."""

import ipaddress
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed_llm.common.addresses import addresses_for_others, machine_name
from distributed_llm.common.architectures import check_architecture, has_tests
from distributed_llm.common.cache_folder import cache_folder
from distributed_llm.common.checkpoint import Checkpoint
from distributed_llm.common.discovery import Announcer
from distributed_llm.common.errors import UnsupportedModel
from distributed_llm.common.file_limit import raise_file_limit
from distributed_llm.common.keyring import here, state_folder
from distributed_llm.common.keys import fingerprint
from distributed_llm.common.messages import ModelSource
from distributed_llm.common.model_files import TensorInfo
from distributed_llm.common.model_folder import folder_of_config, read_config
from distributed_llm.common.model_names import fingerprints, resolve_for_coordinator
from distributed_llm.common.model_sizes import check_sizes, short_context
from distributed_llm.common.other_formats import quantization
from distributed_llm.common.settings import CoordinatorSettings
from distributed_llm.common.stopping import exit_code
from distributed_llm.common.types import LayerRange
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.inspect_model import served_model
from distributed_llm.coordinator.loadable import ensure_loadable
from distributed_llm.coordinator.model import ServedModel
from distributed_llm.coordinator.planning.dry_run import DryRun, dry_run
from distributed_llm.coordinator.planning.strategies import check_custom
from distributed_llm.coordinator.service import Coordinator
from distributed_llm.coordinator.text.tokenizer import Tokenizer
from distributed_llm.coordinator.trust.store import Trust
from distributed_llm.weights.giving.library import Library
from distributed_llm.weights.giving.shelf import Shelf

logger = logging.getLogger(__name__)

_MAX_ADDRESSES = 4
"""Addresses of this machine that are told to people."""


def how_to_join(bound: str, *, insecure: bool) -> str:
    """Return how workers join a coordinator, for people, with the commands.

    Args:
        bound: "HOST:PORT" that the coordinator listens on, with the number of the port.
        insecure: whether it uses no keys.
    """
    host, port = split_address(bound)
    others = addresses_for_others(bound)
    own = here(port) if ipaddress.ip_address(host).is_unspecified else bound
    command = f"dllm worker {'--insecure ' if insecure else ''}--coordinator"
    if not others:
        return (
            f"only this machine can reach {own}; workers on it join with: {command} {own} (for "
            f"workers on other machines, start the coordinator with --bind 0.0.0.0:{port})"
        )
    if not insecure:
        return (
            f"workers on this machine join with: {command} {own}; for another machine, `dllm token "
            "create` prints the line to join with"
        )
    best, *more = others[:_MAX_ADDRESSES]
    elsewhere = f" (or, in other networks: {', '.join(more)})" if more else ""
    return f"workers join with: {command} {best}{elsewhere}"


async def serve(
    settings: CoordinatorSettings,
    model: ServedModel,
    checkpoint: Checkpoint,
    *,
    on_listening: Callable[[str], None],
) -> int:
    """Serve a model until SIGINT or SIGTERM; return the exit code.

    Args:
        model: as `open_to_serve` returns it for these settings.
        checkpoint: of it.
        on_listening: called with the address once the coordinator listens.

    Raises:
        AddressInUse: the address cannot be listened on.
    """
    raise_file_limit()
    _, port = split_address(settings.bind)
    trust = None if settings.insecure else Trust(state_folder(), port, now=time.time())

    announcers: list[Announcer] = []

    def listening(address: str) -> None:
        if trust:
            trust.listening(split_address(address)[1])
            if not ipaddress.ip_address(split_address(address)[0]).is_loopback:
                key = fingerprint(trust.keys.public)
                announcers.append(Announcer(address, machine_name(), key))
        logger.info("serving %s (%s)", model.name, model.dtype)
        if not has_tests(checkpoint.config):
            logger.info(
                "no test covers the model type %r: each worker tries a small model of it before it "
                "loads layers, and refuses it if that gives other tokens when it is split",
                checkpoint.model_type,
            )
        if note := note_on_rope(checkpoint, model.defaults.context_length):
            logger.info("%s", note)
        logger.info("%s", how_to_join(address, insecure=settings.insecure))
        if settings.insecure:
            logger.warning(
                "no keys are used: whoever can reach this port can send prompts, join as a worker "
                "and read what is sent. Use it in a network that you trust."
            )
        on_listening(address)

    service = Coordinator(
        model,
        checkpoint.folder,
        settings,
        bind=settings.bind,
        on_listening=listening,
        trust=trust,
        library=_library(model, checkpoint),
    )
    try:
        return exit_code(await service.run())
    finally:
        for announcer in announcers:
            announcer.close()
        if trust:
            trust.close()


def note_on_rope(checkpoint: Checkpoint, context_length: int) -> str:
    """Return what is to be said of a model with rotary positions for short and for long texts."""
    short = short_context(checkpoint.config)
    if short is None or context_length <= short:
        return ""
    return (
        f"this model has other rotary positions for texts of more than {short} tokens; all texts "
        f"get those of {context_length} tokens, so that no answer depends on others. If none is "
        f"longer than {short}, serve it with --max-context {short}: that suits short texts better"
    )


def _library(model: ServedModel, checkpoint: Checkpoint) -> Library:
    """Return the weights of a model as this machine has them, or can get them from the hub."""
    source = model.source

    def fetch_file(name: str, on_bytes: Callable[[int], None]) -> Path:
        if source.kind == "hub":
            from distributed_llm.common.hub import download_file

            return download_file(source, name, on_bytes)
        return checkpoint.path_of(name)

    return Library(source, checkpoint, fetch_file, Shelf(), cache_folder() / "digests")


def plan(
    model: str,
    workers: Sequence[str],
    settings: CoordinatorSettings,
    *,
    parameters_of: Callable[[Mapping[str, Any]], Mapping[str, TensorInfo]],
    check_loading: Callable[[Checkpoint], None],
) -> DryRun:
    """Return which workers would get which layers of `model`, and how fast that would be.

    Args:
        model: checkpoint folder or hub id; a config.json alone, or its folder; empty for the
            built-in model.
        workers: descriptions of workers, as `dry_run` reads them.
        settings: of the coordinator.
        parameters_of: returns the tensors that a model with a given config.json would have.
        check_loading: raises what workers would raise when they load a checkpoint.

    Raises:
        NotEnoughMemory: with how much is missing and what would fit.
        ConfigError: a worker cannot be read.
        CheckpointError: the model cannot be read or split.
    """
    folder = folder_of_config(Path(model)) if model else None
    if folder is None:
        served, checkpoint = open_model(model, settings)
        check_loading(checkpoint)
        return dry_run(_with_tokenizer(served, checkpoint.folder), workers, settings)
    config = read_config(folder)
    if (how := quantization(config)) is not None:
        raise UnsupportedModel(
            f"The weights of the model that {folder} describes are quantized ({how}), so that "
            "config.json does not tell how large they are. Give the folder that has them, or the "
            "model's id on the hub."
        )
    check_architecture(config)
    checkpoint = Checkpoint(folder, config, parameters_of(config))
    source = ModelSource(kind="folder", name=str(folder))
    served = _with_tokenizer(served_model(source, checkpoint, settings, {}), folder)
    run = dry_run(served, workers, settings)
    return replace(run, assumed=("weights as config.json describes them", *run.assumed))


def _with_tokenizer(model: ServedModel, folder: Path) -> ServedModel:
    """Return the model with what its tokenizer says, read as a coordinator has it read.

    Raises:
        CheckpointError: the tokenizer in `folder` cannot be read.
    """
    return model.with_tokenizer(Tokenizer.open(folder).facts())


def open_to_serve(
    settings: CoordinatorSettings, tell: Callable[[str], None] = logger.info
) -> tuple[ServedModel, Checkpoint]:
    """Return the model that `settings` names, checked as far as it can be before a worker has it.

    Args:
        tell: called with a line for people when it takes seconds.

    Raises:
        CheckpointError: the model cannot be read, split or loaded.
        ConfigError: the setting `layers` does not suit the model.
        InvalidRequest: generation_config.json has a value out of range.
    """
    model, checkpoint = open_model(settings.model, settings)
    if settings.strategy == "custom":
        check_custom(settings.layers, model.cost)
    if settings.model:
        ensure_loadable(checkpoint, tell)
    return model, checkpoint


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
    check_sizes(checkpoint.config)
    prints = fingerprints(source, checkpoint, LayerRange(0, checkpoint.num_layers))
    return served_model(source, checkpoint, settings, prints), checkpoint
