"""What a client sees while a worker of three leaves once others have its layers.

    python -m benchmarks.drain FOLDER [--dtype bfloat16] [--tokens 100]

FOLDER is a checkpoint, say one that benchmarks.make_checkpoint wrote.
"""

import argparse
import threading
import time
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.common import print_table
from distributed_llm import DistributedClient, LocalCluster

_PROMPT = list(range(5, 133))
_WORKERS = [{"name": name, "threads": 1} for name in ("a", "b", "c")]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=100)
    given = parser.parse_args()
    asked: dict[str, Any] = {
        "max_new_tokens": given.tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    settings = {"strategy": "memory", "dtype": given.dtype}
    with (
        LocalCluster(given.folder, _WORKERS, coordinator=settings) as cluster,
        DistributedClient(cluster.address) as client,
    ):
        expected = client.generate(_PROMPT, details=True, **asked).token_ids
        times: list[float] = []
        tokens: list[int] = []
        begun = threading.Event()

        def read() -> None:
            with DistributedClient(cluster.address) as other:
                for chunk in other.stream(_PROMPT, **asked):
                    times.extend([time.perf_counter()] * len(chunk.token_ids))
                    tokens.extend(chunk.token_ids)
                    if len(tokens) > given.tokens // 10:
                        begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        begun.wait()
        started = time.perf_counter()
        client.drain_worker("b")
        took_s = time.perf_counter() - started
        reader.join()
        gaps = [late - early for early, late in pairwise(times) if late > early]
        stall_s = client.status().move_stall_s
    usual_s = median(gaps)
    row = (
        given.dtype,
        f"{took_s:.1f}",
        f"{1000 * stall_s:.0f}",
        f"{1000 * usual_s:.0f}",
        f"{stall_s / usual_s:.2f}",
        f"{max(gaps) / usual_s:.2f}",
        "yes" if tokens == expected else "no",
    )
    head = ("dtype", "drained in, s", "steps stood still, ms", "usual gap, ms", "still / usual")
    print_table((*head, "worst gap / usual", "same tokens as before"), [row])


if __name__ == "__main__":
    main()
