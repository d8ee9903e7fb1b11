"""Noise against a live port: no token may change, no answer wait, no memory be kept.

    python -m benchmarks.soak [--seconds 60]

Strangers connect and send random bytes, connect and close (a port scan), connect and are silent,
and greet in HTTP and TLS, while a client generates; once with keys and once without. Its answers
have to be what they were before; the gaps between tokens and the coordinator's memory are compared.
"""

import argparse
import contextlib
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, pairwise
from statistics import median

import psutil

from benchmarks.common import print_table
from distributed_llm import DistributedClient, LocalCluster
from distributed_llm.common.units import split_address

_PROMPTS = 3
_PAUSE_S = 0.002
"""Time between two connections of one attacker: the machine is to be left some."""

_MAX_NOISE_BYTES = 64 * 1024
_GREETINGS = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    bytes.fromhex("16030100c8010000c40303") + bytes(range(189)),
    b"SSH-2.0-OpenSSH_9.6\r\n",
    b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32),
    b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32),
)


class Strangers:
    """Attack a port from a few threads; a context manager.

    Args:
        address: "HOST:PORT".
        silent: connections that are kept open and say nothing.

    Attributes:
        connections: that were made, by what for.
    """

    def __init__(self, address: str, *, silent: int) -> None:
        self._target = split_address(address)
        self._silent = silent
        self._over = threading.Event()
        self.connections: Counter[str] = Counter()
        attacks = (self._random_bytes, self._scan, self._greet, self._be_silent)
        self._threads = [threading.Thread(target=self._repeat, args=(one,)) for one in attacks]

    def __enter__(self) -> "Strangers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, attack: Callable[[], None]) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError):  # it was closed before all was said
                attack()
            self.connections[attack.__name__.strip("_")] += 1
            self._over.wait(_PAUSE_S)

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._target, timeout=0.5)

    def _random_bytes(self) -> None:
        with self._connect() as raw:
            raw.sendall(secrets.token_bytes(1 + secrets.randbelow(_MAX_NOISE_BYTES)))

    def _scan(self) -> None:
        self._connect().close()

    def _greet(self) -> None:
        with self._connect() as raw:
            raw.sendall(secrets.choice(_GREETINGS))
            raw.recv(64)

    def _be_silent(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(self._silent):
                stack.enter_context(self._connect())
            self._over.wait(4.0)  # longer than a handshake may take


@dataclass
class Answers:
    """What a client got.

    Attributes:
        new_tokens: of each answer.
        tokens: of each answer, by its number.
        gaps_s: between two tokens of an answer.
    """

    new_tokens: int
    tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)
    gaps_s: list[float] = field(default_factory=list)

    def ask(self, client: DistributedClient, number: int) -> None:
        """Get one more answer."""
        ids: list[int] = []
        times: list[float] = []
        chunks = client.stream(
            f"Once upon a time, {number % _PROMPTS} animals",
            max_new_tokens=self.new_tokens,
            seed=number % _PROMPTS,
            temperature=0.8,
            ignore_eos=True,
        )
        for chunk in chunks:
            ids += chunk.token_ids
            times += [time.perf_counter()] * bool(chunk.token_ids)
        self.tokens[number] = tuple(ids)
        self.gaps_s += [after - before for before, after in pairwise(times)]


@dataclass(frozen=True)
class Soaked:
    """What became of a cluster under noise.

    Attributes:
        calm: answers before.
        noisy: answers meanwhile.
        connections: of strangers.
        grown_bytes: memory that the coordinator has more than before.
    """

    calm: Answers
    noisy: Answers
    connections: Counter[str]
    grown_bytes: int

    @property
    def changed(self) -> list[int]:
        """Answers that are not what they were without noise."""
        return [n for n, ids in self.noisy.tokens.items() if ids != self.calm.tokens[n % _PROMPTS]]


def soak(
    client: DistributedClient,
    address: str,
    coordinator: psutil.Process,
    *,
    seconds: float,
    silent: int = 200,
    new_tokens: int = 100,
) -> Soaked:
    """Return what becomes of a cluster that strangers attack for so long.

    Args:
        client: of the cluster, which serves.
        address: "HOST:PORT" of its coordinator.
        coordinator: its process.
        silent: connections that say nothing.
        new_tokens: of each answer.
    """
    calm, noisy = Answers(new_tokens), Answers(new_tokens)
    for number in range(_PROMPTS):
        calm.ask(client, number)
    before = coordinator.memory_info().rss
    give_up_at = time.monotonic() + seconds
    with Strangers(address, silent=silent) as strangers:
        for number in count():
            noisy.ask(client, number)
            if time.monotonic() > give_up_at:
                break
    grown = coordinator.memory_info().rss - before
    return Soaked(calm, noisy, strangers.connections, grown)


def main() -> None:
    """Attack a cluster with keys and one without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    rows = []
    for insecure in (False, True):
        settings = {"insecure": insecure, "dtype": "float32"}
        with (
            LocalCluster(workers=2, coordinator=settings, progress=None) as cluster,
            DistributedClient(cluster.address, insecure=insecure) as client,
        ):
            process = psutil.Process(cluster.coordinator.pid)
            soaked = soak(client, cluster.address, process, seconds=given.seconds)
        assert not soaked.changed, f"answers {soaked.changed} are others than without noise"
        calm, noisy = soaked.calm.gaps_s, soaked.noisy.gaps_s
        rows.append(
            (
                "no keys" if insecure else "keys",
                f"{soaked.connections.total():,}",
                f"{len(soaked.noisy.tokens)}",
                1e3 * median(calm),
                1e3 * median(noisy),
                1e3 * max(calm),
                1e3 * max(noisy),
                max(noisy) / max(calm),
                f"{soaked.grown_bytes / 2**20:.1f}",
            )
        )
    head = ("port", "connections", "answers, all equal", "median gap, ms", "with noise")
    print_table((*head, "worst gap, ms", "with noise", "ratio", "RSS growth, MiB"), rows)


if __name__ == "__main__":
    main()
