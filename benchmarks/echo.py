"""Round trips of 4 KiB over loopback: our transport against bare pyzmq, blocking and asyncio.

    python -m benchmarks.echo [--rounds 5]

The other end is a child process that sends everything back. All kinds are measured in turns. Our
transport encrypts with keys, as it does between machines; bare pyzmq here does not.
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import zmq
import zmq.asyncio

from distributed_llm.common import codec
from distributed_llm.common.keyring import Keyring, state_folder
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.messages import SequenceSlice, StageTime, Task, TaskResult
from distributed_llm.common.tensors import Frame, TensorSpec
from distributed_llm.common.transport import Dealer, Router
from distributed_llm.common.types import Epoch, PeerId, SequenceId, StepNumber
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.trust.store import Trust

PAYLOAD = bytes(4096)
TRIPS = 2000
KINDS = ("pyzmq, blocking", "pyzmq, asyncio", "transport", "transport with messages")


def task() -> list[Frame]:
    """Return one decode token of a model with 2048 hidden numbers on its way to a stage."""
    specs = (TensorSpec("int32", (1,)), TensorSpec("bfloat16", (1, 2048)))
    part = SequenceSlice(sequence_id=SequenceId(1), start=5, num_tokens=1)
    message = Task(
        epoch=Epoch(1),
        step=StepNumber(7),
        oldest=StepNumber(7),
        sequences=(part,),
        tensors=specs,
        route=(False,),
    )
    return codec.encode(message, (bytes(4), PAYLOAD))


def result(frames: list[Frame]) -> list[Frame]:
    """Return a stage's answer to a task."""
    message, tensors = codec.to_worker.decode(frames)
    assert isinstance(message, Task)
    timing = StageTime(compute_us=0, layers_us=0, queued_us=0)
    answer = TaskResult(
        epoch=Epoch(1), step=message.step, timings=(timing,), tensors=message.tensors[1:]
    )
    return codec.encode(answer, tensors[1:])


# ------------------------------------------------------------------ the end that sends back


def echo_blocking(address: str) -> None:
    """Send back with pyzmq's blocking calls until killed."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://{address}")
        socket.send(b"hello")
        while True:
            socket.send_multipart(socket.recv_multipart())


async def echo_asyncio(address: str) -> None:
    """Send back with pyzmq's asyncio calls until killed."""
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(f"tcp://{address}")
        await socket.send(b"hello")
        while True:
            await socket.send_multipart(await socket.recv_multipart())


async def echo_transport(address: str, answer: Callable[[list[Frame]], list[Frame]]) -> None:
    """Send back with our transport until killed."""
    over = asyncio.get_running_loop().create_future()
    dealer = Dealer(
        address,
        lambda frames: dealer.send(answer(frames)),
        lambda: dealer.send([b"hello"]),
        lambda: over.set_result(None),
        login=Keyring(state_folder()).login(address),
        on_rejected=lambda why: over.set_exception(SystemExit(f"not let in: {why.name}")),
    )
    await over


# ------------------------------------------------------------------ the end that measures


def measure_blocking(child: Callable[[str], "subprocess.Popen[bytes]"]) -> list[float]:
    """Return the seconds of each round trip."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        process = child(f"127.0.0.1:{port}")
        peer, _ = socket.recv_multipart()
        times = []
        for _ in range(TRIPS):
            started = time.perf_counter()
            socket.send_multipart([peer, PAYLOAD])
            socket.recv_multipart()
            times.append(time.perf_counter() - started)
        process.kill()
        process.wait()
        socket.linger = 0
    return times


async def measure_asyncio(child: Callable[[str], "subprocess.Popen[bytes]"]) -> list[float]:
    """Return the seconds of each round trip."""
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        process = child(f"127.0.0.1:{port}")
        peer, _ = await socket.recv_multipart()
        times = []
        for _ in range(TRIPS):
            started = time.perf_counter()
            await socket.send_multipart([peer, PAYLOAD])
            await socket.recv_multipart()
            times.append(time.perf_counter() - started)
        process.kill()
        process.wait()
        socket.linger = 0
    return times


async def measure_transport(
    child: Callable[[str], "subprocess.Popen[bytes]"], *, messages: bool
) -> list[float]:
    """Return the seconds of each round trip, with encoding and decoding if `messages`."""
    times: list[float] = []
    done = asyncio.get_running_loop().create_future()
    started = 0.0

    def on_message(peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        nonlocal started
        if started:
            if messages:
                codec.to_coordinator.decode(frames)
            times.append(time.perf_counter() - started)
        if len(times) == TRIPS:
            done.set_result(None)
            return
        started = time.perf_counter()
        router.send(peer, task() if messages else [PAYLOAD])

    trust = Trust(state_folder(), 0, now=time.time())
    router = Router("127.0.0.1:0", on_message, lambda: None, door=trust.door)
    trust.listening(split_address(router.address)[1])
    process = child(router.address)
    await done
    process.kill()
    process.wait()
    router.close()
    trust.close()
    return times


def measure(kind: str) -> float:
    """Return the median round trip of one kind, microseconds."""

    def child(address: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-m", "benchmarks.echo", "--echo", kind, address])

    if kind == KINDS[0]:
        times = measure_blocking(child)
    elif kind == KINDS[1]:
        times = asyncio.run(measure_asyncio(child))
    else:
        times = asyncio.run(measure_transport(child, messages=kind == KINDS[3]))
    return statistics.median(times) * 1e6


def echo(kind: str, address: str) -> None:
    """Be the end that sends back."""
    if kind == KINDS[0]:
        echo_blocking(address)
    elif kind == KINDS[1]:
        asyncio.run(echo_asyncio(address))
    else:
        answer = result if kind == KINDS[3] else list
        asyncio.run(echo_transport(address, answer))


def run(rounds: int) -> None:
    """Measure and print."""
    medians: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            medians[kind].append(measure(kind))
    base = statistics.median(medians[KINDS[1]])
    print("| round trip of 4 KiB | µs | against pyzmq, asyncio |\n|---|---|---|")
    for kind, values in medians.items():
        value = statistics.median(values)
        print(f"| {kind} | {value:.0f} | {value / base:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--echo", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        echo(*arguments.echo)
    else:
        run(arguments.rounds)
