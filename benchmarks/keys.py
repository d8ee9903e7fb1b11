"""What keys cost: round trips, bulk and generation with encryption, against the same without.

    python -m benchmarks.keys [--rounds 5]

With and without keys take turns; medians are printed. Both ends of round trips and bulk run in two
processes on this machine, so all of the encryption is on its cores.
"""

import argparse
import asyncio
import statistics
import sys
import time

from benchmarks.common import print_table
from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.common.keyring import Keyring, state_folder
from distributed_llm.common.keys import PublicKey
from distributed_llm.common.tensors import Frame
from distributed_llm.common.transport import Dealer, Router
from distributed_llm.common.types import PeerId
from distributed_llm.common.units import split_address
from distributed_llm.coordinator.trust.store import Trust

_TRIPS = 3000
_FRAME = bytes(1 << 20)
_FRAMES = 400
_UNDER_WAY = 4
"""Frames that are sent before the first one has to be answered."""

_NEW_TOKENS = 200
_ROWS = ("round trip of an empty message, us", "bulk, MB/s", "generation, tokens/s")


# ------------------------------------------------------------------ the other end


async def answer(address: str, keys: bool) -> None:
    """Answer every message with an empty one, until killed."""
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    dealer = Dealer(
        address,
        lambda frames: dealer.send([b""]),
        lambda: dealer.send([b"hello"]),
        lambda: over.set_result(None),
        login=Keyring(state_folder()).login(address) if keys else None,
        on_rejected=lambda why: over.set_exception(SystemExit(f"not let in: {why.name}")),
    )
    await over


# ------------------------------------------------------------------ the end that measures


async def measure_sockets(keys: bool) -> tuple[float, float]:
    """Return the median round trip, microseconds, and the rate of bulk, MB/s."""
    inbox: asyncio.Queue[PeerId] = asyncio.Queue()

    def heard(peer: PeerId, key: PublicKey, frames: list[Frame]) -> None:
        inbox.put_nowait(peer)

    trust = Trust(state_folder(), 0, now=time.time()) if keys else None
    router = Router("127.0.0.1:0", heard, lambda: None, door=trust.door if trust else None)
    if trust:
        trust.listening(split_address(router.address)[1])
    command = [sys.executable, "-m", "benchmarks.keys", "--answer", router.address]
    child = await asyncio.create_subprocess_exec(*command, *([] if keys else ["--insecure"]))
    try:
        peer = await inbox.get()
        trips = []
        for _ in range(_TRIPS):
            started = time.perf_counter()
            router.send(peer, [b""])
            await inbox.get()
            trips.append(time.perf_counter() - started)
        started = time.perf_counter()
        for number in range(_FRAMES + _UNDER_WAY):
            if number < _FRAMES:
                router.send(peer, [_FRAME])
            if number >= _UNDER_WAY:
                await inbox.get()
        took_s = time.perf_counter() - started
    finally:
        child.kill()
        await child.wait()
        router.close()
        if trust:
            trust.close()
    return 1e6 * statistics.median(trips), _FRAMES * len(_FRAME) / 1e6 / took_s


def measure_generation(client: DistributedClient) -> float:
    """Return tokens per second of one answer on three stages."""
    started = time.perf_counter()
    client.generate(
        "Once upon a time", max_new_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True
    )
    return _NEW_TOKENS / (time.perf_counter() - started)


def cluster(keys: bool) -> LocalCluster:
    """Return a cluster of three stages, one thread each."""
    return LocalCluster(
        workers=[{"threads": 1}] * 3,
        coordinator={"strategy": "even", "insecure": not keys},
        progress=None,
    )


def main() -> None:
    """Measure, or be the other end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    parser.add_argument("--insecure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.answer:
        asyncio.run(answer(given.answer, keys=not given.insecure))
        return
    found: dict[bool, list[tuple[float, ...]]] = {True: [], False: []}
    with cluster(True) as with_keys, cluster(False) as without:
        clients = {
            True: DistributedClient(with_keys.address),
            False: DistributedClient(without.address, insecure=True),
        }
        for client in clients.values():  # the first answer is slower
            measure_generation(client)
        for _ in range(given.rounds):
            for keys, client in clients.items():
                sockets = asyncio.run(measure_sockets(keys))
                speeds = [measure_generation(client) for _ in range(3)]
                found[keys].append((*sockets, statistics.median(speeds)))
    median = {
        keys: list(map(statistics.median, zip(*all_of, strict=True)))
        for keys, all_of in found.items()
    }
    rows = [
        (name, f"{with_it:.1f}", f"{without_it:.1f}", f"{with_it / without_it:.2f}")
        for name, with_it, without_it in zip(_ROWS, median[True], median[False], strict=True)
    ]
    print_table(("medians", "keys", "no keys", "ratio"), rows)


if __name__ == "__main__":
    main()
