"""Streams through the HTTP API, and the same ones through the ZeroMQ client.

    python -m benchmarks.api [--streams 200] [--tokens 64] [--rounds 4] [--slowdown 6]

All ask the same coordinator, at the same time within a round, and rounds go ZeroMQ, API, ZeroMQ,
API. Its worker takes a known time for a step, so on a machine of a few cores the rest has room to
run. Every answer is compared with that of the first round: none may be lost or changed. The API's
memory is read after its first request, and at the most later.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import distributed_llm
from benchmarks.common import gather, print_table
from benchmarks.paced_cluster import PacedCluster
from distributed_llm import AsyncDistributedClient
from distributed_llm.client.new_key import create_key
from distributed_llm.common.roles import Role
from distributed_llm.common.units import split_address
from distributed_llm.local_process import LocalProcess

_TIMEOUT_S = 30.0
_MODEL = Path(distributed_llm.__file__).parent / "builtin_model"


@dataclass(frozen=True)
class Stream:
    """One answer.

    Attributes:
        times: of its pieces, `perf_counter` seconds, the time of the request first.
    """

    text: str
    times: list[float]

    @property
    def first_s(self) -> float:
        """From the request to the first piece."""
        return self.times[1] - self.times[0]

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece and the next."""
        return [
            after - before for before, after in zip(self.times[1:], self.times[2:], strict=False)
        ]


def _messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me story number {number}."}]


async def by_zeromq(client: AsyncDistributedClient, number: int, tokens: int) -> Stream:
    """Return an answer that came over ZeroMQ."""
    times, texts = [time.perf_counter()], []
    chunks = client.stream_chat(
        _messages(number), max_new_tokens=tokens, temperature=0.0, ignore_eos=True
    )
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.text:
                times.append(time.perf_counter())
                texts.append(chunk.text)
    return Stream("".join(texts), times)


async def by_http(url: str, key: str, number: int, tokens: int) -> Stream:
    """Return an answer that came over HTTP; read by as little code as can be."""
    host, port = split_address(url.removeprefix("http://"))
    body = json.dumps(
        {
            "messages": _messages(number),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    times, events = [time.perf_counter()], []
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + body)
    async for line in reader:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            events.append(line)
    writer.close()
    return _stream(times, events)


def _stream(times: list[float], events: Sequence[bytes]) -> Stream:
    """Return what events say; those without text do not count."""
    kept, texts = times[:1], []
    for at, event in zip(times[1:], events, strict=True):
        chunk: Any = json.loads(event[len(b"data: ") :])
        if "error" in chunk:
            raise RuntimeError(str(chunk["error"]))
        if text := "".join(one["delta"].get("content") or "" for one in chunk["choices"]):
            kept.append(at)
            texts.append(text)
    return Stream("".join(texts), kept)


def memory_mb(pid: int, name: str) -> float:
    """Return what a process takes: "VmRSS" now, "VmHWM" at the most so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1000


def _row(name: str, streams: Sequence[Stream], wanted: Sequence[str], took_s: float) -> list[Any]:
    gaps = sorted(gap for stream in streams for gap in stream.gaps_s)
    changed = sum(one.text != text for one, text in zip(streams, wanted, strict=True))
    return [
        name,
        statistics.median(stream.first_s for stream in streams) * 1e3,
        statistics.median(gaps) * 1e3,
        statistics.fmean(gaps) * 1e3,
        gaps[int(len(gaps) * 0.99)] * 1e3,
        took_s,
        changed,
    ]


async def measure(streams: int, tokens: int, rounds: int, slowdown: float) -> None:
    """Print a row for each round, and what the API takes."""
    with (
        PacedCluster(_MODEL, {"worker": slowdown}) as cluster,
        tempfile.TemporaryDirectory(prefix="dllm-") as folder,
    ):
        await cluster.coordinate(dtype="float32")
        key = (await create_key(cluster.address, "bench", Role.CLIENT, timeout_s=_TIMEOUT_S)).text
        command = ("api", "--coordinator", cluster.address, "--bind", "127.0.0.1:0")
        api = LocalProcess("api", command, {"DLLM_API__LOG_LEVEL": "warning"}, Path(folder) / "log")
        try:
            url = api.stdout.readline().decode().strip()
            async with AsyncDistributedClient(cluster.address, key=key) as client:
                numbers = range(streams)
                await by_http(url, key, 0, 2)
                before = memory_mb(api.pid, "VmRSS")
                rows: list[list[Any]] = []
                wanted = [""] * streams
                medians: dict[str, list[float]] = {"ZeroMQ": [], "API": []}
                for turn in range(rounds):
                    name = ("ZeroMQ", "API")[turn % 2]
                    began = time.perf_counter()
                    found = await gather(
                        by_http(url, key, n, tokens) if turn % 2 else by_zeromq(client, n, tokens)
                        for n in numbers
                    )
                    if turn == 0:
                        wanted = [one.text for one in found]
                    row = _row(name, found, wanted, time.perf_counter() - began)
                    medians[name].append(row[2])
                    rows.append(row)
                after = memory_mb(api.pid, "VmHWM")
        finally:
            api.close()
    head = ("by", "first ms", "gap ms", "mean", "p99", "all, s", "changed")
    print_table(head, rows)
    added = statistics.median(medians["API"]) - statistics.median(medians["ZeroMQ"])
    print(f"\nThe API adds {added:.2f} ms to the median gap of {streams} streams.")
    print(f"It takes {before:.0f} MB, and {after - before:.0f} MB more at the most with them.")


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--slowdown", type=float, default=6.0)
    given = parser.parse_args()
    asyncio.run(measure(given.streams, given.tokens, given.rounds, given.slowdown))


if __name__ == "__main__":
    main()
