"""Round trips of a Ray actor call; a process of its own, because Ray may be installed elsewhere.

    PYTHON_WITH_RAY benchmarks/ray_call.py

Needs nothing but Ray. For every line "BYTES CALLS" on stdin it prints the median microseconds of so
many calls that carry so many bytes there and back. The first line printed says that it is ready.
"""

import importlib
import statistics
import sys
import time
from typing import Any


class Echo:
    """The actor."""

    def call(self, payload: bytes) -> bytes:
        """Return what came."""
        return payload


def median_us(ray: Any, actor: Any, size: int, calls: int) -> float:
    """Return the median round trip, microseconds."""
    payload, times = bytes(size), []
    for _ in range(calls):
        started = time.perf_counter()
        ray.get(actor.call.remote(payload))
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def main() -> None:
    """Answer lines until stdin ends."""
    ray: Any = importlib.import_module("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    actor = ray.remote(Echo).remote()
    median_us(ray, actor, 4096, 200)  # warms up
    print("ready", flush=True)
    for line in sys.stdin:
        size, calls = map(int, line.split())
        print(median_us(ray, actor, size, calls), flush=True)


if __name__ == "__main__":
    main()
