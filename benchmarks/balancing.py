"""How well layers follow the speeds of the workers, and what moving them costs those who ask.

    python -m benchmarks.balancing live      three real workers whose speeds change under load
    python -m benchmarks.balancing noise     noisy stage times for ten minutes on a virtual clock

`live` has three workers of speeds 1 : 2 : 4, which the coordinator does not know: their probes all
say the same, so the first plan is even. Clients ask one request after the other. Then the fast
worker becomes four times slower, and later as fast as before. Every answer is compared with
transformers.

What is reached is held against the best contiguous split, which is found by trying with the same
workers and strategy "custom". What workers take is known (`pace`), so what each split over one, two
or three of them gives, in any order, can be calculated; the best few of all are tried.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from benchmarks.common import print_table
from benchmarks.paced_cluster import PacedCluster
from benchmarks.scenario import Scenario
from benchmarks.splits import (
    NUM_LAYERS,
    POLL_S,
    Asked,
    Split,
    Splits,
    calculated,
    split_of,
    splits,
    text_of,
)
from benchmarks.steady_load import SteadyLoad, make_examples
from benchmarks.virtual_cluster import VirtualCluster
from benchmarks.watched_coordinator import Expected
from distributed_llm.common.messages import ClusterStatus
from distributed_llm.common.units import parse_layers
from tests import checkpoints

PROMPT_TOKENS, NEW_TOKENS = 64, 64
SLOWDOWNS = {"slow": 16.0, "middle": 8.0, "fast": 4.0}
SLOWER = {**SLOWDOWNS, "fast": 4 * SLOWDOWNS["fast"]}
WITHIN_S = 20.0
_SETTLE_S = 30.0
_VIRTUAL_S = 600.0


def paced_checkpoint(folder: Path | None) -> Path:
    """Return a small float32 checkpoint; it is written if it is not there."""
    folder = folder or Path(tempfile.gettempdir()) / "dllm-paced-llama"
    if not (folder / "config.json").exists():
        checkpoints.make_checkpoint(
            folder,
            num_layers=NUM_LAYERS,
            hidden_size=128,
            intermediate_size=352,
            vocab_size=512,
            max_position_embeddings=512,
            tie=False,
        )
    return folder


# ------------------------------------------------------------------ a cluster that moves layers


@dataclass(frozen=True)
class Look:
    """What the coordinator told at a time (`perf_counter` seconds)."""

    at: float
    status: ClusterStatus

    @property
    def moving(self) -> bool:
        """Whether layers are on the move, or loading."""
        workers = self.status.workers
        return any(w.next_layers is not None or w.state == "loading" for w in workers)


@dataclass(frozen=True)
class MoveSeen:
    """One move as clients saw it.

    Attributes:
        seconds: from its begin to its end.
        stall_s: how long steps stood still, as the coordinator says.
        worst_gap_s: between two tokens of a request, of those that it concerned.
        usual_gap_s: median in the five seconds before it, since speeds changed.
        longest_usual_s: the longest before it.
        expected_s: step time that was expected of the new plan; None if no search found it.
    """

    phase: str
    seconds: float
    stall_s: float
    worst_gap_s: float
    usual_gap_s: float
    longest_usual_s: float
    expected_s: float | None


@dataclass(frozen=True)
class PhaseSeen:
    """What came of a change of speeds.

    Attributes:
        moves: that were made.
        reached_s: from the change to the end of the last of them.
        rate: tokens/s in a while after the time that is allowed.
        later: in a while after that.
        step_s: mean time between two tokens of a request in that second while.
        forecasts: of that, at the time; as multiples of it.
        stage_errors: medians per worker of how far single tasks were off.
    """

    name: str
    slowdowns: Mapping[str, float]
    split: Split
    moves: int
    reached_s: float
    rate: float
    later: float
    step_s: float
    forecasts: list[float]
    stage_errors: list[float]


class Watch:
    """Looks at a cluster while its workers' speeds change."""

    def __init__(self, cluster: PacedCluster, load: SteadyLoad, window_s: float) -> None:
        self._cluster = cluster
        self._load = load
        self._window_s = window_s
        self._looks: list[Look] = []
        self._changed_at = 0.0
        self.moves: list[MoveSeen] = []

    async def phase(self, name: str, slowdowns: Mapping[str, float]) -> PhaseSeen:
        """Set the speeds, and return what comes of it."""
        for worker, slowdown in slowdowns.items():
            self._cluster.set_slowdown(worker, slowdown)
        began = self._changed_at = time.perf_counter()
        await self._look_until(began + WITHIN_S)
        allowed = time.perf_counter()
        await self._look_until(allowed + self._window_s)
        steady, first = time.perf_counter(), len(self._looks)
        await self._look_until(steady + self._window_s)
        ended = time.perf_counter()
        looks = [look for look in self._looks if look.at >= began]
        made = list(self._moves(name, looks))
        self.moves += [move for move, _ in made]
        step_s = mean(gap.seconds for gap in self._load.gaps(steady, ended))
        searches = [search for at, search in self._cluster.searches if steady <= at < ended]
        errors = [
            [w.prediction_error for w in look.status.workers if w.prediction_error is not None]
            for look in self._looks[first:]
        ]
        return PhaseSeen(
            name,
            dict(slowdowns),
            split_of(looks[-1].status),
            moves=len(made),
            reached_s=max((at - began for _, at in made), default=0.0),
            rate=self._load.tokens_per_s(allowed, steady),
            later=self._load.tokens_per_s(steady, ended),
            step_s=step_s,
            forecasts=[search.served.step_s / step_s for search in searches],
            stage_errors=[median(each) for each in zip(*errors, strict=False)],
        )

    async def _look_until(self, end: float) -> None:
        while time.perf_counter() < end:
            self._looks.append(Look(time.perf_counter(), await self._load.status()))
            await asyncio.sleep(POLL_S)

    def _moves(self, phase: str, looks: Sequence[Look]) -> Iterator[tuple[MoveSeen, float]]:
        """Yield the moves that were made, and when each ended."""
        begin: float | None = None
        for before, look in pairwise(looks):
            if look.moving and begin is None:
                begin = before.at
            if look.status.moves > before.status.moves:
                yield self._seen(phase, look, before.at if begin is None else begin), look.at
            if not look.moving:
                begin = None

    def _seen(self, phase: str, look: Look, begin: float) -> MoveSeen:
        since = max(begin - 5.0, self._changed_at)
        usual = [gap.seconds for gap in self._load.gaps(since, begin)]
        split = split_of(look.status)
        searches = [search for at, search in self._cluster.searches if at <= begin + 0.5]
        best = [
            search.best
            for search in searches
            if search.best and _split_expected(search.best) == split
        ]
        return MoveSeen(
            phase,
            seconds=look.at - begin,
            stall_s=look.status.move_stall_s,
            worst_gap_s=max(gap.seconds for gap in self._load.gaps(begin, look.at)),
            usual_gap_s=median(usual),
            longest_usual_s=max(usual),
            expected_s=best[-1].step_s if best else None,
        )


def _split_expected(expected: Expected) -> Split:
    found = []
    for stage in expected.layers:
        name, _, held = stage.rpartition(" ")
        found.append((name, len(parse_layers(held))))
    return tuple(found)


# ------------------------------------------------------------------ live


async def live(given: argparse.Namespace) -> None:
    """Let speeds change under load; compare with the best splits that stay."""
    model = paced_checkpoint(given.folder)
    examples = make_examples(
        model, given.examples, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS
    )
    plan = [("even start", SLOWDOWNS), ("fast one 4 x slower", SLOWER), ("and back", SLOWDOWNS)]
    with PacedCluster(model, SLOWDOWNS) as cluster:
        started = split_of(await cluster.coordinate(strategy="speed", objective=given.objective))
        print(f"first plan: {text_of(started)}")
        async with SteadyLoad(cluster.address, examples, given.clients) as load:
            watch = Watch(cluster, load, given.window)
            seen = [await watch.phase(name, speeds) for name, speeds in plan[: given.phases]]
            await load.finish()
            events = (await load.status()).events
        _print_moves(watch.moves, seen)
        print(f"\nrequests: {dict(load.outcomes)} {' '.join(load.errors[:5])}")
        if given.events:
            print("\n".join(event.text for event in events), cluster.logs(), sep="\n")
        asked = Asked(given.clients, PROMPT_TOKENS, NEW_TOKENS)
        statics = Splits(cluster, examples, asked, given.window)
        bests: dict[tuple[float, ...], dict[Split, float]] = {}
        for slowdowns in (SLOWDOWNS, SLOWER):
            chosen = {phase.split for phase in seen if phase.slowdowns == slowdowns}
            if chosen:
                key = tuple(slowdowns.values())
                bests[key] = await statics.best(slowdowns, chosen, given.candidates)
        _print_phases(seen, bests)
        _print_splits(bests, asked)
        _print_errors(seen)


def _print_moves(moves: Sequence[MoveSeen], seen: Sequence[PhaseSeen]) -> None:
    measured = {phase.name: phase.step_s for phase in seen}
    head = ("move", "took, s", "steps stood still, ms", "worst gap, ms", "usual gap, ms")
    more = ("worst / usual", "longest before / usual", "expected step / measured later")
    rows = []
    for move in moves:
        forecast = "" if move.expected_s is None else move.expected_s / measured[move.phase]
        rows.append(
            (
                *(move.phase, move.seconds, 1000 * move.stall_s, 1000 * move.worst_gap_s),
                *(1000 * move.usual_gap_s, move.worst_gap_s / move.usual_gap_s),
                *(move.longest_usual_s / move.usual_gap_s, forecast),
            )
        )
    print_table((*head, *more), rows)


def _print_phases(
    seen: Sequence[PhaseSeen], bests: Mapping[tuple[float, ...], dict[Split, float]]
) -> None:
    head = ("change", "moves", "last one ended, s", "split", "tokens/s after 20 s", "and later")
    rows = []
    for phase in seen:
        rates = bests[tuple(phase.slowdowns.values())]
        best = max(rates, key=rates.__getitem__)
        rows.append(
            (
                *(phase.name, phase.moves, phase.reached_s, text_of(phase.split), phase.rate),
                *(phase.later, text_of(best), rates[best], phase.rate / rates[best]),
                *(phase.later / rates[best], rates[phase.split] / rates[best]),
            )
        )
    more = ("best split that stays", "its tokens/s", "after 20 s / best", "later / best")
    print_table((*head, *more, "the same split, staying / best"), rows)


def _print_splits(bests: Mapping[tuple[float, ...], dict[Split, float]], asked: Asked) -> None:
    total = sum(1 for _ in splits(SLOWDOWNS))
    for slowdowns, rates in bests.items():
        by_name = dict(zip(SLOWDOWNS, slowdowns, strict=True))
        print(f"\nslowdowns {slowdowns}: {len(rates)} of {total} splits were tried")
        print_table(
            ("split", "tokens/s", "calculated"),
            [
                (text_of(split), rates[split], calculated(split, by_name, asked))
                for split in sorted(rates, key=lambda split: -rates[split])
            ],
        )


def _print_errors(seen: Sequence[PhaseSeen]) -> None:
    rows = [
        (
            phase.name,
            1000 * phase.step_s,
            median(phase.forecasts) if phase.forecasts else "",
            ", ".join(f"{100 * error:.1f} %" for error in phase.stage_errors),
        )
        for phase in seen
    ]
    print_table(("after", "step, ms", "expected step / measured", "single tasks, off by"), rows)


# ------------------------------------------------------------------ noise


async def noise(given: argparse.Namespace) -> None:
    """Let stages take up to a fifth more or less at random, for ten virtual minutes each.

    Before that the plan may follow the load for half a minute. Then the fastest worker becomes four
    times slower, to show that changes are still seen.
    """
    rows = []
    for seed in range(given.seeds):
        for spread in (0.0, 0.6):
            scenario = Scenario(
                workers=3,
                requests=20_000,
                skew=0.0,
                prompt=PROMPT_TOKENS,
                answer=NEW_TOKENS,
                batch=given.clients,
                spare=4.0,
                spread=spread,
                noise=given.noise,
                strategy="speed",
                objective=given.objective,
                seed=seed,
            )
            rows.append((seed, spread, *_virtual(scenario)))
    head = ("seed", "spread of speeds", "slowness", "layers", "tokens")
    more = (f"moves in {_SETTLE_S:.0f} s", f"moves in {_VIRTUAL_S:.0f} s", "moved after, s")
    print(f"\nvirtual time, every task +-{100 * given.noise:.0f} %")
    print_table((*head, *more, "single tasks, off by"), rows)
    print(f"\nmoves under noise in all: {sum(int(row[6]) for row in rows)}")


def _virtual(scenario: Scenario) -> tuple[str, str, int, int, int, str, str]:
    cluster = VirtualCluster(scenario)
    cluster.start()
    cluster.begin_asking()
    settled = _after(cluster, _SETTLE_S)
    status = _after(cluster, _VIRTUAL_S)
    errors = [w.prediction_error for w in status.workers if w.prediction_error is not None]
    slowness = [worker.slowness for worker in cluster.workers.values()]
    return (
        " ".join(f"{each:.2f}" for each in slowness),
        " ".join(str(worker.layers) for worker in status.workers),
        status.tokens_generated,
        settled.moves,
        status.moves - settled.moves,
        _moved_after(cluster, status.moves),
        f"{100 * median(errors):.1f} %",
    )


def _after(cluster: VirtualCluster, seconds: float) -> ClusterStatus:
    """Return the status so much later."""
    end = cluster.now + seconds
    cluster.run(lambda: cluster.now >= end, limit_s=2 * seconds)
    return cluster.core.status(now=cluster.now)


def _moved_after(cluster: VirtualCluster, moves: int) -> str:
    """Return how long it takes to move layers when the fastest worker becomes slow."""
    min(cluster.workers.values(), key=lambda worker: worker.slowness).slowness *= 4
    changed_at = cluster.now
    try:
        cluster.run(lambda: cluster.core.status(now=cluster.now).moves > moves, limit_s=60)
    except TimeoutError:
        return f"not in 60: {cluster.core.status(now=cluster.now).events[-1].text}"
    return f"{cluster.now - changed_at:.1f}"


# ------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one kind and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=("live", "noise"))
    parser.add_argument("--objective", choices=("auto", "throughput"), default="auto")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is or shall be")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--window", type=float, default=10.0, help="s that a rate is taken over")
    parser.add_argument("--candidates", type=int, default=4, help="splits to try for each speed")
    parser.add_argument("--phases", type=int, default=3, help="changes of speed to go through")
    parser.add_argument("--examples", type=int, default=1500, help="answers to be known beforehand")
    parser.add_argument("--events", action="store_true", help="show what the coordinator noted")
    parser.add_argument("--seeds", type=int, default=3, help="of noise")
    parser.add_argument("--noise", type=float, default=0.2, help="share of a task's time")
    given = parser.parse_args(arguments)
    asyncio.run({"live": live, "noise": noise}[given.kind](given))


if __name__ == "__main__":
    main()
