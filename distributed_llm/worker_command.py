"""`dllm worker` and `dllm join`: serve layers with this machine."""

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributed_llm.common.waiting_threads import limit_active_waiting
from distributed_llm.options import Config, Coordinator, Insecure, options_as_words, settings_of
from distributed_llm.serving_process import WithParent, start_process

if TYPE_CHECKING:
    from distributed_llm.common.keyring import Keyring
    from distributed_llm.common.roles import Role
    from distributed_llm.common.settings import Settings

logger = logging.getLogger(__name__)

Name = Annotated[
    str | None, typer.Option(help="What to call this worker.", show_default="after this machine")
]
PeerBind = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Address for other workers.", show_default="0.0.0.0:0"),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda:0, mps.", show_default="auto")]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; 0: as the cores are.", show_default="0"),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="For weights and KV cache, such as 6GiB.", show_default="what is free"),
]
Offload = Annotated[
    str | None,
    typer.Option(
        help="Room for layers that fit nowhere else: beside a GPU in memory, then on the disk.",
        show_default="none",
    ),
]
Slowdown = Annotated[
    float | None, typer.Option(help="Look this many times slower, for tests.", show_default="1.0")
]
Model = Annotated[
    str | None, typer.Option(help="Checkpoint folder here.", show_default="the coordinator's")
]
CacheLimit = Annotated[
    str | None,
    typer.Option(help="Disk for weights, such as 100GiB.", show_default="what is free"),
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the coordinator as long as it takes.")]


def worker(
    coordinator: Coordinator = None,
    config: Config = None,
    name: Name = None,
    peer_bind: PeerBind = None,
    device: Device = None,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    offload: Offload = None,
    slowdown: Slowdown = None,
    model: Model = None,
    cache_limit: CacheLimit = None,
    wait: Wait = False,
    insecure: Insecure = False,
    exit_with_parent: WithParent = False,
) -> None:
    """Serve layers with this machine, for a coordinator here or one that it has joined.

    On a machine with several GPUs it starts a worker for each; --device cuda:1 drives just one.
    """
    options: dict[str, Any] = {
        "coordinator": coordinator,
        "threads": threads,
        "max_memory": max_memory,
        "offload": offload,
        "slowdown": slowdown,
        "model": model,
        "cache_limit": cache_limit,
    }
    of_one: dict[str, Any] = {"name": name, "peer_bind": peer_bind, "device": device}
    settings = settings_of(
        config,
        {
            **{f"worker.{key}": value for key, value in {**options, **of_one}.items()},
            "worker.connect_timeout_s": 0.0 if wait else None,
            "worker.insecure": insecure or None,
        },
    )
    start_process(settings.worker.log_level, exit_with_parent)
    flags = [*(["--wait"] if wait else []), *(["--insecure"] if insecure else [])]
    _work(settings, ["worker", *options_as_words({"config": config, **options}), *flags])


def join(
    line: Annotated[
        str | None,
        typer.Argument(
            metavar="[LINE]",
            help="What `dllm token create` prints: dllm://...; needed once, nothing afterwards.",
        ),
    ] = None,
    config: Config = None,
    name: Name = None,
    peer_bind: PeerBind = None,
    device: Device = None,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    offload: Offload = None,
    model: Model = None,
    cache_limit: CacheLimit = None,
    wait: Wait = False,
    service: Annotated[
        bool,
        typer.Option("--service", help="Work in the background from now on, also after restarts."),
    ] = False,
    enrol_only: Annotated[
        bool, typer.Option("--enrol-only", help="Enrol, and do no more.")
    ] = False,
    print_key: Annotated[
        bool,
        typer.Option("--print-key", help="Print the key for DLLM_KEY, a secret, and do no more."),
    ] = False,
) -> None:
    """Enrol this machine at a coordinator, once, and serve layers for it.

    Without a line it serves the coordinator that it joined last, wherever on the local network that
    is now. `dllm service remove worker` undoes --service.
    """
    from distributed_llm.client.finding import find_coordinator
    from distributed_llm.common.keyring import Keyring, state_folder, text_of_key
    from distributed_llm.common.roles import Role

    options: dict[str, Any] = {
        "name": name,
        "peer_bind": peer_bind,
        "device": device,
        "threads": threads,
        "max_memory": max_memory,
        "offload": offload,
        "model": model,
        "cache_limit": cache_limit,
    }
    given = settings_of(config, {f"worker.{key}": value for key, value in options.items()})
    keyring = Keyring(state_folder())
    start_process(given.worker.log_level, exit_with_parent=False)
    if line is not None:
        address, role = _enrol(keyring, line, given)
        if not (print_key or enrol_only or role.includes(Role.WORKER)):
            _say(f"Ask with: dllm generate --coordinator {address} PROMPT")
            return
    elif service and (joined := keyring.joined()):  # it need not run just now
        address = joined[0].address
    else:
        wait_for_it = wait or not given.worker.connect_timeout_s
        address = asyncio.run(find_coordinator(keyring, _say, wait=wait_for_it))
    if print_key:
        print(text_of_key(keyring.login(address)))
    elif service:
        from distributed_llm.service_command import install

        install("worker", ["join", "--wait", *options_as_words({"config": config, **options})])
    elif not enrol_only:
        worker(coordinator=address, config=config, wait=wait, **options)


def _enrol(keyring: "Keyring", line: str, settings: "Settings") -> "tuple[str, Role]":
    """Enrol this machine by a join line; return the coordinator's address, and as what."""
    from distributed_llm.client.enrolment import enrol
    from distributed_llm.common.addresses import machine_name
    from distributed_llm.common.join_line import parse_join_line

    wanted = parse_join_line(line)
    called = settings.worker.name or machine_name()
    enrolled = asyncio.run(enrol(keyring, wanted, called, settings.client.connect_timeout_s))
    _say(f"{enrolled.name} is enrolled at {wanted.address} as {enrolled.role.value}.")
    return wanted.address, enrolled.role


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _work(settings: "Settings", words: Sequence[str]) -> None:
    """Work as the settings say, until that ends; where there are several GPUs, by a child for each.

    Args:
        words: of `dllm`, that start such a child.
    """
    limit_active_waiting(os.environ)
    # KV cache buffers of many sizes would leave holes in a GPU's memory that nothing fits into.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from distributed_llm.worker.way_in import find_way_in

    wanted = settings.worker
    way_in = asyncio.run(find_way_in(wanted))
    logger.info("starting; loading PyTorch and transformers takes some seconds")
    gc.disable()  # collecting among a million new objects takes a third of the time of the imports
    from distributed_llm.gpus.run import run_workers
    from distributed_llm.gpus.workers import gpus_of, workers_for
    from distributed_llm.worker.devices import present
    from distributed_llm.worker.work import name_of, work

    gc.enable()
    if gpus := gpus_of(wanted.device, present()):
        workers = workers_for(gpus, name_of(wanted), wanted.peer_bind)
        raise typer.Exit(asyncio.run(run_workers(workers, words)))
    raise typer.Exit(asyncio.run(work(wanted, way_in)))
