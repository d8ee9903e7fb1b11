"""Workers join and leave all the time while clients ask: nothing may fail, and nothing be wrong.

    python -m benchmarks.churn --seconds 300

Real `dllm worker` processes of different speeds, none of which can hold the model alone. Every few
seconds one joins or leaves: it is told to end (SIGTERM), drained by a client, or killed (SIGKILL).
Every answer is compared with what transformers says.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks.common import print_table
from benchmarks.steady_load import SteadyLoad, make_examples
from distributed_llm import AsyncDistributedClient, LocalCluster
from distributed_llm.common.errors import DistributedLLMError
from distributed_llm.local_process import LocalProcess
from tests import checkpoints

PROMPT_TOKENS, NEW_TOKENS = 32, 32
NUM_LAYERS = 6
SLOWDOWNS = (4.0, 8.0, 16.0)
LEAST, MOST = 2, 4
"""Workers that serve or could: none leaves if fewer are left, none joins if there are as many."""

_LEAVE_S = 30.0
_ANSWER_S = 60.0
_POLL_S = 0.25

How = Literal["joins", "SIGTERM", "drained", "SIGKILL"]


def churned_checkpoint(folder: Path | None) -> Path:
    """Return a tiny float32 checkpoint; it is written if it is not there."""
    folder = folder or Path(tempfile.gettempdir()) / "dllm-churned-llama"
    if not (folder / "config.json").exists():
        checkpoints.make_checkpoint(
            folder, num_layers=NUM_LAYERS, hidden_size=64, max_position_embeddings=512, tie=False
        )
    return folder


@dataclass(frozen=True)
class Deed:
    """What was done to a worker, and when (`perf_counter` seconds): from `begin` to `end`."""

    how: How
    worker: str
    begin: float
    end: float
    note: str = ""


class Churn:
    """Lets workers of a cluster come and go.

    Args:
        settings: of those that come.
        every_s: from one deed to the next, on average.

    Attributes:
        deeds: what was done.
    """

    def __init__(
        self, cluster: LocalCluster, settings: Mapping[str, Any], *, seed: int, every_s: float
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._random = random.Random(seed)
        self._every_s = every_s
        self._there: dict[str, LocalProcess] = {w.name: w for w in cluster.workers}
        self._numbers = len(self._there)
        self._joined: list[str] = []
        self.deeds: list[Deed] = []

    async def run(self, seconds: float) -> None:
        """Go on for so long."""
        end = time.perf_counter() + seconds
        async with AsyncDistributedClient(self._cluster.address) as client:
            while time.perf_counter() < end:
                began = time.perf_counter()
                how = await self._next(client)
                if how is not None:
                    self.deeds.append(await self._do(how, client, began))
                pause_s = self._every_s * self._random.uniform(0.5, 1.5)
                await asyncio.sleep(max(0.0, began + pause_s - time.perf_counter()))

    async def _next(self, client: AsyncDistributedClient) -> How | None:
        """Return what to do now: enough others have to be there, and to have a plan."""
        status = await client.status()
        joined = {worker.name for worker in status.workers if worker.state != "leaving"}
        self._joined = sorted(joined & set(self._there))
        leaving: list[How] = ["SIGTERM", "drained", "SIGKILL"]
        may_leave = len(self._joined) > LEAST and status.state == "serving"
        may_join = len(self._there) < MOST
        if may_leave and not (may_join and self._random.random() < 0.5):
            return self._random.choice(leaving)
        return "joins" if may_join else None

    async def _do(self, how: How, client: AsyncDistributedClient, began: float) -> Deed:
        if how == "joins":
            self._numbers += 1
            name = f"worker-{self._numbers}"
            slowdown = self._random.choice(SLOWDOWNS)
            worker = self._cluster.add_worker(name=name, slowdown=slowdown, **self._settings)
            self._there[name] = worker
            return Deed(how, name, began, time.perf_counter())
        name = self._random.choice(self._joined)
        worker = self._there.pop(name)
        note = ""
        if how == "SIGTERM":
            worker.terminate()
        elif how == "SIGKILL":
            worker.kill()
        else:
            try:
                await asyncio.wait_for(client.drain_worker(name), _LEAVE_S)
            except (DistributedLLMError, TimeoutError) as exc:
                note = repr(exc)
        note = note or await self._gone(worker)
        if worker.exit_code is None:
            worker.kill()
        return Deed(how, name, began, time.perf_counter(), note)

    async def _gone(self, worker: LocalProcess) -> str:
        """Wait until a process has ended; return what is wrong with how it did."""
        give_up_at = time.perf_counter() + _LEAVE_S
        while worker.exit_code is None:
            if time.perf_counter() > give_up_at:
                return f"still there after {_LEAVE_S:.0f} s: {worker.log_tail()[-300:]}"
            await asyncio.sleep(_POLL_S)
        return ""


async def churn(given: argparse.Namespace) -> bool:
    """Let workers come and go under load, print what came of it; return whether all was right."""
    model = churned_checkpoint(given.folder)
    examples = make_examples(
        model, given.examples, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS
    )
    worker = {"threads": 1, "max_memory": given.memory}
    first = [{"slowdown": slowdown, **worker} for slowdown in SLOWDOWNS]
    settings = {"strategy": "speed", "objective": given.objective, "replicas": given.replicas}
    with LocalCluster(model, first, coordinator=settings) as cluster:
        async with SteadyLoad(cluster.address, examples, given.clients) as load:
            began = time.perf_counter()
            doing = Churn(cluster, worker, seed=given.seed, every_s=given.every)
            await doing.run(given.seconds)
            took_s = time.perf_counter() - began
            late = ""
            try:
                await asyncio.wait_for(load.finish(), _ANSWER_S)
            except TimeoutError:
                late = f"not all was answered within {_ANSWER_S:.0f} s"
            status = await load.status()
        if given.events:
            print(cluster.coordinator.log_tail())
    right = not late and set(load.outcomes) == {"right"}
    _print_deeds(doing.deeds, load)
    rows = [
        ("seconds", took_s),
        ("requests", ", ".join(f"{n} {how}" for how, n in load.outcomes.items()) + late),
        ("tokens/s", load.tokens_per_s(began, began + took_s)),
        ("plans", status.epoch),
        ("moves while requests ran", status.moves),
        ("usual gap between two tokens, ms", 1000 * _usual_s(load, began, began + took_s)),
    ]
    print_table(("all", ""), rows)
    for error in load.errors[:10]:
        print(error)
    for deed in doing.deeds:
        if deed.note:
            print(f"{deed.worker} {deed.how}: {deed.note}")
    return right


def _usual_s(load: SteadyLoad, begin: float, end: float) -> float:
    return median(gap.seconds for gap in load.gaps(begin, end))


def _print_deeds(deeds: Sequence[Deed], load: SteadyLoad) -> None:
    """Print how often what was done, how long it took, and what clients saw of it."""
    counts = Counter(deed.how for deed in deeds)
    took: defaultdict[How, list[float]] = defaultdict(list)
    gaps: defaultdict[How, list[float]] = defaultdict(list)
    for deed in deeds:
        took[deed.how].append(deed.end - deed.begin)
        around = load.gaps(deed.begin, deed.end + 1.0)
        gaps[deed.how].append(max((gap.seconds for gap in around), default=0.0))
    print_table(
        ("a worker", "times", "took, s, median", "worst gap, s, median", "and of all"),
        [
            (how, count, median(took[how]), median(gaps[how]), max(gaps[how]))
            for how, count in counts.items()
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; exit with 1 if a request failed or an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=4.0, help="s from one deed to the next")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--objective", choices=("auto", "throughput", "latency"), default="auto")
    parser.add_argument("--replicas", default="1", help="1, 2, ... or auto")
    parser.add_argument("--memory", default="1280KiB", help="of each worker; two hold the model")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be")
    parser.add_argument("--examples", type=int, default=4000, help="answers known beforehand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", action="store_true", help="show the coordinator's log")
    right = asyncio.run(churn(parser.parse_args(arguments)))
    raise SystemExit(0 if right else 1)


if __name__ == "__main__":
    main()
